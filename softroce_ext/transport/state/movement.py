"""Migration as a state machine (MigrOS): a queue pair that is frozen while it is moved, and its peer, which waits.

*Stopped* is the end that moves: it sends no request, takes no answer, and answers the next request in order by
NAK_STOPPED (AETH 0x65). *Paused* is its peer after that NAK: it sends no request until a RESUME (opcode 0x19) tells it
that the other end runs again, and from which address. *Resuming* is the end that has moved, until its RESUME is
acknowledged. Both ends may move at once, so Paused is combined with Stopped and with Resuming. Stopped, Paused and both
messages are those of the MigrOS paper; `ibv_query_qp` shows none of these states.

The rules:

1. A Stopped queue pair learns nothing that its dump would not have: it takes no answer, and it answers a RESUME by
   NAK_STOPPED rather than by an ACK, which only the end that finally runs may give.
2. Nothing is lost by a stop: a queue pair that leaves Stopped goes back to its first unacknowledged PSN, with fresh
   retry counts.
3. A Paused queue pair spends no retry and reports nothing. It still takes answers, which are true.
4. Paused ends: by a RESUME, by an answer which shows that the peer has executed what it had refused, or after a limit,
   when ordinary retransmission finds out what has become of the peer.
5. Resuming ends: by the ACK of the RESUME, or after a limit. Until then RESUME is repeated, and again at once when the
   peer has moved in the meantime.
6. A RESUME is always taken, also while an own one is unanswered.

Differences from the authors' proof of concept, each for a fault of it:

* Both messages go only to a peer that announced the extension (reserved bit 0x40 of BTH byte 8 in each of its packets):
  a stock NIC fails the connection on 0x65. The stock peer of a Stopped queue pair gets no answer.
* The ACK of a RESUME carries `expected PSN - 1`, as any ACK: it acknowledges what was executed, and nothing more. It is
  marked by reserved bit 0x20 of BTH byte 8.
* RESUME has a timer of its own, with back-off and a limit.
* A peer from which nothing was ever received is not known to speak MigrOS or not to. It is sent a RESUME when this
  end's address changes (`announce`), because it could not find this end otherwise.
* RESUME is believed only if its PSN lies within what the sender can have outstanding. That keeps out old and stray
  packets, not an attacker on the path: RoCE has no authentication.

`rc/movement.py` performs the actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, NamedTuple

from softroce_ext.transport.state.fields import number
from softroce_ext.wire.headers import PSN_MASK


class MovementState(IntEnum):
    """Where a queue pair is in its own migration and in that of its peer."""

    RUNNING = 0
    PAUSED = 1
    RESUMING = 2
    RESUMING_PAUSED = 3
    STOPPED = 4
    STOPPED_PAUSED = 5


class MovementEvent(Enum):
    """What changes a MovementState. The values are the labels of the diagram."""

    STOP = "the NIC holds the program"
    RESUME = "the program runs again, the peer must be told"
    RESUME_SILENTLY = "the program runs again, the peer cannot be told"
    RESUME_ACKED = "RESUME acknowledged"
    RESUME_EXPIRED = "RESUME not acknowledged within the limit"
    NAK_STOPPED = "NAK_STOPPED received"
    PEER_RESUMED = "RESUME received"
    PEER_MOVED = "RESUME received from another address"
    REFUSED_EXECUTED = "what was refused is acknowledged"
    PAUSE_EXPIRED = "no RESUME within the limit"
    FAIL = "queue pair to ERR"


class MovementAction(Enum):
    """What a transition does besides."""

    FREEZE = "stop all timers"
    KEEP_ANNOUNCING = "the next resume sends RESUME again"
    THAW = "withdraw NAK_STOPPED, fresh retries, go back"
    ANNOUNCE = "send RESUME until it is acknowledged"
    CONFIRM = "note that the peer knows this place"
    GIVE_UP = "send no more RESUMEs; fail if the peer speaks MigrOS"
    WAIT = "wait for the peer's RESUME"
    PAUSE = "limit the pause, go back"
    EXPIRE = "count a pause without a RESUME"
    RESTART = "fresh retries, go back"
    ACKNOWLEDGE = "acknowledge the RESUME"
    REFUSE = "answer by NAK_STOPPED"
    REPEAT = "send RESUME again at once"
    CLEAR = "forget the deadlines"


class Transition(NamedTuple):
    """A row of the table: the next state and the actions, in order."""

    state: MovementState
    actions: tuple[MovementAction, ...]


_S, _E, _A = MovementState, MovementEvent, MovementAction


def _to(state: MovementState, *actions: MovementAction) -> Transition:
    return Transition(state, actions)


TRANSITIONS: Final[dict[tuple[MovementState, MovementEvent], Transition | None]] = {
    (_S.RUNNING, _E.STOP): _to(_S.STOPPED, _A.FREEZE),
    (_S.RUNNING, _E.RESUME): _to(_S.RESUMING, _A.THAW, _A.ANNOUNCE),
    (_S.RUNNING, _E.RESUME_SILENTLY): _to(_S.RUNNING, _A.THAW),
    (_S.RUNNING, _E.RESUME_ACKED): None,
    (_S.RUNNING, _E.RESUME_EXPIRED): None,
    (_S.RUNNING, _E.NAK_STOPPED): _to(_S.PAUSED, _A.PAUSE),
    (_S.RUNNING, _E.PEER_RESUMED): _to(_S.RUNNING, _A.ACKNOWLEDGE),
    (_S.RUNNING, _E.PEER_MOVED): _to(_S.RUNNING, _A.ACKNOWLEDGE, _A.RESTART),
    (_S.RUNNING, _E.REFUSED_EXECUTED): None,
    (_S.RUNNING, _E.PAUSE_EXPIRED): None,
    (_S.RUNNING, _E.FAIL): _to(_S.RUNNING, _A.CLEAR),
    #
    (_S.PAUSED, _E.STOP): _to(_S.STOPPED_PAUSED, _A.FREEZE),
    (_S.PAUSED, _E.RESUME): _to(_S.RESUMING_PAUSED, _A.THAW, _A.ANNOUNCE),
    (_S.PAUSED, _E.RESUME_SILENTLY): _to(_S.PAUSED, _A.THAW),
    (_S.PAUSED, _E.RESUME_ACKED): None,
    (_S.PAUSED, _E.RESUME_EXPIRED): None,
    (_S.PAUSED, _E.NAK_STOPPED): _to(_S.PAUSED, _A.PAUSE),
    (_S.PAUSED, _E.PEER_RESUMED): _to(_S.RUNNING, _A.ACKNOWLEDGE, _A.RESTART),
    (_S.PAUSED, _E.PEER_MOVED): _to(_S.RUNNING, _A.ACKNOWLEDGE, _A.RESTART),
    (_S.PAUSED, _E.REFUSED_EXECUTED): _to(_S.RUNNING, _A.RESTART),
    (_S.PAUSED, _E.PAUSE_EXPIRED): _to(_S.RUNNING, _A.EXPIRE, _A.RESTART),
    (_S.PAUSED, _E.FAIL): _to(_S.RUNNING, _A.CLEAR),
    #
    (_S.RESUMING, _E.STOP): _to(_S.STOPPED, _A.FREEZE, _A.KEEP_ANNOUNCING),
    (_S.RESUMING, _E.RESUME): _to(_S.RESUMING, _A.THAW, _A.ANNOUNCE),
    (_S.RESUMING, _E.RESUME_SILENTLY): _to(_S.RUNNING, _A.THAW),
    (_S.RESUMING, _E.RESUME_ACKED): _to(_S.RUNNING, _A.CONFIRM, _A.RESTART),
    (_S.RESUMING, _E.RESUME_EXPIRED): _to(_S.RUNNING, _A.GIVE_UP),
    (_S.RESUMING, _E.NAK_STOPPED): _to(_S.RESUMING_PAUSED, _A.WAIT, _A.PAUSE),
    (_S.RESUMING, _E.PEER_RESUMED): _to(_S.RESUMING, _A.ACKNOWLEDGE),
    (_S.RESUMING, _E.PEER_MOVED): _to(_S.RESUMING, _A.ACKNOWLEDGE, _A.RESTART, _A.REPEAT),
    (_S.RESUMING, _E.REFUSED_EXECUTED): None,
    (_S.RESUMING, _E.PAUSE_EXPIRED): None,
    (_S.RESUMING, _E.FAIL): _to(_S.RUNNING, _A.CLEAR),
    #
    (_S.RESUMING_PAUSED, _E.STOP): _to(_S.STOPPED_PAUSED, _A.FREEZE, _A.KEEP_ANNOUNCING),
    (_S.RESUMING_PAUSED, _E.RESUME): _to(_S.RESUMING_PAUSED, _A.THAW, _A.ANNOUNCE),
    (_S.RESUMING_PAUSED, _E.RESUME_SILENTLY): _to(_S.PAUSED, _A.THAW),
    (_S.RESUMING_PAUSED, _E.RESUME_ACKED): _to(_S.RUNNING, _A.CONFIRM, _A.RESTART),
    (_S.RESUMING_PAUSED, _E.RESUME_EXPIRED): _to(_S.PAUSED, _A.GIVE_UP),
    (_S.RESUMING_PAUSED, _E.NAK_STOPPED): _to(_S.RESUMING_PAUSED, _A.WAIT, _A.PAUSE),
    (_S.RESUMING_PAUSED, _E.PEER_RESUMED): _to(_S.RESUMING, _A.ACKNOWLEDGE, _A.RESTART, _A.REPEAT),
    (_S.RESUMING_PAUSED, _E.PEER_MOVED): _to(_S.RESUMING, _A.ACKNOWLEDGE, _A.RESTART, _A.REPEAT),
    (_S.RESUMING_PAUSED, _E.REFUSED_EXECUTED): _to(_S.RESUMING, _A.RESTART),
    (_S.RESUMING_PAUSED, _E.PAUSE_EXPIRED): None,  # the limit of its own RESUME counts
    (_S.RESUMING_PAUSED, _E.FAIL): _to(_S.RUNNING, _A.CLEAR),
    #
    (_S.STOPPED, _E.STOP): _to(_S.STOPPED, _A.FREEZE),
    (_S.STOPPED, _E.RESUME): _to(_S.RESUMING, _A.THAW, _A.ANNOUNCE),
    (_S.STOPPED, _E.RESUME_SILENTLY): _to(_S.RUNNING, _A.THAW),
    (_S.STOPPED, _E.RESUME_ACKED): None,
    (_S.STOPPED, _E.RESUME_EXPIRED): None,
    (_S.STOPPED, _E.NAK_STOPPED): None,
    (_S.STOPPED, _E.PEER_RESUMED): _to(_S.STOPPED, _A.REFUSE),
    (_S.STOPPED, _E.PEER_MOVED): _to(_S.STOPPED, _A.REFUSE),
    (_S.STOPPED, _E.REFUSED_EXECUTED): None,
    (_S.STOPPED, _E.PAUSE_EXPIRED): None,
    (_S.STOPPED, _E.FAIL): _to(_S.STOPPED, _A.CLEAR),
    #
    (_S.STOPPED_PAUSED, _E.STOP): _to(_S.STOPPED_PAUSED, _A.FREEZE),
    (_S.STOPPED_PAUSED, _E.RESUME): _to(_S.RESUMING_PAUSED, _A.THAW, _A.ANNOUNCE),
    (_S.STOPPED_PAUSED, _E.RESUME_SILENTLY): _to(_S.PAUSED, _A.THAW),
    (_S.STOPPED_PAUSED, _E.RESUME_ACKED): None,
    (_S.STOPPED_PAUSED, _E.RESUME_EXPIRED): None,
    (_S.STOPPED_PAUSED, _E.NAK_STOPPED): None,
    (_S.STOPPED_PAUSED, _E.PEER_RESUMED): _to(_S.STOPPED, _A.REFUSE),
    (_S.STOPPED_PAUSED, _E.PEER_MOVED): _to(_S.STOPPED, _A.REFUSE),
    (_S.STOPPED_PAUSED, _E.REFUSED_EXECUTED): None,
    (_S.STOPPED_PAUSED, _E.PAUSE_EXPIRED): None,
    (_S.STOPPED_PAUSED, _E.FAIL): _to(_S.STOPPED, _A.CLEAR),
}
"""Every event in every state; None: it is ignored."""

STOPPED_STATES: Final = frozenset(map(int, (_S.STOPPED, _S.STOPPED_PAUSED)))
PAUSED_STATES: Final = frozenset(map(int, (_S.PAUSED, _S.RESUMING_PAUSED, _S.STOPPED_PAUSED)))
RESUMING_STATES: Final = frozenset(map(int, (_S.RESUMING, _S.RESUMING_PAUSED)))


@dataclass(slots=True)
class Movement:
    """Times are seconds on the caller's clock (None: not set).

    UC and UD use `state` only, and are Running or Stopped.
    """

    state: int = number(MovementState.RUNNING, max(MovementState))
    """MovementState."""
    announce: bool = False
    """The next resume sends RESUME even to a peer that is not known to speak MigrOS."""
    peer_migros: bool = False
    """A packet of the peer announced the extension (never forgotten until RESET)."""
    peer_resumed_at: float | None = None
    """When the peer's last RESUME was received."""
    pause_psn: int = number(0, PSN_MASK)
    """The PSN that NAK_STOPPED refused: an answer to it or to a later one shows that the peer runs again."""
    pause_deadline: float | None = None
    resume_deadline: float | None = None
    """When RESUME is sent again; None: at the next opportunity."""
    resume_wait: float = 0.0
    """Seconds until the next repetition; doubles."""
    resume_since: float | None = None
    """Since when RESUMEs have been unanswered."""
    resume_acked_at: float | None = None

    @property
    def stopped(self) -> bool:
        """This end is frozen."""
        return self.state in STOPPED_STATES

    @property
    def paused(self) -> bool:
        """The peer is frozen, as far as this end knows."""
        return self.state in PAUSED_STATES

    @property
    def resume_pending(self) -> bool:
        """A RESUME is unanswered, or will be sent whatever is known of the peer."""
        return self.announce or self.state in RESUMING_STATES

    def handle(self, event: MovementEvent) -> tuple[MovementAction, ...]:
        """Make the transition of TRANSITIONS; returns the actions that the caller must perform."""
        row = TRANSITIONS[MovementState(self.state), event]
        if row is None:
            return ()
        self.state = int(row.state)
        return row.actions

    def fail(self) -> None:
        """The event FAIL and its action."""
        if MovementAction.CLEAR in self.handle(MovementEvent.FAIL):
            self.pause_deadline = self.resume_deadline = None
            self.announce = False

    def heard(self) -> None:
        """A packet of the peer announces the extension."""
        self.peer_migros = True

    def request_announcement(self) -> None:
        """This end gets another address: the next resume tells the peer even if it was never heard."""
        self.announce = True
