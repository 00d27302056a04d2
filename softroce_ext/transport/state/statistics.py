"""What a queue pair counts about itself, for the management socket."""

from __future__ import annotations

from dataclasses import dataclass

from softroce_ext.transport.state.fields import U64, number


@dataclass(slots=True)
class Statistics:
    """Times are seconds on the caller's clock (None: not set)."""

    completed_sends: int = number(0, U64)
    """Send requests that were completed with success, whether or not a completion was asked for."""
    completed_receives: int = number(0, U64)
    retransmits: int = number(0, U64)
    """Request packets that were sent again."""
    gap_last: float | None = None
    """Time of the last completion."""
    gap_longest: float = 0.0
    """Longest time between two completions."""
    gap_longest_end: float | None = None
    """Time of the completion that ended the longest gap; None until there were two."""

    def retransmitted(self, packets: int) -> None:
        """`packets` request packets were sent again."""
        self.retransmits += packets

    def send_completed(self, now: float) -> None:
        """HOT. A send request was completed with success."""
        self.completed_sends += 1
        last = self.gap_last
        if last is not None and now - last > self.gap_longest:
            self.gap_longest = now - last
            self.gap_longest_end = now
        self.gap_last = now

    def receive_completed(self, now: float) -> None:
        """HOT. A receive was completed with success."""
        self.completed_receives += 1
        last = self.gap_last
        if last is not None and now - last > self.gap_longest:
            self.gap_longest = now - last
            self.gap_longest_end = now
        self.gap_last = now

    def reset_gaps(self) -> None:
        """Forget the gap statistics."""
        self.gap_last = self.gap_longest_end = None
        self.gap_longest = 0.0
