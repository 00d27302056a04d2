"""Moving one running program to another host: phases in order, each timed, each with an undo.

What lives here: the order of the phases and of their undoing (`move`), the list of undo steps (`undo`), when each phase
began and ended (`timeline`), and what the NICs counted and when completions came around it (`observe`). The work itself
is done by the agents (`testbed.agent.table`) and the controller.

Callers use `migrate` and nothing else.

May import: `testbed.base`, `testbed.record`, `testbed.topology`, `testbed.controller`, `testbed.lab`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.migration.move import Move
from testbed.record import summary
from testbed.topology import ResolvedMigration

if TYPE_CHECKING:
    from testbed.lab.session import Session

__all__ = ["migrate"]


def migrate(session: Session, migration: ResolvedMigration) -> summary.Migration:
    """Move the program and return the record of the migration, also of one that failed.

    Events go to the session's folder while it is in progress. Any error before the destination's NIC has resumed leaves
    the program running at the source (`rolled_back`). An exception other than KeyboardInterrupt is a defect; it is
    raised after the same roll-back.
    """
    return Move(session, migration).run()
