"""The sending half of a queue pair: its PSNs, the requests in flight, retries and their deadlines (IBA 9.7.3, 9.7.5).

The requester and the completer work on this record. `send_psn` walks through the PSNs of the requests in flight; to *go
back* is to set it to the first unacknowledged PSN, which is all that go-back-N needs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from softroce_ext.transport.interfaces import SendWqe
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.fields import U16, U32, bounded, number, required
from softroce_ext.transport.verbs import READS, WcStatus
from softroce_ext.wire.headers import PSN_HALF, PSN_MASK

UNLIMITED: Final = 7
"""The retry count that is never spent."""
BACKOFF_PACKETS: Final = 4096
"""Packets that must be acknowledged without a timeout before a prolonged one is shortened again."""


@dataclass(slots=True)
class SendRecord:
    """A send work request in flight: fetched from the queue, not yet retired."""

    wqe: SendWqe
    first_psn: int = required(PSN_MASK)
    packets: int = required(PSN_MASK)
    """PSNs that it occupies: its request packets, for a READ its response packets, 0 for a local operation."""
    status: int = number(0, max(WcStatus))
    """WcStatus with which it has failed at this end; it completes with it once it is the oldest."""
    done: bool = False
    """A local operation that was performed."""


@dataclass(slots=True)
class Sender:
    """PSNs are 24-bit, times are seconds on the caller's clock (None: not set).

    UC and UD use the PSNs and `inflight` only.
    """

    una_psn: int = number(0, PSN_MASK)
    """First unacknowledged PSN."""
    send_psn: int = number(0, PSN_MASK)
    """Next PSN to send; goes back to `una_psn` for a retransmission."""
    high_psn: int = number(0, PSN_MASK)
    """One after the highest PSN ever sent: an answer to this one or a later one is invalid."""
    next_psn: int = number(0, PSN_MASK)
    """First PSN that no fetched request occupies."""
    inflight: deque[SendRecord] = field(default_factory=deque)
    """Fetched, unretired requests, oldest first."""
    cursor: int = number(0, U16)
    """Index in `inflight` of the request to send next; those before it are completely sent."""
    reads_out: int = number(0, U16)
    """READs and atomics before the cursor: sent and not completed."""
    noack_packets: int = number(0, U32)
    """Packets since the last one with AckReq."""
    retry_left: int = number(0, UNLIMITED)
    rnr_left: int = number(0, UNLIMITED)
    retry_started: bool = False
    """Went back, and nothing was acknowledged since: further signs of the same loss are not a new loss."""
    sq_draining: bool = False
    """SQD, and the requests that were started are not all completed."""
    ack_deadline: float | None = None
    rnr_deadline: float | None = None
    ack_timeout_now: float | None = None
    """Seconds until a local ACK timeout: what the attribute says, or longer when that was too short (`rc.retry`)."""
    retransmitted_until_psn: int | None = bounded(PSN_MASK)
    """One after the last PSN that a timeout had retransmitted, until it is known whether that was too early."""
    retransmitted_at: float = 0.0
    """When that timeout was."""
    timeout_backoff_until_psn: int = number(0, PSN_MASK)
    """Once this is acknowledged, and there was no timeout since, `ack_timeout_now` is shortened again."""

    # -- sending ---------------------------------------------------------------------------------------------------

    def start(self, attributes: Attributes) -> None:
        """RTR to RTS: nothing has been sent, and `sq_psn` is the first PSN."""
        self.una_psn = self.send_psn = self.high_psn = self.next_psn = attributes.sq_psn
        self.refresh_retries(attributes)

    def admit(self, wqe: SendWqe, packets: int, status: int = 0) -> SendRecord:
        """HOT. Give a fetched request its PSNs, and put it behind the others."""
        record = SendRecord(wqe, self.next_psn, packets, status)
        self.next_psn = self.next_psn + packets & PSN_MASK
        self.inflight.append(record)
        return record

    def sent(self, count: int, psn: int, whole: bool) -> int:
        """HOT. `count` packets of the request at the cursor went out and `psn` is the next one; returns how many of
        them had been sent before.

        whole: the request's last packet was among them.
        """
        una = self.una_psn
        before = self.send_psn - una & PSN_MASK
        high = self.high_psn - una & PSN_MASK
        self.send_psn = psn
        if whole:
            self.cursor += 1
        if (psn - una & PSN_MASK) > high:
            self.high_psn = psn
        return min(count, high - before) if before < high else 0

    def skip(self) -> None:
        """The request at the cursor sends nothing: a local operation that was performed."""
        self.cursor += 1

    def take_psn(self) -> int:
        """HOT. The PSN of a datagram, which is never acknowledged."""
        psn = self.send_psn
        self.send_psn = self.una_psn = self.high_psn = self.next_psn = psn + 1 & PSN_MASK
        return psn

    def expect_no_answer(self) -> None:
        """HOT. An unreliable connection: what was sent is done with."""
        self.una_psn = self.send_psn

    def retire(self) -> SendRecord:
        """HOT. Take the oldest request out."""
        record = self.inflight.popleft()
        if self.cursor:
            self.cursor -= 1
            if record.wqe.opcode in READS:
                self.reads_out -= 1
        return record

    # -- retransmission --------------------------------------------------------------------------------------------

    def go_back(self) -> None:
        """Send again from the first unacknowledged PSN on."""
        self.send_psn = self.una_psn
        self.cursor = 0
        self.reads_out = 0
        self.ack_deadline = None

    def take_retry(self, retry_cnt: int) -> bool:
        """Spend one of `retry_cnt` retries; False when none is left."""
        if retry_cnt != UNLIMITED:
            if self.retry_left == 0:
                return False
            self.retry_left -= 1
        return True

    def take_rnr_retry(self, rnr_retry: int) -> bool:
        """As `take_retry`, after an RNR NAK."""
        if self.rnr_left == 0:
            return False
        if rnr_retry != UNLIMITED:
            self.rnr_left -= 1
        return True

    def refresh_retries(self, attributes: Attributes) -> None:
        """All retries are available again, and the receiver is not known to be unready."""
        self.retry_left = attributes.retry_cnt
        self.rnr_left = attributes.rnr_retry
        self.retry_started = False
        self.rnr_deadline = None

    def on_progress(self, attributes: Attributes) -> None:
        """HOT. `una_psn` has advanced."""
        self.retry_left = attributes.retry_cnt
        self.rnr_left = attributes.rnr_retry
        self.retry_started = False
        self.rnr_deadline = None
        if (self.send_psn - self.una_psn & PSN_MASK) >= PSN_HALF:
            self.send_psn = self.una_psn  # went back, and late answers have overtaken it

    def wait_for_receiver(self, deadline: float) -> None:
        """An RNR NAK: send nothing until `deadline`."""
        self.rnr_deadline = deadline

    def end_rnr_wait(self) -> None:
        """The receiver may be ready now."""
        self.rnr_deadline = None

    def expect_answer_by(self, deadline: float) -> None:
        """Start the ACK timer: something is unacknowledged from now on."""
        self.ack_deadline = deadline

    def expire_ack_timer(self) -> bool:
        """Nothing was acknowledged in time; whether anything is outstanding."""
        self.ack_deadline = None
        return self.send_psn != self.una_psn

    def begin_timeout_retry(self, now: float) -> None:
        """A timeout starts a retry of its own, even if a NAK has started one before."""
        self.retry_started = False
        self.retransmitted_until_psn = self.high_psn
        self.retransmitted_at = now
        self.postpone_restore(self.high_psn)

    def forget_retransmission(self) -> None:
        """Do not judge the timeout by when the last retransmission is acknowledged."""
        self.retransmitted_until_psn = None

    def set_ack_timeout(self, timeout: float | None) -> None:
        """Seconds; None: there is none."""
        self.ack_timeout_now = timeout

    def postpone_restore(self, psn: int) -> None:
        """A prolonged ACK timeout stays for BACKOFF_PACKETS after `psn`."""
        self.timeout_backoff_until_psn = psn + BACKOFF_PACKETS & PSN_MASK

    def stop_timers(self) -> None:
        """The queue pair is frozen: no deadline of its own counts."""
        self.ack_deadline = self.rnr_deadline = None

    # -- ends ------------------------------------------------------------------------------------------------------

    def begin_draining(self) -> None:
        """RTS to SQD."""
        self.sq_draining = True

    def end_draining(self) -> bool:
        """Whether the last request that was started before SQD has just been completed."""
        if not self.sq_draining or self.inflight:
            return False
        self.sq_draining = False
        return True

    def abort(self) -> list[SendRecord]:
        """To ERR: forget what is in flight; returns it."""
        records = list(self.inflight)
        self.inflight.clear()
        self.ack_deadline = self.rnr_deadline = None
        self.sq_draining = False
        self.cursor = self.reads_out = 0
        self.send_psn = self.next_psn = self.high_psn = self.una_psn
        return records
