"""The management datagrams in the captures of Linux rxe."""

from __future__ import annotations

from softroce_ext.wire.frame import parse
from tests.support.transport import rxe_captures as captures

CAPTURES = ["cm_rping", "cm_rping_ipv6", "cm_reject", "cm_retry", "cm_sidr"]


def mads(name: str) -> list[bytes]:
    """The MADs of a capture, in their order."""
    found = []
    for captured in captures.read(name):
        packet = parse(memoryview(captured.frame))
        assert not isinstance(packet, str)
        if packet.second_word & 0xFFFFFF == 1 if hasattr(packet, "second_word") else len(packet.payload) == 256:
            found.append(bytes(packet.payload))
    return found
