"""The network of one run: built by one call and removed by one call, even if building it failed half-way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from testbed.base import ip6
from testbed.base.errors import EnvironmentProblem, RunFailed
from testbed.cleanup.state import RunState
from testbed.controller.client import ControllerClient
from testbed.controller.process import ControllerProcess
from testbed.network import fixtures, machine, scheduling, shaping, ssh
from testbed.network.host import VirtualHost
from testbed.network.plan import MANAGEMENT_INTERFACE, Plan, Wire, plan
from testbed.topology import ResolvedTopology

READY_TIMEOUT: Final = 60.0
"""Seconds within which all switches must connect and confirm their flows; it usually takes one or two."""
NEIGHBOUR_LIFETIME: Final = 3_600_000
"""Milliseconds that a host trusts an ARP answer; long, so that paths keep working if the controller ends."""
MANAGEMENT_MTU: Final = 9000
NODE_PREFIX: Final = 16
"""Prefix length of the node addresses, 100.64.0.0/16."""


class Network:
    """The network of a run. Call `start` and `stop`, or use it as a context manager.

    Everything is recorded in `state` before it is created. Logs go to `run_dir/network/`.
    """

    def __init__(self, resolved: ResolvedTopology, run_dir: Path, state: RunState) -> None:
        self.resolved = resolved
        self.logs = Path(run_dir) / "network"
        self.state = state
        self.plan: Plan
        self.hosts: dict[str, VirtualHost] = {}
        self.datapath = ""
        """`kernel` or `userspace` once the network has started."""
        self.ovs_version = ""
        self.controller_version = ""
        """Framework and version, such as `ryu 4.34`."""
        self.limits: list[dict[str, str]] = []
        """What this machine could not provide as asked: wanted, got, why (as in the summary)."""
        self.nic_impairments: dict[str, dict[str, float]] = {}
        """Host → impairment for its NIC's port: the host's `nic.impair` combined with the delay and loss of its cable
        (one way) that the kernel could not provide. Hosts whose impairment is just `nic.impair` are left out."""
        self.controller: ControllerClient
        self.access: ssh.Access
        self._controller_process: ControllerProcess | None = None
        self._mininet: Any = None
        self._bridges: dict[str, Any] = {}
        self._servers: list[ssh.Server] = []
        self._undo: list[tuple[str, Callable[[], None]]] = []

    # -- building

    def start(self) -> None:
        """Build the network; returns when every host can reach every other and accepts SSH.

        Raises EnvironmentProblem or RunFailed, after everything that was created has been removed again.
        """
        try:
            self._start()
        except BaseException:
            with contextlib.suppress(RunFailed):
                self.stop()
            raise

    def _start(self) -> None:
        machine.check()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.ovs_version = machine.ovs_version()
        in_kernel, why = machine.kernel_datapath()
        self.datapath = "kernel" if in_kernel else "userspace"
        if not in_kernel:
            self.limits.append({"wanted": "OVS kernel datapath", "got": "OVS userspace datapath (netdev)", "why": why})
        base = self.state.directory.parent
        with fixtures.machine_lock(base):
            self._undo.append(("the shared mount points", self._release))
            tag, slot = fixtures.claim(self.state)
            self.plan = plan(self.resolved, tag, slot)
        log = self.logs / "controller.log"
        process = ControllerProcess(self.plan.fabric, self.state, log, self.resolved.controller, self.datapath)
        self._controller_process = process
        self._undo.append(("the controller", process.stop))
        process.launch()
        self._make_nodes()
        self._make_wires()
        self._make_management()
        self._configure_hosts()
        process.wait()
        self._start_bridges(process.openflow_port)
        self._shape()
        self._start_ssh()
        self.controller = ControllerClient(process.socket)
        self._undo.append(("the controller's client", self.controller.close))
        status = self.controller.wait_ready(READY_TIMEOUT)
        self.controller_version = str(status["framework"])

    def _make_nodes(self) -> None:
        from testbed.network.nodes import Bridge, PrivateHost, mininet

        self._mininet = mininet()
        for name in self.plan.hosts:
            host = self._mininet.addHost(name, cls=PrivateHost, ip=None)
            token = self.state.record("host", pid=host.pid, name=name)
            self._undo.append((f"host {name}", self._node_remover(host, token)))
        for name, bridge in self.plan.bridges.items():
            dpid = f"{self.plan.datapath_ids[name]:016x}"
            kind = "kernel" if self.datapath == "kernel" else "user"
            switch = self._mininet.addSwitch(
                bridge, cls=Bridge, run_id=self.state.run_id, dpid=dpid, datapath=kind, inNamespace=False
            )
            token = self.state.record("process", pid=switch.pid, role="switch shell", name=name)
            self._undo.append((f"the shell of switch {name}", self._node_remover(switch, token)))
            self._bridges[name] = switch

    def _node_remover(self, node: Any, token: str) -> Callable[[], None]:
        called = False

        def remove() -> None:
            nonlocal called
            if node.shell is not None and node.inNamespace:
                # A program that its agent could not end would keep the namespaces, and the interfaces in them, alive.
                machine.end_namespace(node.pid)
            if not called:
                called = True
                node.terminate()
            elif node.shell is not None:
                # The first call was interrupted in `terminate`. Calling it again could close a descriptor that by now
                # belongs to another file.
                node.shell.kill()
                node.shell.wait()
                node.shell = None
            self.state.forget(token)

        return remove

    def _make_wires(self) -> None:
        from testbed.network.nodes import Cable, Port

        for wire in self.plan.wires:
            ends = [self._node(wire.a.node), self._node(wire.b.node)]
            for end in (wire.a, wire.b):
                if end.port:
                    token = self.state.record("link", name=end.interface, wire=wire.name)
                    self._undo.append((f"link {wire.name}", self._link_remover(end.interface, token)))
            cable = type("Cable", (Cable,), {"mtu": wire.mtu})
            self._mininet.addLink(
                *ends,
                port1=wire.a.port,
                port2=wire.b.port,
                intfName1=wire.a.interface,
                intfName2=wire.b.interface,
                addr1=wire.a.mac,
                addr2=wire.b.mac,
                cls=cable,
                intf=Port,
            )

    def _link_remover(self, interface: str, token: str) -> Callable[[], None]:
        def remove() -> None:
            if Path(f"/sys/class/net/{interface}").exists():
                machine.command("ip", "link", "delete", interface)
            self.state.forget(token)

        return remove

    def _make_management(self) -> None:
        for name, link in self.plan.management.items():
            token = self.state.record("link", name=link.outside, host=name)
            self._undo.append((f"management link of {name}", self._link_remover(link.outside, token)))
            machine.ip_batch(
                [
                    f"link add name {link.outside} mtu {MANAGEMENT_MTU} type veth "
                    f"peer name {MANAGEMENT_INTERFACE} mtu {MANAGEMENT_MTU} netns {self._node(name).pid}",
                    f"address add {link.outside_ip} peer {link.inside_ip}/32 dev {link.outside}",
                    f"link set {link.outside} up",
                ]
            )
            machine.write_sysctl(f"net.ipv6.conf.{link.outside}.disable_ipv6", "1")

    def _configure_hosts(self) -> None:
        """Set the addresses and kernel settings of every host, and switch off offloads at both ends of every cable."""
        for wire in self.plan.wires:
            for end in (wire.a, wire.b):
                if end.port:
                    # Router advertisements and neighbour discovery would be noise in every capture.
                    machine.write_sysctl(f"net.ipv6.conf.{end.interface}.disable_ipv6", "1")
                    machine.ip_batch([f"link set {end.interface} up"])
                shaping.switch_off_offloads(end.interface, None if end.port else self._node(end.node).pid)
        for name, host in self.plan.hosts.items():
            pid = self._node(name).pid
            link = self.plan.management[name]
            settings = {
                "net/ipv6/conf/all/disable_ipv6": 1,
                "net/ipv6/conf/default/disable_ipv6": 1,
                # An app's address is in the same subnet as its host's: removing one must not remove the other.
                "net/ipv4/conf/all/promote_secondaries": 1,
                # The data interface has an IPv6 address besides IPv4, but sends almost nothing unsolicited.
                f"net/ipv6/conf/{host.interface}/accept_ra": 0,
                f"net/ipv6/conf/{host.interface}/router_solicitations": 0,
                f"net/ipv6/conf/{host.interface}/accept_dad": 0,
                f"net/ipv6/conf/{host.interface}/disable_ipv6": 0,
                f"net/ipv6/neigh/{host.interface}/base_reachable_time_ms": NEIGHBOUR_LIFETIME,
                f"net/ipv4/neigh/{host.interface}/base_reachable_time_ms": NEIGHBOUR_LIFETIME,
                f"net/ipv4/conf/{host.interface}/rp_filter": 0,
                "net/ipv4/conf/all/rp_filter": 0,
            }
            script = "\n".join(f"echo {value} > /proc/sys/{key}" for key, value in settings.items())
            machine.command("sh", "-e", "-c", script, pid=pid)
            machine.ip_batch(
                [
                    "link set lo up",
                    f"link set {host.interface} up",
                    f"address add {host.ip}/{host.prefix} dev {host.interface}",
                    f"address add {ip6.companion(host.ip)}/{ip6.NETWORK.prefixlen} dev {host.interface} nodad",
                    f"address add {host.node_ip}/{NODE_PREFIX} dev {host.interface}",
                    f"link set {MANAGEMENT_INTERFACE} up",
                    f"address add {link.inside_ip} peer {link.outside_ip}/32 dev {MANAGEMENT_INTERFACE}",
                ],
                pid=pid,
            )

    def _start_bridges(self, openflow_port: int) -> None:
        base = self.state.directory.parent
        with fixtures.machine_lock(base), contextlib.ExitStack() as stack:
            if self.datapath == "userspace":
                scheduling.raise_priority(base)
                size = stack.enter_context(fixtures.wide_receive_buffers(base))
                if size < fixtures.SOCKET_MEMORY:
                    self.limits.append(
                        {
                            "wanted": f"receive buffers of {fixtures.SOCKET_MEMORY >> 20} MiB at the switches' ports",
                            "got": f"{size >> 10} KiB: bursts of more than about twenty frames lose packets",
                            "why": "net.core.rmem_default cannot be changed here",
                        }
                    )
            for name, switch in self._bridges.items():
                token = self.state.record("ovs_bridge", name=switch.name, switch=name)
                self._undo.append((f"bridge {name}", self._bridge_remover(switch, token)))
                switch.start_at(openflow_port, min(w.mtu for w in self.plan.wires if name in (w.a.node, w.b.node)))

    def _bridge_remover(self, switch: Any, token: str) -> Callable[[], None]:
        def remove() -> None:
            switch.remove()
            self.state.forget(token)

        return remove

    def _shape(self) -> None:
        """Shape all cables. Call it after the bridges: Open vSwitch clears the qdisc of an interface that it adds."""
        for wire in self.plan.wires:
            applied = True
            for end in (wire.a, wire.b):
                pid = None if end.port else self._node(end.node).pid
                applied &= shaping.shape(end.interface, wire.bw, wire.mtu, wire.delay, wire.loss, pid)
            if not applied:
                self._impair_in_nic(wire)

    def _impair_in_nic(self, wire: Wire) -> None:
        """Let the host's NIC delay and lose a cable's packets. Raises EnvironmentProblem for a cable without a host."""
        host = self.plan.hosts.get(wire.a.node)
        if host is None:
            raise EnvironmentProblem(
                "a link between switches cannot have delay or loss, because this kernel has no netem",
                where=f"link {wire.name}",
                hint="set delay and loss on the hosts' links, where the NIC's port can apply them",
            )
        self.nic_impairments[host.name] = shaping.combined(host.nic.impair, wire.delay, wire.loss)
        self.limits.append(
            {
                "wanted": f"delay and loss of link {wire.name} by the kernel (netem)",
                "got": "by the NIC's port: only RDMA packets are affected",
                "why": "the kernel has no netem",
            }
        )

    def _start_ssh(self) -> None:
        self.access = ssh.make_keys(self.state.directory / "ssh")
        for name, host in self.plan.hosts.items():
            address = self.plan.management[name].inside_ip
            pid = self._node(name).pid
            log = self.logs / f"sshd-{name}.log"
            server = ssh.Server(name, pid, address, self.state.directory / "ssh", self.state, log)
            self._servers.append(server)
            self._undo.append((f"sshd of {name}", server.stop))
            server.start()
            self.hosts[name] = VirtualHost(
                name, pid, host.interface, host.mac, host.ip, host.node_ip, address, self.access
            )
        for server in self._servers:
            server.wait()

    def _node(self, name: str) -> Any:
        return self._mininet[self.plan.bridges.get(name, name)]

    # -- ending

    def stop(self) -> None:
        """Remove everything, newest first. Continues after a failure, then raises RunFailed with what is left.

        May be called again, even after it was interrupted: a step counts as done only when it has completed, so each
        step must be repeatable. What is left stays in the state file, so that `testbed clean` can remove it.
        """
        left: list[str] = []
        while self._undo:
            what, undo = self._undo[-1]
            try:
                undo()
            except Exception as error:  # Whatever went wrong, the rest must be removed too.
                left.append(f"{what}: {error}")
            self._undo.pop()
        self.hosts = {}
        self._servers = []
        self._bridges = {}
        self._mininet = None
        if left:
            raise RunFailed(
                "not everything could be removed: " + "; ".join(left),
                where="network",
                hint="testbed clean tries again",
            )

    def _release(self) -> None:
        """Free the tag and the slot. The mount points are removed once no run's folder is left (`fixtures.clean`)."""
        (self.state.directory / "network.json").unlink(missing_ok=True)

    def __enter__(self) -> Network:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
