"""Invariants of a connection between two ends over a link that loses, repeats and reorders messages:

both ends agree (both established, or neither stays so), every wait ends, and a program hears each thing once.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softroce_ext.cm.connection import (
    ON_TIMEOUT,
    PATIENCE,
    RECEIVED,
    RETRIES,
    Connection,
    ConnectionEvent,
    State,
)
from softroce_ext.cm.messages import Kind, Message, Reason

REQUEST = {"local_qpn": 17, "starting_psn": 100, "service_id": 0x01061C06}
REPLY = {"local_qpn": 18, "starting_psn": 200}
ANSWER_TIME = 6.144


class Ends:
    """An active and a passive end; the passive one appears with the first REQ and does as instructed."""

    def __init__(self, accepts: bool = True) -> None:
        self.active = Connection(0xA, 2 << 32)
        self.passive: Connection | None = None
        self.accepts = accepts
        self.heard: dict[str, list[ConnectionEvent]] = {"active": [], "passive": []}

    def ends(self) -> list[tuple[str, Connection]]:
        found = [("active", self.active)]
        return found + ([("passive", self.passive)] if self.passive is not None else [])

    def out(self) -> list[tuple[str, Message]]:
        """Everything to send, with whom it is for; and what each end's program does about what it heard."""
        sent = []
        for name, end in self.ends():
            for event in end.events:
                self.heard[name].append(event.what)
                if event.what is ConnectionEvent.RESPONSE:
                    end.ready()
            end.events.clear()
            other = "passive" if name == "active" else "active"
            sent += [(other, message) for message in end.outbox]
            end.outbox.clear()
        return sent

    def deliver(self, target: str, message: Message, now: float) -> None:
        if target == "active":
            self.active.receive(message, now)
        elif self.passive is not None:
            self.passive.receive(message, now)
        elif message.kind is Kind.REQ:
            self.passive = Connection(0xB, 2 << 32)
            self.passive.requested(message)
            if self.accepts:
                self.passive.reply(REPLY, b"", now)
            else:
                self.passive.reject(Reason.CONSUMER_DEFINED, b"no")

    def quiet(self, now: float = 0.0) -> None:
        """Deliver everything, in order and at once."""
        while messages := self.out():
            for target, message in messages:
                self.deliver(target, message, now)


def connected() -> Ends:
    ends = Ends()
    ends.active.connect(REQUEST, b"", 0.0)
    ends.quiet()
    assert ends.passive is not None
    assert ends.active.state is ends.passive.state is State.ESTABLISHED
    return ends


def test_connect_and_psns() -> None:
    ends = connected()
    assert ends.passive is not None
    assert (ends.active.remote_psn, ends.active.remote_qpn) == (200, 18)
    assert (ends.passive.remote_psn, ends.passive.remote_qpn) == (100, 17)
    assert ends.heard == {"active": [ConnectionEvent.RESPONSE], "passive": [ConnectionEvent.ESTABLISHED]}
    assert ends.active.deadline is ends.passive.deadline is None


def test_disconnect_and_timewait() -> None:
    ends = connected()
    ends.active.disconnect(1.0)
    ends.quiet(1.0)
    for _name, end in ends.ends():
        assert end.state is State.TIMEWAIT
        assert end.deadline is not None
        end.on_timer(end.deadline)
        assert end.state is State.CLOSED
    ends.out()
    assert all(
        heard[-2:] == [ConnectionEvent.DISCONNECTED, ConnectionEvent.TIMEWAIT_EXIT] for heard in ends.heard.values()
    )


def test_disconnect_from_both_ends_at_once() -> None:
    ends = connected()
    assert ends.passive is not None
    ends.active.disconnect(1.0)
    ends.passive.disconnect(1.0)
    ends.quiet(1.0)
    assert ends.active.state is ends.passive.state is State.TIMEWAIT
    assert [heard.count(ConnectionEvent.DISCONNECTED) for heard in ends.heard.values()] == [1, 1]


def test_reject_carries_reason_and_data() -> None:
    ends = Ends(accepts=False)
    ends.active.connect(REQUEST, b"", 0.0)
    for target, message in ends.out():
        ends.deliver(target, message, 0.0)
    ((_, message),) = ends.out()
    ends.active.receive(message, 0.0)
    (event,) = ends.active.events
    assert (event.what, event.reason) == (ConnectionEvent.REJECTED, Reason.CONSUMER_DEFINED)
    assert event.message is not None
    assert event.message.private.startswith(b"no")
    assert ends.active.state is State.CLOSED


def test_nobody_answers() -> None:
    active = Connection(1, 0)
    active.connect(REQUEST, b"", 0.0)
    times = []
    while active.deadline is not None:
        times.append(active.deadline)
        active.on_timer(active.deadline)
    assert len(active.outbox) == 1 + RETRIES
    assert all(message is active.outbox[0] for message in active.outbox)
    assert times == pytest.approx([ANSWER_TIME * n for n in range(1, RETRIES + 2)])
    (event,) = active.events
    assert (event.what, event.late) == (ConnectionEvent.UNREACHABLE, True)


def test_lost_rtu_is_repeated_for_a_repeated_rep() -> None:
    ends = Ends()
    ends.active.connect(REQUEST, b"", 0.0)
    for _ in range(2):  # REQ, REP
        for target, message in ends.out():
            ends.deliver(target, message, 0.0)
    assert [message.kind for _, message in ends.out()] == [Kind.RTU]  # lost
    assert ends.passive is not None
    assert ends.passive.deadline is not None
    ends.passive.on_timer(ends.passive.deadline)
    ends.quiet()
    assert ends.passive.state is State.ESTABLISHED


def test_dreq_in_place_of_a_lost_rtu() -> None:
    ends = Ends()
    ends.active.connect(REQUEST, b"", 0.0)
    for _ in range(2):
        for target, message in ends.out():
            ends.deliver(target, message, 0.0)
    ends.out()  # the RTU is lost
    ends.active.disconnect(1.0)
    ends.quiet(1.0)
    assert ends.passive is not None
    assert ends.active.state is ends.passive.state is State.TIMEWAIT


@pytest.mark.parametrize("state", [State.REQ_SENT, State.REP_SENT, State.ESTABLISHED])
def test_destroy_tells_the_peer(state: State) -> None:
    ends = Ends()
    ends.active.connect(REQUEST, b"", 0.0)
    if state is not State.REQ_SENT:
        for target, message in ends.out():
            ends.deliver(target, message, 0.0)
    if state is State.ESTABLISHED:
        ends.quiet()
    end = ends.active if state is State.REQ_SENT else ends.passive
    assert end is not None
    assert end.state is state
    end.outbox.clear()
    end.destroy(0.0)
    assert [message.kind for message in end.outbox] == [Kind.DREQ if state is State.ESTABLISHED else Kind.REJ]


def test_waiting_longer_for_an_mra() -> None:
    active = Connection(1, 0)
    active.connect(REQUEST, b"", 0.0)
    active.receive(Message(Kind.MRA, 0, {"service_timeout": 20}), 1.0)
    assert active.deadline == pytest.approx(1.0 + ANSWER_TIME + 4.295, abs=0.001)


def test_a_slow_program_s_peer_is_asked_for_patience() -> None:
    """A REQ or REP that is repeated before the program has answered it gets an MRA, and the peer waits longer."""
    ends = Ends()
    ends.active.connect(REQUEST, b"", 0.0)
    passive = Connection(0xB, 2 << 32)
    (request,) = ends.active.outbox
    passive.requested(request)
    assert passive.receive(request, 7.0)
    (mra,) = passive.outbox
    assert (mra.kind, mra["message_mraed"], mra["service_timeout"]) == (Kind.MRA, 0, PATIENCE)
    ends.active.receive(mra, 7.0)
    assert ends.active.deadline == pytest.approx(7 + ANSWER_TIME + 68.72, abs=0.1)
    passive.outbox.clear()
    passive.reply(REPLY, b"", 8.0)
    (reply,) = passive.outbox
    assert ends.active.receive(reply, 8.0) and ends.active.receive(reply, 15.0)
    assert ends.active.outbox[-1]["message_mraed"] == 1
    assert passive.receive(ends.active.outbox[-1], 15.0)


def test_table_names_handlers_and_waits_end() -> None:
    for row in RECEIVED.values():
        for handler in row.values():
            assert callable(handler)
    assert set(ON_TIMEOUT) == {
        State.REQ_SENT, State.REP_SENT, State.SIDR_SENT, State.DREQ_SENT, State.TIMEWAIT,
    }  # fmt: skip


def test_misuse_is_an_error() -> None:
    connection = Connection(1, 0)
    for call in (connection.ready, lambda: connection.reply({}, b"", 0.0), lambda: connection.disconnect(0.0)):
        with pytest.raises(ValueError, match="not in state"):
            call()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    loss=st.floats(0, 0.9),
    repeat=st.floats(0, 0.5),
    hangup=st.sampled_from(["nobody", "active", "passive", "both"]),
)
def test_any_link(seed: int, loss: float, repeat: float, hangup: str) -> None:
    rng = random.Random(seed)
    ends = Ends()
    now = 0.0
    flying: list[tuple[float, int, str, Message]] = []
    arrived: set[tuple[str, Kind]] = set()
    count = 0
    hung_up = hangup == "nobody"
    ends.active.connect(REQUEST, b"", now)
    for _ in range(2000):
        for target, message in ends.out():
            for _copy in range(1 + (rng.random() < repeat)):
                count += 1
                if rng.random() >= loss:
                    flying.append((now + rng.random() * 0.5, count, target, message))
        both = ends.passive is not None and ends.active.state is ends.passive.state is State.ESTABLISHED
        if both and not hung_up and not flying:
            hung_up = True
            for name, end in ends.ends():
                if hangup in (name, "both"):
                    end.disconnect(now)
            continue
        deadlines = [end.deadline for _, end in ends.ends() if end.deadline is not None]
        if not flying and not deadlines:
            break
        flying.sort(key=lambda item: item[:2])
        if flying and (not deadlines or flying[0][0] <= min(deadlines)):
            now, _, target, message = flying.pop(0)
            arrived.add((target, message.kind))
            ends.deliver(target, message, now)
        else:
            now = max(now, min(deadlines))
            for _, end in ends.ends():
                end.on_timer(now)
    else:
        pytest.fail("it does not end")
    states = {end.state for _, end in ends.ends()}
    for heard in ends.heard.values():
        assert all(heard.count(what) <= 1 for what in ConnectionEvent)
    if ends.active.state is State.ESTABLISHED and hangup == "nobody":
        # A passive end whose repeats were all lost has told the active one by REJ; were that lost too, the queue
        # pair's own retries end the connection, as in InfiniBand.
        assert ends.passive is not None
        assert ends.passive.state in (State.ESTABLISHED, State.CLOSED)
        assert states == {State.ESTABLISHED} or ConnectionEvent.UNREACHABLE in ends.heard["passive"]
    if hung_up and hangup != "nobody":
        # All sixteen DREQs can be lost. An end that got one, or sent one, is not connected any more.
        for name, end in ends.ends():
            if end.state is State.ESTABLISHED:
                assert hangup not in (name, "both")
                assert (name, Kind.DREQ) not in arrived
            else:
                assert end.state is State.CLOSED
