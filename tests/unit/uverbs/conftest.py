"""Fixtures: a NIC's upper half, a program on it, and further NICs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.nic.uverbs_program import Program, Upper


@pytest.fixture
def upper(tmp_path: Path) -> Iterator[Upper]:
    """A NIC's upper half."""
    made = Upper(tmp_path)
    yield made
    made.close()


@pytest.fixture
def program(upper: Upper) -> Program:
    """A program that has opened the device."""
    return Program(upper)


@pytest.fixture
def second_upper(tmp_path: Path) -> Iterator[Callable[..., Upper]]:
    """Makes another NIC."""
    made: list[Upper] = []

    def make(base: int = 2) -> Upper:
        run = tmp_path / f"nic{base}-{len(made)}"
        run.mkdir()
        made.append(Upper(run, base))
        return made[-1]

    yield make
    for item in made:
        item.close()
