"""inventory.img: only the network lock's note changes on the way, and nothing else is ever believed.

Invariants: for a well-formed message exactly the value of field 11 becomes 2 and every other byte stays; for any other
bytes there is a BadImage or an unchanged image, never another exception.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.checkpoint.inventory import BadImage, lock_table, nothing_locked

MAGIC = 0x58313116


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def image(*fields: bytes) -> bytes:
    message = b"".join(fields)
    return struct.pack("<II", MAGIC, len(message)) + message


other_fields = st.one_of(
    st.builds(number, st.sampled_from([1, 2, 4, 5, 8, 9, 10]), st.integers(0, 2**64 - 1)),
    st.builds(text, st.sampled_from([3, 12]), st.binary(max_size=300)),
)


@given(before=st.lists(other_fields, max_size=5), after=st.lists(other_fields, max_size=5), method=st.integers(0, 2))
def test_only_the_lock_method_changes(before: list[bytes], after: list[bytes], method: int) -> None:
    changed = nothing_locked(image(*before, number(11, method), *after))
    assert changed == image(*before, number(11, 2), *after)


@given(st.lists(other_fields, max_size=5))
def test_without_the_field_nothing_changes(fields: list[bytes]) -> None:
    assert nothing_locked(image(*fields)) == image(*fields)
    assert lock_table(image(*fields)) is None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for function in (nothing_locked, lock_table):
        try:
            function(data)
        except BadImage as error:
            assert "inventory.img" in str(error)


def test_the_table_is_cut_off_as_criu_does() -> None:
    """CRIU formats it into 32 bytes; seen on a real dump."""
    name = b"c8af206f-2fc4-403d-877d-1b8c5be9f1a2"
    assert lock_table(image(number(1, 2), text(13, name))) == "inet CRIU-c8af206f-2fc4-403d-87"


@pytest.mark.parametrize("cut", [0, 4, 7, 9])
def test_a_cut_off_image(cut: int) -> None:
    with pytest.raises(BadImage):
        nothing_locked(image(number(1, 2), number(11, 1))[:cut])
