"""Mininet's hosts, switches and cables, with error checking.

Mininet provides the virtual hosts (namespaces held open by a shell), the bridges and the book-keeping. It also ignores
the results of its commands, removes existing interfaces and bridges whose names it wants, needs some ten shell round
trips per interface, and raises kernel limits of the whole machine. These subclasses create everything themselves, each
with one command whose failure is raised.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from testbed.base.errors import EnvironmentProblem
from testbed.network.fixtures import PRIVATE
from testbed.network.machine import command

if sys.version_info >= (3, 12):
    # Mininet 2.3.0 imports distutils, which Python has removed; setuptools provides a copy.
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
        hint="./bootstrap installs it; by hand: apt install mininet, and create the venv with --system-site-packages",
    ) from error


def mininet() -> Any:
    """An empty Mininet, without its one-time initialisation, which would permanently raise limits of the machine."""
    setLogLevel("error")
    Mininet.inited = True
    return Mininet(controller=None, build=False)


class PrivateHost(Host):  # type: ignore[misc]
    """A host with a private tmpfs at `/run/migros`, in its mount namespace."""

    @classmethod
    def setup(cls) -> None:
        """Do nothing: `machine.check` has been called. Mininet's version ends the process if something is missing."""

    def mountPrivateDirs(self) -> None:
        """Mount the tmpfs in the host's mount namespace."""
        command("mount", "-t", "tmpfs", "-o", "mode=0755,nosuid", "migros", PRIVATE, pid=self.pid)

    def unmountPrivateDirs(self) -> None:
        """Do nothing: the mount disappears with its namespace, when the last process in it has ended."""


class Port(Intf):  # type: ignore[misc]
    """An interface that `network` configures, together with the host's others."""

    def config(self, **_: Any) -> dict[str, Any]:
        """Do nothing: `network` has its own commands for this."""
        return {}


class Cable(Link):  # type: ignore[misc]
    """A veth pair that is created with its MTU and MACs. A subclass gives `mtu` as a class attribute."""

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
        """Create the pair, one end in each node's namespace. Raises CommandFailed if a name is taken."""
        del deleteIntfs
        one = ["name", intfname1, "mtu", str(cls.mtu), *(["address", addr1] if addr1 else []), *_place(node1)]
        two = ["name", intfname2, "mtu", str(cls.mtu), *(["address", addr2] if addr2 else []), *_place(node2)]
        command("ip", "link", "add", *one, "type", "veth", "peer", *two)


def _place(node: Any) -> list[str]:
    return ["netns", str(node.pid)] if node is not None and node.inNamespace else []


class Bridge(OVSSwitch):  # type: ignore[misc]
    """An Open vSwitch bridge that is created in one transaction and marked with the run that it belongs to."""

    @classmethod
    def setup(cls) -> None:
        """Do nothing, as for hosts. Mininet's version also allows Open vSwitch just one second to answer."""

    def __init__(self, name: str, run_id: str, **params: Any) -> None:
        self.run_id = run_id
        super().__init__(name, failMode="secure", protocols="OpenFlow13", **params)

    def start_at(self, openflow_port: int, mtu: int) -> None:
        """Create the bridge with its ports, in fail mode *secure*: flows stay when the controller ends.

        Waits until Open vSwitch has applied it. Raises CommandFailed; EnvironmentProblem if a port did not come up.
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
            # On a fully loaded machine the controller may get no CPU time for many seconds.
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
                    hint="see the log of ovs-vswitchd",
                )

    def remove(self) -> None:
        """Delete the bridge; the interfaces of its ports stay."""
        command("ovs-vsctl", "--timeout=30", "--if-exists", "del-br", self.name)
