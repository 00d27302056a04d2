"""docs/wire-protocol.md states the numbers that the code has: each row of its marked tables is compared."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from softroce_ext.transport.engine import EngineConfig
from softroce_ext.wire import headers, opcodes

TEXT = (Path(__file__).parents[3] / "docs" / "wire-protocol.md").read_text(encoding="utf-8")
CONSTANT = re.compile(r"^\| (?P<what>[^|]+) \| (?P<value>[\d.x]+(?:[a-f\d]*))(?: s)? \| `(?P<name>[\w.]+)` \|$", re.M)
CONSTANTS = [match.group("what", "value", "name") for match in CONSTANT.finditer(TEXT)]
BYTE_8 = {int(bits, 16): text for bits, text in re.findall(r"^\| 8 \| (0x[0-9a-f]{2}) \| (.+) \|$", TEXT, re.M)}


def real(name: str) -> float:
    """The value of `EngineConfig.field` or `room.module.NAME`."""
    holder, _, attribute = name.rpartition(".")
    if holder == "EngineConfig":
        return float(getattr(EngineConfig(), attribute))
    return float(getattr(importlib.import_module(f"softroce_ext.{holder}"), attribute))


def number(text: str) -> float:
    return float(int(text, 16)) if text.startswith("0x") else float(text)


@pytest.mark.parametrize(("what", "value", "name"), CONSTANTS, ids=[name for _, _, name in CONSTANTS])
def test_a_constant_is_the_code_s(what: str, value: str, name: str) -> None:
    assert number(value) == real(name), what


def test_every_timer_of_the_extension_has_a_row() -> None:
    timers = {
        f"EngineConfig.{name}" for name in vars(EngineConfig)["__slots__"] if re.match(r"pause|stale|resume", name)
    }
    assert timers and timers <= {name for _, _, name in CONSTANTS}


def test_byte_8_of_the_bth_is_complete() -> None:
    """The bits are those of the code, they do not overlap, and together they are the byte."""
    bits = (headers.ACK_REQ, headers.MIGROS_CAPABLE, headers.MIGROS_RESUMED, headers.MIGROS_RECEIVER)
    rest = 0xFF & ~sum(bits)
    assert set(BYTE_8) == {*bits, rest}
    assert BYTE_8[rest].startswith("reserved")
    assert sum(BYTE_8) == 0xFF


def test_the_prose_uses_the_same_numbers() -> None:
    ours = len([bit for bit, text in BYTE_8.items() if "MigrOS" in text])
    assert f"two messages and {['no', 'one', 'two', 'three', 'four'][ours]} bits" in TEXT
    assert f"AETH syndrome **{headers.NAK_STOPPED:#x}**" in TEXT and f"opcode **{opcodes.RESUME:#x}**" in TEXT
    assert f"every {EngineConfig().packets_per_ackreq}th packet" in TEXT


def test_states_have_the_names_of_the_code() -> None:
    from softroce_ext.transport.state.movement import MovementState

    rows = re.findall(r"^\| (Running|Stopped|Paused|Resuming) \|", TEXT, re.M)
    assert {part for state in MovementState for part in state.name.split("_")} == {row.upper() for row in rows}
