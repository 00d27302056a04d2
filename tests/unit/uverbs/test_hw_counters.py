"""The counters' files: rxe's names and meanings, ours beside them, rewritten in place and only when due."""

from __future__ import annotations

from pathlib import Path

from softroce_ext.uverbs.hw_counters import FRESHNESS, RXE_NAMES, CounterFiles, own_view, rxe_view


def read(folder: Path) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in folder.iterdir()}


def test_the_names_are_those_of_rxe(tmp_path: Path) -> None:
    CounterFiles(tmp_path, dict).close()
    assert {path.name for path in (tmp_path / "hw_counters").iterdir()} == {*RXE_NAMES, "lifespan"}
    assert len(RXE_NAMES) == 15
    assert not (tmp_path / "counters").exists()  # as with rxe, which answers no performance management


def test_a_packet_that_no_queue_pair_takes_is_not_received() -> None:
    counted = {"rcvd_pkts": 10, "refused_qpn": 2, "refused_address": 1, "refused_icrc": 5}
    assert rxe_view(counted)["rcvd_pkts"] == 7  # a bad ICRC was never in rcvd_pkts


def test_a_frame_that_the_interface_refused_is_not_sent() -> None:
    view = rxe_view({"sent_pkts": 10, "tx_errors": 3})
    assert (view["sent_pkts"], view["send_err"]) == (7, 3)


def test_ours_are_apart(tmp_path: Path) -> None:
    files = CounterFiles(tmp_path, lambda: {"sent_pkts": 5, "refused_icrc": 2, "sent_nak_stopped": 1})
    files.close()
    assert read(tmp_path / "migros") == {"refused_icrc": 2, "sent_nak_stopped": 1}
    assert read(tmp_path / "hw_counters")["sent_pkts"] == 5
    assert own_view({"rdma_sends": 1, "rcvd_resume": 2}) == {"rcvd_resume": 2}


def test_values_are_rewritten_in_place_and_only_what_changed(tmp_path: Path) -> None:
    counted = {"sent_pkts": 99, "refused_icrc": 1000}
    files = CounterFiles(tmp_path, lambda: dict(counted))
    sent, received = tmp_path / "hw_counters" / "sent_pkts", tmp_path / "hw_counters" / "rcvd_pkts"
    before = sent.stat().st_ino, received.stat().st_mtime_ns
    with sent.open() as opened:
        counted.update(sent_pkts=100, refused_icrc=7, refused_opcode=1)
        files.write(5.0)
        assert opened.read() == "100\n"  # through a descriptor that was open before, too
    assert (sent.stat().st_ino, received.stat().st_mtime_ns) == before
    assert read(tmp_path / "migros") == {"refused_icrc": 7, "refused_opcode": 1}
    assert files.next_write == 5.0 + FRESHNESS
    assert not files.stale
    files.close()


def test_lifespan_says_how_old_a_value_may_be(tmp_path: Path) -> None:
    CounterFiles(tmp_path, dict).close()
    assert (tmp_path / "hw_counters" / "lifespan").read_text() == "200\n"
