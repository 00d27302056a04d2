"""The states of one connection (or one service resolution), as IBA volume 1, 12.9 and 12.11 have them; sans-IO.

Time is handed in; messages to send are collected in `outbox`, reports for the owner in `events`; `deadline` is when
`on_timer` must be called. `RECEIVED` is the state table: what a message does in a state. A message without an entry is
a duplicate, or late, and is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Generic, NamedTuple, TypeVar

from softroce_ext.cm.messages import Kind, Message, Reason

RESPONSE_TIMEOUT: Final = 4.096
"""Seconds that an answer may take: code 20."""
PATH_TIMEOUT: Final = 2.048
"""Seconds of a round trip: twice a packet's life time of code 18, as Linux 6.1 has it on RoCE."""
RETRIES: Final = 15
PATIENCE: Final = 24
"""Timeout code that an MRA asks for: 69 s."""
TIMEWAIT: Final = 2.147
"""Seconds before a connection is forgotten: the ACK timeout of code 19."""


class State(Enum):
    """Communication states (figures 134 to 137)."""

    IDLE = "idle"
    REQ_SENT = "req sent"
    REQ_RCVD = "req received"
    REP_SENT = "rep sent"
    REP_RCVD = "rep received"
    ESTABLISHED = "established"
    DREQ_SENT = "dreq sent"
    TIMEWAIT = "timewait"
    SIDR_SENT = "sidr req sent"
    SIDR_RCVD = "sidr req received"
    CLOSED = "closed"


class ConnectionEvent(Enum):
    """What is reported to the owner."""

    RESPONSE = "response"
    ESTABLISHED = "established"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    TIMEWAIT_EXIT = "timewait exit"


class Event(NamedTuple):
    """A report to the owner."""

    what: ConnectionEvent
    message: Message | None = None
    """The message that caused it, if any."""
    reason: int = 0
    """A reject reason or a SIDR status."""
    late: bool = False
    """The peer has not answered in time."""


ON_TIMEOUT: Final[dict[State, ConnectionEvent]] = {
    State.REQ_SENT: ConnectionEvent.UNREACHABLE,
    State.REP_SENT: ConnectionEvent.UNREACHABLE,
    State.SIDR_SENT: ConnectionEvent.UNREACHABLE,
    State.DREQ_SENT: ConnectionEvent.DISCONNECTED,
    State.TIMEWAIT: ConnectionEvent.TIMEWAIT_EXIT,
}
"""What is reported when the last repeat was not answered (or when the wait is over)."""

SIDR_REJECT: Final = 2
"""Status of a SIDR_REP: the program behind the service rejects the request (enum ib_cm_sidr_status)."""

DESTROYED: Final[dict[State, Reason]] = {
    State.REQ_SENT: Reason.TIMEOUT,
    State.REQ_RCVD: Reason.CONSUMER_DEFINED,
    State.REP_SENT: Reason.CONSUMER_DEFINED,
    State.REP_RCVD: Reason.CONSUMER_DEFINED,
}
"""The reason with which a connection is rejected whose owner goes away."""

OwnerT = TypeVar("OwnerT")


class Connection(Generic[OwnerT]):
    """One end of a connection."""

    def __init__(self, local_id: int, transaction_id: int) -> None:
        self.local_id = local_id
        self.remote_id = 0
        self.transaction_id = transaction_id
        self.state = State.IDLE
        self.request: Message | None = None
        """The REQ (or SIDR_REQ) that started it, from either end."""
        self.remote_qpn = 0
        self.remote_psn = 0
        """The PSN that the peer expects in the first packet from here."""
        self.outbox: list[Message] = []
        self.repeats: list[Kind] = []
        """The kinds of those messages in `outbox` that were sent before."""
        self.events: list[Event] = []
        self.deadline: float | None = None
        self.owner: OwnerT | None = None
        """What the reports are for; None when it has gone."""
        self._last: Message | None = None
        self._left = 0
        self._interval = RESPONSE_TIMEOUT + PATH_TIMEOUT

    # -- sending ---------------------------------------------------------------------------------------------------

    def _send(self, kind: Kind, private: bytes, fields: dict[str, int], modifier: int = 0) -> Message:
        message = Message(kind, self.transaction_id, fields, private, modifier)
        self._last = message
        self.outbox.append(message)
        return message

    def _ids(self) -> dict[str, int]:
        return {"local_comm_id": self.local_id, "remote_comm_id": self.remote_id}

    def _start_repeating(self, now: float) -> None:
        self._left = RETRIES
        self.deadline = now + self._interval

    def memory(self) -> tuple[Message | None, Message | None, int, float]:
        """(request, what is repeated, repeats left, seconds between them), for a checkpoint."""
        return self.request, self._last, self._left, self._interval

    def remember(self, request: Message | None, last: Message | None, left: int, interval: float) -> None:
        """Put back what `memory` returned."""
        self.request, self._last, self._left, self._interval = request, last, left, interval

    # -- requests of the owner -------------------------------------------------------------------------------------

    def connect(self, fields: dict[str, int], private: bytes, now: float, modifier: int = 0) -> None:
        """Send a REQ with these fields."""
        self._expect(State.IDLE)
        self.request = self._send(Kind.REQ, private, {"local_comm_id": self.local_id, **fields}, modifier)
        self.state = State.REQ_SENT
        self._start_repeating(now)

    def resolve(self, fields: dict[str, int], private: bytes, now: float) -> None:
        """Send a SIDR_REQ with these fields."""
        self._expect(State.IDLE)
        self._interval = RESPONSE_TIMEOUT
        self.request = self._send(Kind.SIDR_REQ, private, {"request_id": self.local_id, **fields})
        self.state = State.SIDR_SENT
        self._start_repeating(now)

    def requested(self, message: Message) -> None:
        """Become the passive end of a REQ or SIDR_REQ."""
        self._expect(State.IDLE)
        self.request = message
        self.transaction_id = message.transaction_id
        if message.kind is Kind.REQ:
            self._interval = RESPONSE_TIMEOUT
            self.remote_id, self.remote_qpn = message["local_comm_id"], message["local_qpn"]
            self.remote_psn = message["starting_psn"]
            self.state = State.REQ_RCVD
        else:
            self.remote_id = message["request_id"]
            self.state = State.SIDR_RCVD

    def reply(self, fields: dict[str, int], private: bytes, now: float, modifier: int = 0) -> None:
        """Accept a REQ with a REP."""
        self._expect(State.REQ_RCVD)
        self._send(Kind.REP, private, self._ids() | fields, modifier)
        self.state = State.REP_SENT
        self._start_repeating(now)

    def ready(self) -> None:
        """Answer a REP with an RTU."""
        self._expect(State.REP_RCVD)
        self._send(Kind.RTU, b"", self._ids())
        self.state = State.ESTABLISHED

    def resolved(self, status: int, qpn: int, qkey: int, private: bytes) -> None:
        """Answer a SIDR_REQ."""
        self._expect(State.SIDR_RCVD)
        assert self.request is not None
        fields = {"request_id": self.remote_id, "status": status, "qpn": qpn, "qkey": qkey}
        self._send(Kind.SIDR_REP, private, fields | {"service_id": self.request["service_id"]})
        self._close()

    def established(self) -> None:
        """A packet came on the queue pair before the RTU did (rdma_notify)."""
        self._expect(State.REP_SENT)
        self._rtu(None)

    def reject(self, reason: int, private: bytes = b"", info: int = 0) -> None:
        """Reject what came last; raises ValueError where there is nothing to reject."""
        self._expect(State.REQ_SENT, State.REQ_RCVD, State.REP_SENT, State.REP_RCVD)
        which = {State.REQ_RCVD: 0, State.REP_RCVD: 1}.get(self.state, 2)
        fields = {"message_rejected": which, "info_length": info, "reason": reason}
        self._send(Kind.REJ, private, self._ids() | fields)
        self._close()

    def disconnect(self, now: float) -> None:
        """Send a DREQ. When one is under way already (or the connection is over) this does nothing."""
        if self.state in (State.DREQ_SENT, State.TIMEWAIT, State.CLOSED):
            return
        self._expect(State.ESTABLISHED, State.REP_SENT)
        self.transaction_id = self._own_transaction()
        self._send(Kind.DREQ, b"", self._ids() | {"remote_qpn": self.remote_qpn})
        self.state = State.DREQ_SENT
        self._start_repeating(now)

    def _own_transaction(self) -> int:
        return self.transaction_id >> 32 << 32 | int.from_bytes(self.local_id.to_bytes(4, "big"), "little")

    def destroy(self, now: float) -> None:
        """The owner goes away: reject or disconnect, as the state asks for; nothing is reported from then on."""
        if self.state in DESTROYED:
            self.reject(DESTROYED[self.state])
        elif self.state is State.ESTABLISHED:
            self.disconnect(now)
        elif self.state is State.SIDR_RCVD:
            self.resolved(SIDR_REJECT, 0, 0, b"")
        elif self.state in (State.IDLE, State.SIDR_SENT):
            self._close()

    def _expect(self, *states: State) -> None:
        if self.state not in states:
            raise ValueError(f"not in state {self.state.value}")

    # -- receiving ---------------------------------------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> bool:
        """Take a message of the peer; whether it had an effect in this state."""
        handler = RECEIVED.get(self.state, {}).get(message.kind)
        if handler is None:
            return False
        handler(self, message, now)
        return True

    def on_timer(self, now: float) -> None:
        """Repeat the last message, give up, or forget."""
        if self.deadline is None or now < self.deadline:
            return
        if self.state is not State.TIMEWAIT and self._left > 0 and self._last is not None:
            self._left -= 1
            self.deadline = now + self._interval
            self._send_again(self._last)
            return
        what = ON_TIMEOUT.get(self.state)
        if what is None:
            self.deadline = None
            return
        if self.state is State.DREQ_SENT:
            self._timewait(now)
        elif self.state is State.REP_SENT:
            self.reject(Reason.TIMEOUT)
        else:
            self._close()
        self.events.append(Event(what, late=what is not ConnectionEvent.TIMEWAIT_EXIT))

    def _close(self) -> None:
        self.state = State.CLOSED
        self.deadline = None

    def _timewait(self, now: float) -> None:
        self.state = State.TIMEWAIT
        self.deadline = now + TIMEWAIT

    def _rep(self, message: Message) -> None:
        self.remote_id, self.remote_qpn = message["local_comm_id"], message["local_qpn"]
        self.remote_psn = message["starting_psn"]
        self.state = State.REP_RCVD
        self.deadline = None
        self.events.append(Event(ConnectionEvent.RESPONSE, message))

    def _rtu(self, message: Message | None) -> None:
        self.state = State.ESTABLISHED
        self.deadline = None
        self._last = None
        self.events.append(Event(ConnectionEvent.ESTABLISHED, message))

    def _rejected(self, message: Message, now: float) -> None:
        was = self.state
        reason = message["reason"]
        if was is State.ESTABLISHED:
            # Only a peer that has lost the connection, or whose program gave up before the RTU's repeat arrived.
            self._timewait(now)
            self.events.append(Event(ConnectionEvent.DISCONNECTED, None))
            return
        self._close()
        self.events.append(Event(ConnectionEvent.REJECTED, message, reason))

    def _wait_longer(self, message: Message, now: float) -> None:
        self.deadline = now + self._interval + 4.096e-6 * (1 << message["service_timeout"])

    def _ask_for_time(self, message: Message) -> None:
        """The program takes longer than its peer waits: ask the peer to wait longer (MRA), as Linux does."""
        which = {"message_mraed": int(message.kind is Kind.REP), "service_timeout": PATIENCE}
        self.outbox.append(Message(Kind.MRA, self.transaction_id, self._ids() | which))

    def _repeat_last(self) -> None:
        if self._last is not None and (self.state is not State.ESTABLISHED or self._last.kind is Kind.RTU):
            self._send_again(self._last)

    def _send_again(self, message: Message) -> None:
        self.outbox.append(message)
        self.repeats.append(message.kind)

    def _dreq(self, message: Message, now: float) -> None:
        self.transaction_id = message.transaction_id
        self._send(Kind.DREP, b"", self._ids())
        self._timewait(now)
        self.events.append(Event(ConnectionEvent.DISCONNECTED, message))

    def _dreq_again(self, message: Message) -> None:
        self.transaction_id = message.transaction_id
        self._send(Kind.DREP, b"", self._ids())

    def _drep(self, message: Message, now: float) -> None:
        self._timewait(now)
        self.events.append(Event(ConnectionEvent.DISCONNECTED, message if message.kind is Kind.DREP else None))

    def _sidr_rep(self, message: Message) -> None:
        self._close()
        if message["status"] == 0:
            self.remote_qpn = message["qpn"]
            self.events.append(Event(ConnectionEvent.ESTABLISHED, message))
        else:
            self.events.append(Event(ConnectionEvent.UNREACHABLE, message, message["status"]))


Handler = Callable[[Connection[Any], Message, float], None]
"""(connection, message, now)."""

RECEIVED: Final[dict[State, dict[Kind, Handler]]] = {
    State.REQ_SENT: {
        Kind.REP: lambda c, message, _now: c._rep(message),
        Kind.REJ: Connection._rejected,
        Kind.MRA: Connection._wait_longer,
    },
    State.REQ_RCVD: {
        Kind.REQ: lambda c, message, _now: c._ask_for_time(message),
        Kind.REJ: Connection._rejected,
    },
    State.REP_SENT: {
        Kind.REQ: lambda c, _message, _now: c._repeat_last(),
        Kind.RTU: lambda c, message, _now: c._rtu(message),
        Kind.REJ: Connection._rejected,
        Kind.MRA: Connection._wait_longer,
        Kind.DREQ: Connection._dreq,  # the RTU was lost
    },
    State.REP_RCVD: {
        Kind.REP: lambda c, message, _now: c._ask_for_time(message),
        Kind.REJ: Connection._rejected,
        Kind.DREQ: Connection._dreq,
    },
    State.ESTABLISHED: {
        Kind.REP: lambda c, _message, _now: c._repeat_last(),
        Kind.REJ: Connection._rejected,
        Kind.DREQ: Connection._dreq,
    },
    State.DREQ_SENT: {Kind.DREP: Connection._drep, Kind.DREQ: Connection._dreq, Kind.REJ: Connection._drep},
    State.TIMEWAIT: {Kind.DREQ: lambda c, message, _now: c._dreq_again(message)},
    State.SIDR_SENT: {Kind.SIDR_REP: lambda c, message, _now: c._sidr_rep(message)},
}
"""State → kind of message → what it does."""
