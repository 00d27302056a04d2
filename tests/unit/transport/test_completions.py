"""Invariant: completions say what those of Linux rxe say, in the fields that the verbs leave open too."""

from __future__ import annotations

import pytest

from softroce_ext.simulation.hosts import BASE, Host, connect, end
from softroce_ext.simulation.world import World
from softroce_ext.transport.verbs import WcFlag, WcOpcode, WcStatus, WrOpcode


def test_a_receive_has_the_flag_of_a_grh_and_no_source() -> None:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    for number in range(2):
        there.receive(number, BASE, 100)
    here.post(WrOpcode.SEND, 1, BASE, 10)
    here.post(WrOpcode.RDMA_WRITE_WITH_IMM, 2, BASE, 10, imm=7)
    World(a, b).run(lambda: len(here.scq.entries) == 2)
    plain, written = there.rcq.entries
    assert (plain.opcode, plain.wc_flags, plain.src_qp) == (WcOpcode.RECV, WcFlag.GRH, 0)
    assert written.opcode == WcOpcode.RECV_RDMA_WITH_IMM
    assert (written.wc_flags, written.src_qp) == (WcFlag.GRH | WcFlag.WITH_IMM, 0)


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD])
def test_an_error_has_no_opcode(opcode: WrOpcode) -> None:
    """That of the failed request, of the flushed one behind it, and of the partner's receive."""
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    there.receive(1, BASE, 100)
    here.post(opcode, 1, BASE, 8, rkey=0xBAD)
    here.post(opcode, 2, BASE, 8)
    World(a, b).run(lambda: bool(len(here.scq.entries) == 2 and there.rcq.entries))
    found = [*here.scq.entries, *there.rcq.entries]
    assert [wc.status for wc in found] == [WcStatus.REM_ACCESS_ERR, WcStatus.WR_FLUSH_ERR, WcStatus.WR_FLUSH_ERR]
    assert [wc.opcode for wc in found] == [0, 0, 0]


def test_a_bind_has_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    monkeypatch.setattr(here.pd, "local_operation", lambda wqe, qpn: None)
    here.post(WrOpcode.BIND_MW, 1, BASE, 1000)
    World(a, b).run(lambda: bool(here.scq.entries))
    wc = here.scq.entries[0]
    assert (wc.status, wc.opcode, wc.byte_len) == (0, WcOpcode.BIND_MW, 0)
