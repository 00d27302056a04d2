"""What the counters of rxe's names count, as in Linux 6.1 (rxe_comp.c, rxe_resp.c): each in a scene that raises it."""

from __future__ import annotations

from softroce_ext.simulation.hosts import BASE, End, Host, connect, end
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState, WcStatus, WrOpcode
from softroce_ext.uverbs.hw_counters import rxe_view


def pair(link: Link | None = None, **attributes: int) -> tuple[End, End, World]:
    """Two connected ends."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, **attributes)
    return here, there, World(here.host, there.host, link=link)


def raised(host: Host) -> dict[str, int]:
    """rxe's counters that are not 0, without the packets."""
    view = rxe_view(host.engine.counters)
    return {name: value for name, value in view.items() if value and not name.endswith("_pkts")}


def opcode_and_psn(frame: bytes) -> tuple[int, int]:
    return frame[42], int.from_bytes(frame[51:54])


def test_sends_and_receives_are_counted_by_message() -> None:
    here, there, world = pair()
    there.receive(1, BASE, 4096)
    here.post(WrOpcode.SEND, 1, BASE, 4096, flags=0)  # counted without a completion, too
    here.post(WrOpcode.RDMA_WRITE, 2, BASE, 4096)
    here.post(WrOpcode.RDMA_READ, 3, BASE, 4096)
    world.run(lambda: len(here.scq.entries) == 2)
    assert raised(here.host) == {"rdma_sends": 1}
    assert raised(there.host) == {"rdma_recvs": 1}
    assert rxe_view(here.host.engine.counters)["sent_pkts"] == 9 == rxe_view(there.host.engine.counters)["rcvd_pkts"]
    assert (here.statistics.completed_sends, there.statistics.completed_receives) == (3, 1)


def test_flushed_sends_count_and_flushed_receives_do_not() -> None:
    here, _, _ = pair()
    here.post(WrOpcode.SEND, 1, BASE, 8)
    here.post(WrOpcode.RDMA_WRITE, 2, BASE, 8)
    here.receive(3, BASE, 64)
    here.qp.modify({"qp_state": int(QpState.ERR)})
    assert len(here.scq.entries) == 2 and len(here.rcq.entries) == 1
    assert raised(here.host) == {"rdma_sends": 1}
    assert (here.statistics.completed_sends, here.statistics.completed_receives) == (0, 0)


def test_retries_are_counted_when_they_begin_and_their_end_once() -> None:
    here, _, world = pair(Link(loss=1.0), retry_cnt=3)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    assert here.scq.entries[0].status == WcStatus.RETRY_EXC_ERR
    assert raised(here.host) == {"completer_retry_err": 3, "retry_exceeded_err": 1}
    assert here.statistics.retransmits == here.host.engine.counters["retransmits"] == 3


def test_a_gap_is_one_out_of_seq_request_and_one_nak() -> None:
    lost: list[bytes] = []

    def drop_second_once(frame: bytes) -> bool:
        if not lost and opcode_and_psn(frame) == (0x07, 1):
            lost.append(frame)
            return True
        return False

    here, there, world = pair(Link(drop=drop_second_once, spacing=1e-6), psn_a=0)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8192)
    world.run(lambda: bool(here.scq.entries))
    assert raised(there.host) == {"out_of_seq_request": 1}
    assert there.host.engine.counters["dropped_ahead"] == 5  # of the eight: the first was good, one lost, one NAKed
    # The NAK acknowledged the first packet: rxe counts it.
    assert raised(here.host) == {"rcvd_seq_err": 1, "completer_retry_err": 1}


def test_a_nak_that_acknowledges_nothing_is_not_in_rcvd_seq_err() -> None:
    lost: list[bytes] = []

    def drop_first_once(frame: bytes) -> bool:
        if not lost:
            lost.append(frame)
            return True
        return False

    here, _, world = pair(Link(drop=drop_first_once, spacing=1e-6), psn_a=0)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 4096)
    world.run(lambda: bool(here.scq.entries))
    assert raised(here.host) == {"completer_retry_err": 1}
    assert here.host.engine.counters["rcvd_nak_sequence"] == 1


def test_duplicates() -> None:
    here, there, world = pair(Link(duplicate=1.0))
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 3000)
    world.run(lambda: bool(here.scq.entries))
    world.settle(0.01)
    assert raised(there.host) == {"duplicate_request": 3}


def test_receiver_not_ready() -> None:
    here, there, world = pair(rnr_retry=2, min_rnr_timer=1)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    assert raised(there.host) == {"send_rnr_err": 3}
    assert raised(here.host) == {"rcvd_rnr_err": 3, "retry_rnr_exceeded_err": 1, "rdma_sends": 1}


def test_statistics_of_a_queue_pair_survive_a_dump() -> None:
    here, there, world = pair()
    there.receive(1, BASE, 64)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    here.statistics.retransmits = 7
    again = QueuePairState.from_plain(here.state.to_plain())
    assert (again.statistics.completed_sends, again.statistics.completed_receives, again.statistics.retransmits) == (
        1,
        0,
        7,
    )
