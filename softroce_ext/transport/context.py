"""The queue pair's context: every fact that the protocol remembers about one connection, in one flat record.

As in a hardware NIC, whoever has this record (and the application's memory and queues) has the connection: a dump is
`to_plain`, a restore is `from_plain`. The few small records that hang from it (send requests on the way, saved answers)
are plain data too. Nothing here refers to memory, queues, sockets or other objects of the process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any

from softroce_ext.transport.interfaces import RecvWqe, SendWqe, Sge
from softroce_ext.transport.verbs import QpState
from softroce_ext.wire.frame import Path

DUMP_VERSION = 1


@dataclass(slots=True)
class SendRecord:
    """A send work request on the way: fetched from the queue, not yet retired."""

    wqe: SendWqe
    first_psn: int
    packets: int
    """PSNs that it occupies: its request packets, for a READ its response packets, 0 for a local operation."""
    status: int = 0
    """WcStatus with which it has failed here (before or while sending); it completes so when it is the oldest."""
    done: bool = False
    """A local operation that was performed."""


@dataclass(slots=True)
class ResponderResource:
    """What the responder keeps of a READ or atomic to answer its duplicate (IBA 9.7.5.1.5)."""

    first_psn: int
    packets: int
    """Response packets; 1 for an atomic."""
    msn: int
    atomic: bool
    original: int = 0
    """Atomics: the value before, which a duplicate gets again."""
    remote_address: int = 0
    rkey: int = 0
    length: int = 0


@dataclass(slots=True)
class Acknowledge:
    """An answer to send: an ACK or NAK."""

    psn: int
    syndrome: int
    msn: int
    resumed: bool = False
    """It acknowledges a RESUME."""


@dataclass(slots=True)
class ReadAnswer:
    """An answer to send: what is left of a READ's responses, from `next_packet` (0..packets) on."""

    resource: ResponderResource
    next_packet: int
    again: bool = False
    """It was answered before; this is for a duplicate of its request."""


@dataclass(slots=True)
class AtomicAnswer:
    """An answer to send: an ATOMIC ACKNOWLEDGE."""

    resource: ResponderResource


Answer = Acknowledge | ReadAnswer | AtomicAnswer


@dataclass(slots=True)
class QpContext:
    """All state of one queue pair; UC and UD use a part of it.

    PSNs are 24-bit, times are seconds on the caller's clock (None: not set).
    DEVICE creates it in RESET and changes attributes only through `QueuePair.modify`.
    """

    qpn: int
    sq_sig_all: bool = False
    """Every send request gets a completion, whatever its SIGNALED flag."""
    srq: bool = False
    """The receive queue is shared: it is not flushed, and a fetched receive is retired at once."""
    qp_type: int = 2
    """enum ib_qp_type (verbs.QpType): 2 RC, 3 UC, 4 UD."""

    # --- attributes (names of ibv_qp_attr) ---
    state: int = QpState.RESET
    destination_qpn: int = 0
    path: Path | None = None
    """The address vector, resolved. A RESUME from the partner replaces it."""
    path_mtu: int = 256
    """Payload bytes per packet (not the enum)."""
    qp_access_flags: int = 0
    pkey_index: int = 0
    port_num: int = 0
    qkey: int = 0
    rq_psn: int = 0
    sq_psn: int = 0
    timeout: int = 0
    """Local ACK timeout code: 4.096 us * 2**code; 0 waits for ever."""
    retry_cnt: int = 0
    """Retries after timeouts and sequence NAKs; 7 is without end, as in rxe."""
    rnr_retry: int = 0
    """Retries after RNR NAKs; 7 is without end (IBA)."""
    min_rnr_timer: int = 0
    max_rd_atomic: int = 0
    max_dest_rd_atomic: int = 0
    en_sqd_async_notify: bool = False
    path_mig_state: int = 0

    # --- requester and completer ---
    una_psn: int = 0
    """First unacknowledged PSN."""
    send_psn: int = 0
    """Next PSN to send; goes back to `una_psn` on a retry."""
    high_psn: int = 0
    """One after the highest PSN ever sent: answers from here on are lies."""
    next_psn: int = 0
    """First PSN that no fetched request has."""
    inflight: deque[SendRecord] = field(default_factory=deque)
    """Fetched, unretired requests, oldest first."""
    cursor: int = 0
    """Index in `inflight` of the request to send (on) next; those before are wholly sent."""
    reads_out: int = 0
    """READs and atomics before the cursor: sent and not completed."""
    noack_packets: int = 0
    """Packets since the last one with AckReq."""
    retry_left: int = 0
    rnr_left: int = 0
    retry_started: bool = False
    """Gone back, and nothing acknowledged since: further signs of the same loss are not a new loss."""
    sq_draining: bool = False
    """SQD, and the requests begun are not all completed."""
    ack_deadline: float | None = None
    rnr_deadline: float | None = None

    # --- responder ---
    expected_psn: int = 0
    msn: int = 0
    nak_sent: bool = False
    """A NAK asked for `expected_psn`; further packets ahead of it are dropped in silence."""
    message: int = 0
    """OpFlag.SEND or WRITE while between a message's packets, else 0."""
    write_address: int = 0
    """Where the next packet of the WRITE in progress goes (remote virtual address)."""
    write_rkey: int = 0
    write_left: int = 0
    write_length: int = 0
    """Of the whole WRITE, from its RETH."""
    recv_wqe: RecvWqe | None = None
    recv_offset: int = 0
    """Bytes of the SEND in progress that have been placed."""
    resources: deque[ResponderResource] = field(default_factory=deque)
    """The last `max_dest_rd_atomic` READs and atomics, oldest first."""
    answers: deque[Answer] = field(default_factory=deque)
    """Responses to be sent, in order."""

    # --- MigrOS ---
    peer_migros: bool = False
    """A packet of the partner announced the extension (never forgotten until RESET)."""
    partner_resumed_at: float | None = None
    """When the partner's last RESUME came."""
    stopped: bool = False
    paused: bool = False
    pause_psn: int = 0
    """The PSN that NAK_STOPPED refused: an answer to it or later shows that the partner runs again."""
    pause_deadline: float | None = None
    resume_pending: bool = False
    resume_deadline: float | None = None
    """When RESUME is sent again; None: at the next opportunity."""
    resume_wait: float = 0.0
    """Seconds until the next repetition; doubles."""
    resume_since: float | None = None
    """Since when RESUMEs go unanswered."""
    resume_acked_at: float | None = None

    # --- statistics ---
    completed_sends: int = 0
    """Send requests that were completed with success, whether or not a completion was asked for."""
    completed_receives: int = 0
    retransmits: int = 0
    """Request packets that were sent again."""
    gap_last: float | None = None
    """Time of the last completion, seconds."""
    gap_longest: float = 0.0
    """Seconds."""
    gap_longest_end: float | None = None
    """Time of the completion that ended the longest gap; None until there were two."""

    def reset_gaps(self) -> None:
        """Forget the gap statistics."""
        self.gap_last = self.gap_longest_end = None
        self.gap_longest = 0.0

    def to_plain(self) -> dict[str, Any]:
        """JSON-able data: numbers, strings (bytes in hexadecimal), lists, dicts, None. Shares nothing with self."""
        plain: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["version"] = DUMP_VERSION
        plain["state"] = int(self.state)
        plain["path"] = None if self.path is None else self.path.to_plain()
        plain["inflight"] = [
            [_send_to_plain(record.wqe), record.first_psn, record.packets, int(record.status), record.done]
            for record in self.inflight
        ]
        plain["recv_wqe"] = None if self.recv_wqe is None else _recv_to_plain(self.recv_wqe)
        # Answers refer to resources by identity, and may refer to one that is no longer kept for duplicates.
        resources = list(self.resources)
        for answer in self.answers:
            if not isinstance(answer, Acknowledge) and not any(answer.resource is known for known in resources):
                resources.append(answer.resource)
        plain["resources"] = [[getattr(resource, item.name) for item in fields(resource)] for resource in resources]
        plain["resources_kept"] = len(self.resources)
        plain["answers"] = [_answer_to_plain(answer, resources) for answer in self.answers]
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> QpContext:
        """The inverse of `to_plain`. Raises ValueError when `plain` is not a dumped context of this version."""
        if not isinstance(plain, dict) or plain.get("version") != DUMP_VERSION:
            raise ValueError(f"not a queue pair context of version {DUMP_VERSION}")
        values = dict(plain)
        try:
            del values["version"]
            kept = values.pop("resources_kept")
            values["path"] = None if plain["path"] is None else Path.from_plain(plain["path"])
            values["inflight"] = deque(
                SendRecord(_send_from_plain(wqe), first_psn, packets, status, done)
                for wqe, first_psn, packets, status, done in plain["inflight"]
            )
            values["recv_wqe"] = None if plain["recv_wqe"] is None else _recv_from_plain(plain["recv_wqe"])
            resources = [ResponderResource(*item) for item in plain["resources"]]
            values["resources"] = deque(resources[:kept])
            values["answers"] = deque(_answer_from_plain(item, resources) for item in plain["answers"])
            context = cls(**values)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a queue pair context: {error!r}") from None
        return context


def _send_to_plain(wqe: SendWqe) -> list[Any]:
    plain: list[Any] = list(wqe)
    plain[5] = [list(sge) for sge in wqe.sges]
    plain[6] = None if wqe.inline is None else wqe.inline.hex()
    plain[11] = None if wqe.destination is None else list(wqe.destination)
    return plain


def _send_from_plain(plain: list[Any]) -> SendWqe:
    wqe = SendWqe(*plain)
    return wqe._replace(
        sges=tuple(Sge(*sge) for sge in wqe.sges),
        inline=None if wqe.inline is None else bytes.fromhex(str(wqe.inline)),
        destination=None if wqe.destination is None else (plain[11][0], plain[11][1], plain[11][2]),
    )


def _recv_to_plain(wqe: RecvWqe) -> list[Any]:
    return [wqe.wr_id, wqe.length, [list(sge) for sge in wqe.sges]]


def _recv_from_plain(plain: list[Any]) -> RecvWqe:
    wr_id, length, sges = plain
    return RecvWqe(wr_id, length, tuple(Sge(*sge) for sge in sges))


def _answer_to_plain(answer: Answer, resources: list[ResponderResource]) -> list[Any]:
    if isinstance(answer, Acknowledge):
        return ["ack", answer.psn, answer.syndrome, answer.msn, answer.resumed]
    index = next(i for i, resource in enumerate(resources) if resource is answer.resource)
    if isinstance(answer, ReadAnswer):
        return ["again" if answer.again else "read", index, answer.next_packet]
    return ["atomic", index]


def _answer_from_plain(plain: list[Any], resources: list[ResponderResource]) -> Answer:
    kind, *rest = plain
    if kind == "ack":
        return Acknowledge(*rest)
    if kind in ("read", "again"):
        return ReadAnswer(resources[rest[0]], rest[1], kind == "again")
    if kind == "atomic":
        return AtomicAnswer(resources[rest[0]])
    raise ValueError(f"unknown answer {kind!r}")
