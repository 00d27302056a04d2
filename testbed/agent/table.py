"""Every operation of an agent, by name; docs/agent.md describes them.

An operation is a function `name(agent, **arguments) -> dict | None`; arguments and result are JSON. The operations of a
migration, in their order on the two hosts:

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
    migrate_abort     whatever exists is removed  migrate_rollback the program continues here, RESUME sent from here

`migrate_abort` and `migrate_rollback` are possible at every moment before `migrate_resume` has sent its RESUME, may be
repeated, and wait for an operation of the same migration that is still in progress. An agent that ends does the same.

The event `migration_phase` {migration, phase, began[, ended]} reports when each phase begins and ends, in
time.monotonic() of this machine.
"""

from __future__ import annotations

from typing import Final

from testbed.agent import addresses, apps, files, move_destination, move_source, nic
from testbed.agent.operations import Operation

OPS: Final[dict[str, Operation]] = {
    "start_nic": nic.start_nic,
    "nic": nic.nic_command,
    "stop_nic": nic.stop_nic,
    "poll_nic": nic.poll_nic,
    "start_app": apps.start_app,
    "app_status": apps.app_status,
    "wait_app_ready": apps.wait_app_ready,
    "signal_app": apps.signal_app,
    "address_add": addresses.address_add,
    "address_del": addresses.address_del,
    "addresses": addresses.list_addresses,
    "read_log": files.read_log,
    "read_nic_log": files.read_nic_log,
    "read_file": files.read_file,
    "migrate_begin": move_source.migrate_begin,
    "migrate_send": move_source.migrate_send,
    "migrate_commit": move_source.migrate_commit,
    "migrate_rollback": move_source.migrate_rollback,
    "migrate_prepare": move_destination.migrate_prepare,
    "migrate_receive": move_destination.migrate_receive,
    "migrate_resume": move_destination.migrate_resume,
    "migrate_abort": move_destination.migrate_abort,
}
"""Name → function. The agent's loop calls each in a thread of its own."""
