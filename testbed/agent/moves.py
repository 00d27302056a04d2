"""What an agent does for a migration: the operations of the source and of the destination.

    destination                                   source
                                                  migrate_begin    what is known of the program
    migrate_prepare   receiver and `criu restore`
                      started, both waiting
                                                  migrate_send     freeze → stop the NIC → dump the NIC's objects ∥ the
                                                                   process → transfer; the program stays frozen
    migrate_receive   transfer → NIC's objects →
                      address → process; frozen
    migrate_resume    NIC attached, RESUME → thaw
                                                  migrate_commit   the original is killed, objects and address removed
    migrate_abort     whatever there is of it     migrate_rollback the program runs on here, RESUME sent from here

`migrate_abort` and `migrate_rollback` are possible at every moment before `migrate_resume` has sent its RESUME, may be
repeated, and wait for an operation of the same migration that is still under way. An agent that ends does the same.

Every phase is told as it begins and ends, by the event `migration_phase` {migration, phase, began[, ended]} in
time.monotonic() of this machine.
"""

from __future__ import annotations

from testbed.agent import move_destination as destination
from testbed.agent import move_source as source

__all__ = ["destination", "source"]
