"""Mininet's hosts, switches and cables, with their work checked.

Mininet gives the virtual hosts (namespaces held open by a shell), the bridges and the book-keeping. It also ignores
what its commands answer, removes interfaces and bridges that have a name it wants, needs some ten shell round trips per
interface, and raises kernel limits of the whole machine. These subclasses do the creating themselves: one command each,
its error raised.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from testbed.base.errors import EnvironmentProblem
from testbed.network.fixtures import PRIVATE
from testbed.network.machine import command

if sys.version_info >= (3, 12):
    # Mininet 2.3.0 imports distutils, which Python has dropped; setuptools brings a copy of its own.
    with contextlib.suppress(ImportError):
        import setuptools  # noqa: F401

try:
    from mininet.link import Intf, Link
    from mininet.log import setLogLevel
    from mininet.net import Mininet
    from mininet.node import Host, OVSSwitch
except ImportError as error:
    raise EnvironmentProblem(
        f"Mininet's Python module cannot be imported: {error}",
        where="network",
        hint="apt install mininet, and an environment made with --system-site-packages (./bootstrap does both)",
    ) from error


def mininet() -> Any:
    """An empty Mininet. Its one-time initialisation is skipped: it raises limits of the whole machine for good."""
    setLogLevel("error")
    Mininet.inited = True
    return Mininet(controller=None, build=False)


class PrivateHost(Host):  # type: ignore[misc]
    """A host with a tmpfs of its own at `/run/migros`, in its mount namespace."""

    @classmethod
    def setup(cls) -> None:
        """Nothing: `machine.check` has been called. Mininet's own ends the process if something is missing."""

    def mountPrivateDirs(self) -> None:
        command("mount", "-t", "tmpfs", "-o", "mode=0755,nosuid", "migros", PRIVATE, pid=self.pid)

    def unmountPrivateDirs(self) -> None:
        """Nothing: the mount goes with its namespace, when the last process in it has ended."""


class Port(Intf):  # type: ignore[misc]
    """An interface that `network` configures, all of a host's in one batch."""

    def config(self, **_: Any) -> dict[str, Any]:
        return {}


class Cable(Link):  # type: ignore[misc]
    """A veth pair with MTU and MACs from its first instant. `mtu` is given as a class attribute of a subclass."""

    mtu = 1500

    @classmethod
    def makeIntfPair(
        cls,
        intfname1: str,
        intfname2: str,
        addr1: str | None = None,
        addr2: str | None = None,
        node1: Any = None,
        node2: Any = None,
        deleteIntfs: bool = True,
    ) -> None:
        """Create it, one end in each node's namespace. Nothing is deleted; a name that is taken is an error."""
        del deleteIntfs
        one = ["name", intfname1, "mtu", str(cls.mtu), *(["address", addr1] if addr1 else []), *_place(node1)]
        two = ["name", intfname2, "mtu", str(cls.mtu), *(["address", addr2] if addr2 else []), *_place(node2)]
        command("ip", "link", "add", *one, "type", "veth", "peer", *two)


def _place(node: Any) -> list[str]:
    return ["netns", str(node.pid)] if node is not None and node.inNamespace else []


class Bridge(OVSSwitch):  # type: ignore[misc]
    """An Open vSwitch bridge made in one transaction, marked with the run that it belongs to."""

    @classmethod
    def setup(cls) -> None:
        """Nothing: as for hosts. Mininet's own also gives Open vSwitch one second to answer."""

    def __init__(self, name: str, run_id: str, **params: Any) -> None:
        self.run_id = run_id
        super().__init__(name, failMode="secure", protocols="OpenFlow13", **params)

    def start_at(self, openflow_port: int, mtu: int) -> None:
        """Create the bridge with its ports, in fail mode *secure*: flows stay when the controller is gone.

        Waits until Open vSwitch has carried it out. Raises CommandFailed; EnvironmentProblem if a port did not come up.
        """
        userspace = ["datapath_type=netdev"] if self.datapath == "user" else []
        options = [
            f"other-config:datapath-id={self.dpid}",
            "other-config:disable-in-band=true",
            f"external-ids:migros-testbed={self.run_id}",
        ]
        steps = [
            ["add-br", self.name],
            ["set", "bridge", self.name, "fail_mode=secure", "protocols=OpenFlow13", *userspace, *options],
            ["set-controller", self.name, f"tcp:127.0.0.1:{openflow_port}"],
            # A machine whose cores are all taken may leave the controller without time for many seconds.
            ["set", "controller", self.name, "inactivity_probe=60000", "max_backoff=1000"],
        ]
        ports = [intf for intf in self.intfList() if self.ports[intf]]
        for intf in ports:
            steps.append(["add-port", self.name, intf.name])
            steps.append(["set", "interface", intf.name, f"ofport_request={self.ports[intf]}", f"mtu_request={mtu}"])
        argv: list[str] = []
        for step in steps:
            argv += ["--", *step]
        command("ovs-vsctl", "--timeout=30", *argv)
        for intf in ports:
            number = command("ovs-vsctl", "--timeout=10", "get", "interface", intf.name, "ofport").strip()
            if number != str(self.ports[intf]):
                problem = command("ovs-vsctl", "--timeout=10", "get", "interface", intf.name, "error").strip()
                raise EnvironmentProblem(
                    f"port {intf.name} has number {number} instead of {self.ports[intf]}: {problem}",
                    where=f"bridge {self.name}",
                    hint="the log of ovs-vswitchd says more",
                )

    def remove(self) -> None:
        """Delete the bridge; its ports' interfaces stay."""
        command("ovs-vsctl", "--timeout=30", "--if-exists", "del-br", self.name)
