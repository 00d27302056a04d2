"""What a run has while it runs, in one place: handed to whoever acts on it (applications, migrations, experiments)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.cleanup.state import RunState
from testbed.controller.client import ControllerClient
from testbed.record.folder import RunFolder
from testbed.topology import ResolvedTopology

if TYPE_CHECKING:
    from testbed.lab.applications import Applications
    from testbed.lab.hosts import Host
    from testbed.network import Network


@dataclass
class Session:
    """A running topology. Every member may be used from any thread, except where it says otherwise.

    `testbed.migration.migrate(session, migration) -> summary.Migration` is what the runner calls when a migration is
    due, in a thread of its own, never two at once. It reports `migration_started`, `phase_started`, `phase_finished`,
    `flow_change` and `migration_finished` to `folder` itself, and `apps.moved` once the application is another host's;
    a failure, rolled back or not, is in the record it returns and no exception.
    """

    topology: ResolvedTopology
    folder: RunFolder
    """Events, logs and captures go here."""
    state: RunState
    network: Network
    """Virtual hosts by name in `.hosts`; `.plan` has every number."""
    hosts: dict[str, Host] = field(default_factory=dict)
    """The agents: `session.hosts["h2"].call(op, **arguments)`."""
    apps: Applications = field(init=False)
    """Where each application is and how it ended."""

    def controller(self) -> ControllerClient:
        """A connection to the controller of one's own (a client is one thread's)."""
        return ControllerClient(self.network.controller.path)
