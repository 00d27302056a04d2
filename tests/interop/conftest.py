"""One lab with the guest for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop.guest.image import image
from tests.interop.lab import Lab, lab


@pytest.fixture(scope="session")
def rxe_lab() -> Iterator[Lab]:
    """Our NIC and Linux rxe."""
    with lab(image()) as place:
        yield place
