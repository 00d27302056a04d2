"""The receiving half of a queue pair: the expected PSN, the message in progress, the answers to be sent (IBA 9.7.4).

The responder works on this record. Answers leave in PSN order; what a READ or atomic needs for the answer to its
duplicate is kept in `resources`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from softroce_ext.transport.interfaces import RecvWqe
from softroce_ext.transport.state.fields import U8, U32, U64, number, required
from softroce_ext.wire.headers import PSN_HALF, PSN_MASK


@dataclass(slots=True)
class ResponderResource:
    """What the responder keeps of a READ or atomic to answer its duplicate (IBA 9.7.5.1.5)."""

    first_psn: int = required(PSN_MASK)
    packets: int = required(PSN_MASK)
    """Response packets; 1 for an atomic."""
    msn: int = required(PSN_MASK)
    atomic: bool = False
    original: int = number(0, U64)
    """Atomics: the value before the operation, which a duplicate gets again."""
    remote_address: int = number(0, U64)
    rkey: int = number(0, U32)
    length: int = number(0, U32)


@dataclass(slots=True)
class Acknowledge:
    """An answer to send: an ACK or NAK."""

    psn: int = required(PSN_MASK)
    syndrome: int = required(U8)
    msn: int = required(PSN_MASK)
    resumed: bool = False
    """It acknowledges a RESUME."""


@dataclass(slots=True)
class ReadAnswer:
    """An answer to send: the remainder of a READ's responses, beginning with `next_packet` (0..packets)."""

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
class Receiver:
    """PSNs are 24-bit. UC uses the message in progress, UD only `recv_wqe`."""

    expected_psn: int = number(0, PSN_MASK)
    msn: int = number(0, PSN_MASK)
    nak_sent: bool = False
    """A NAK asked for `expected_psn`; further packets ahead of it are dropped without an answer."""
    message: int = number(0, U8)
    """OpFlag.SEND or WRITE while between a message's packets, else 0."""
    write_address: int = number(0, U64)
    """Where the next packet of the WRITE in progress goes (remote virtual address)."""
    write_rkey: int = number(0, U32)
    write_left: int = number(0, U32)
    write_length: int = number(0, U32)
    """Of the whole WRITE, from its RETH."""
    recv_wqe: RecvWqe | None = None
    recv_offset: int = number(0, U32)
    """Bytes of the SEND in progress that have been placed."""
    resources: deque[ResponderResource] = field(default_factory=deque)
    """The last `max_dest_rd_atomic` READs and atomics, oldest first."""
    answers: deque[Answer] = field(default_factory=deque)
    """Responses to be sent, in order."""

    # -- requests --------------------------------------------------------------------------------------------------

    def start(self, psn: int) -> None:
        """INIT to RTR: the first PSN of the peer."""
        self.expected_psn = psn

    def expect(self, psn: int) -> None:
        """HOT. The next packet of an unreliable connection's message is `psn`."""
        self.expected_psn = psn

    def complete_message(self) -> None:
        """HOT. The last packet of a WRITE was executed."""
        self.message = 0
        self.msn = self.msn + 1 & PSN_MASK

    def next_msn(self) -> int:
        """Count a READ, an atomic or a message that failed as it completed; returns its MSN."""
        self.msn = self.msn + 1 & PSN_MASK
        return self.msn

    def abandon_message(self) -> None:
        """The message in progress will not be completed."""
        self.message = 0

    def ask_again(self) -> None:
        """The next packet ahead of `expected_psn` is answered by a NAK, whatever was asked before."""
        self.nak_sent = False

    def release_receive(self) -> RecvWqe | None:
        """HOT. The receive in use, which is in use no longer."""
        receive = self.recv_wqe
        self.recv_wqe = None
        return receive

    def remember(self, resource: ResponderResource, depth: int) -> None:
        """Keep a READ or atomic for its duplicate; at most `depth` of them."""
        resources = self.resources
        resources.append(resource)
        while len(resources) > depth:
            resources.popleft()

    # -- answers ---------------------------------------------------------------------------------------------------

    def answer(self, psn: int, syndrome: int, *, resumed: bool = False) -> None:
        """Queue an ACK or NAK with the present MSN."""
        self.answers.append(Acknowledge(psn, syndrome, self.msn, resumed))

    def queue(self, answer: Answer) -> None:
        """Have an answer sent after those that wait already."""
        self.answers.append(answer)

    def nak(self, psn: int, syndrome: int) -> None:
        """Queue a NAK after which what is ahead of `psn` need not be asked for."""
        self.nak_sent = True
        self.answer(psn, syndrome)

    def withdraw_answers(self, syndrome: int) -> None:
        """Take back the ACKs or NAKs of one syndrome that have not left."""
        self._keep(lambda answer: not (isinstance(answer, Acknowledge) and answer.syndrome == syndrome))

    def withdraw_answers_from(self, psn: int) -> None:
        """Take back the answers to requests from `psn` on that have not left."""
        self._keep(lambda answer: (_psn_of(answer) - psn & PSN_MASK) >= PSN_HALF)

    def drop_reads(self) -> None:
        """Do not send the READ responses that have not left: a requester that still wants them asks again."""
        self._keep(lambda answer: not isinstance(answer, ReadAnswer))

    def drop_answers(self) -> None:
        """Send none of the answers that have not left."""
        self.answers.clear()

    def forget_resources_from(self, psn: int) -> None:
        """The READs and atomics from `psn` on were not executed after all."""
        resources = self.resources
        while resources and (resources[-1].first_psn - psn & PSN_MASK) < PSN_HALF:
            resources.pop()

    def data_psn(self, psn: int) -> int:
        """HOT. `psn`, or if the last READs or atomics occupy it, the PSN before them."""
        for resource in reversed(self.resources):
            if (psn - resource.first_psn & PSN_MASK) >= resource.packets:
                break
            psn = resource.first_psn - 1 & PSN_MASK
        return psn

    def reading(self) -> bool:
        """Whether READ responses have still to leave."""
        return any(isinstance(answer, ReadAnswer) for answer in self.answers)

    def _keep(self, wanted: Callable[[Answer], bool]) -> None:
        kept = [answer for answer in self.answers if wanted(answer)]
        self.answers.clear()
        self.answers.extend(kept)


def _psn_of(answer: Answer) -> int:
    return answer.psn if isinstance(answer, Acknowledge) else answer.resource.first_psn
