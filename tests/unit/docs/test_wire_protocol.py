"""docs/wire-protocol.md states the numbers that the code has.

Each row of its marked tables is compared with the code, and so is each number in its prose that names a field of a
packet. A row that cannot be read and a number that is no longer found are failures, not omissions.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.gsi import MAD_BYTES
from softroce_ext.transport.state.movement import MovementState
from softroce_ext.wire import headers, opcodes, path

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "wire-protocol.md").read_text(encoding="utf-8")
MARK = "<!-- compared with the code: tests/unit/docs/test_wire_protocol.py -->"
JOINED = re.sub(r"(?<!\n)\n(?!\n) *", " ", TEXT)
"""The text with each paragraph on one line, so that a pattern does not depend on where lines break."""
WORDS = ("no", "one", "two", "three", "four")


def marked_table(after: str) -> list[list[str]]:
    """The rows of the first marked table after the text `after`, without its head."""
    lines = TEXT.partition(after)[2].partition(MARK)[2].lstrip("\n").splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
    assert end > 2, f"docs/wire-protocol.md has no marked table after {after!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


def number(text: str) -> float:
    """A hexadecimal or decimal number, with or without the unit of seconds."""
    match = re.fullmatch(r"(0x[0-9a-f]+|\d+(?:\.\d+)?)(?: s)?", text)
    assert match, f"{text!r} is not a number, or not with the unit s"
    return float(int(match[1], 16)) if match[1].startswith("0x") else float(match[1])


def real(name: str) -> float:
    """The value of `EngineConfig.field` or `room.module.NAME`."""
    holder, _, attribute = name.rpartition(".")
    if holder == "EngineConfig":
        return float(getattr(EngineConfig(), attribute))
    return float(getattr(importlib.import_module(f"softroce_ext.{holder}"), attribute))


CONSTANTS = {name.strip("`"): value for _, value, name in marked_table("## Constants")}
BYTE_8 = {int(bits, 16): text for byte, bits, text in marked_table("## Frame") if byte == "8"}
OURS = [bit for bit, text in BYTE_8.items() if "MigrOS" in text]

PROSE = {
    r"destination (\d+), checksum": path.ROCE_PORT,
    r"P_Key (0x[0-9a-f]+)": headers.PKEY_DEFAULT,
    r"Q_Key (0x[0-9a-f]+)": headers.GSI_QKEY,
    r"that is (\d+) for QP1": path.datagram_source_port(headers.GSI_QPN),
    r"MADs of (\d+) bytes": MAD_BYTES,
    r"every (\d+)th packet": EngineConfig().packets_per_ackreq,
    r"opcode; RC is (0x[0-9a-f]+) to": opcodes.RC,
    r"opcode; RC is 0x[0-9a-f]+ to (0x[0-9a-f]+)": opcodes.RC | 0xFF & ~opcodes.TRANSPORT_MASK,
    r"UC (0x[0-9a-f]+) to": opcodes.UC,
    r"UC 0x[0-9a-f]+ to (0x[0-9a-f]+)": opcodes.UC | 0xFF & ~opcodes.TRANSPORT_MASK,
    r"UD (0x[0-9a-f]+) to": opcodes.UD,
    r"UD 0x[0-9a-f]+ to (0x[0-9a-f]+)": opcodes.UD | 0xFF & ~opcodes.TRANSPORT_MASK,
    r"ACKNOWLEDGE \(opcode (0x[0-9a-f]+)\)": opcodes.ACKNOWLEDGE,
    r"opcode \*\*(0x[0-9a-f]+)\*\*": opcodes.RESUME,
    r"BTH  opcode (0x[0-9a-f]+)": opcodes.RESUME,
    r"AETH syndrome \*\*(0x[0-9a-f]+)\*\*": headers.NAK_STOPPED,
    r"NAK (0x65)": headers.NAK_STOPPED,
    r"NAK (0x[0-9a-f]+) \(PSN sequence error\)": headers.NAK_PSN_SEQUENCE,
    r"AETH syndrome (0x[0-9a-f]+) \(ACK, credits": headers.ACK_UNLIMITED,
    r"byte 8, bit (0x[0-9a-f]+)": headers.MIGROS_CAPABLE,
    r"byte 8 bit \*\*(0x[0-9a-f]+)\*\*": headers.MIGROS_RESUMED,
    r"bit (0x[0-9a-f]+) marks the one that answers": headers.MIGROS_RESUMED,
    r"carries bit (0x[0-9a-f]+) and the PSN": headers.MIGROS_RECEIVER,
}
"""Pattern with one group → the value that each of its matches must have."""


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_code_s(name: str) -> None:
    assert number(CONSTANTS[name]) == real(name)


def test_every_constant_of_the_extension_has_a_row() -> None:
    fields = [name for name in vars(EngineConfig)["__slots__"] if re.match(r"pause|stale|resume|window|packets", name)]
    wanted = {
        "wire.opcodes.RESUME", "wire.headers.NAK_STOPPED", "process.nic.MAX_WINDOW", "device.window.PACKETS_IN_FLIGHT",
        *(f"EngineConfig.{name}" for name in fields),
    }  # fmt: skip
    assert len(fields) == 8
    assert wanted <= set(CONSTANTS)


def test_byte_8_of_the_bth_is_complete() -> None:
    """The bits are those of the code, they do not overlap, and together they are the byte."""
    bits = (headers.ACK_REQ, headers.MIGROS_CAPABLE, headers.MIGROS_RESUMED, headers.MIGROS_RECEIVER)
    rest = 0xFF & ~sum(bits)
    assert set(BYTE_8) == {*bits, rest}
    assert BYTE_8[rest].startswith("reserved")
    assert sum(BYTE_8) == 0xFF


@pytest.mark.parametrize("pattern", PROSE)
def test_the_prose_uses_the_same_numbers(pattern: str) -> None:
    found = re.findall(pattern, JOINED)
    assert found, f"docs/wire-protocol.md has nothing like {pattern!r} any more"
    assert {number(text) for text in found} == {PROSE[pattern]}


def test_the_source_port_of_datagrams_is_the_formula() -> None:
    base, factor, shift = re.findall(r"`(0xC000) \+ \(QPN × (0x[0-9A-Fa-f]+) mod 2³² >> (\d+)\)`", TEXT)[0]
    for qpn in (1, 16, 0x20010, 0xFFFFFE):
        stated = int(base, 16) + (qpn * int(factor, 16) % 2**32 >> int(shift))
        assert stated == path.datagram_source_port(qpn)


@pytest.mark.parametrize(
    ("document", "pattern"),
    [
        ("wire-protocol.md", r"two messages and (\w+) bits"),
        ("wire-protocol.md", r"The (\w+) bits in byte 8"),
        ("architecture.md", r"\*\*(\w+) reserved BTH bits"),
    ],
)
def test_the_bits_are_counted(document: str, pattern: str) -> None:
    text = re.sub(r"\s+", " ", (DOCS / document).read_text(encoding="utf-8"))
    found = re.findall(pattern, text)
    assert [word.lower() for word in found] == [WORDS[len(OURS)]]


def test_states_have_the_names_of_the_code() -> None:
    rows = re.findall(r"^\| (Running|Stopped|Paused|Resuming) \|", TEXT, re.M)
    assert {part for state in MovementState for part in state.name.split("_")} == {row.upper() for row in rows}
