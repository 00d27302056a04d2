"""Everything that a run has while it runs, in one place: applications, migrations and experiments get it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.cleanup.state import RunState
from testbed.controller.client import ControllerClient
from testbed.lab.applications import Applications
from testbed.record.folder import RunFolder
from testbed.topology import ResolvedTopology

if TYPE_CHECKING:
    from testbed.lab.hosts import Host
    from testbed.network import Network


@dataclass
class Session:
    """A running topology. Every member may be used from any thread, unless its description says otherwise.

    When a migration is due, the runner calls `testbed.migration.migrate(session, migration) -> summary.Migration` in a
    thread of its own, never two at once. `migrate` reports `migration_started`, `phase_started`, `phase_finished`,
    `flow_change` and `migration_finished` to `folder` itself, and calls `apps.moved` once the application belongs to
    the other host. A failure, rolled back or not, is in the record that it returns and raises nothing.
    """

    topology: ResolvedTopology
    folder: RunFolder
    """Receives events, logs and captures."""
    state: RunState
    network: Network
    """The virtual hosts by name are in `.hosts`; `.plan` has every number."""
    hosts: dict[str, Host] = field(default_factory=dict)
    """The hosts' agents: `session.hosts["h2"].call(op, **arguments)`. Empty until the runner has connected."""
    apps: Applications = field(init=False)
    """Where each application is and how it ended."""

    def __post_init__(self) -> None:
        self.apps = Applications(self.topology, self.hosts, self.folder)

    def controller(self) -> ControllerClient:
        """Open a connection to the controller for the calling thread."""
        return ControllerClient(self.network.controller.path)
