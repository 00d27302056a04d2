"""The network of one run: built in one call, taken away in one call, also when the building failed half way."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from testbed.base import ip6
from testbed.base.errors import EnvironmentProblem, RunFailed
from testbed.cleanup.state import RunState
from testbed.controller.client import ControllerClient
from testbed.controller.process import ControllerProcess
from testbed.network import fixtures, machine, scheduling, shaping, ssh
from testbed.network.plan import MANAGEMENT_INTERFACE, Plan, Wire, plan
from testbed.topology import ResolvedTopology

READY_TIMEOUT: Final = 60.0
"""Seconds until all switches have connected and confirmed; usually one or two."""
NEIGHBOUR_LIFETIME: Final = 3_600_000
"""Milliseconds that a host trusts an ARP answer. The controller gives them; without it, paths must go on working."""
MANAGEMENT_MTU: Final = 9000
NODE_PREFIX: Final = 16
"""Of the node addresses, 100.64.0.0/16."""


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """A running virtual host."""

    name: str
    pid: int
    """Of the shell that holds its network and mount namespaces open."""
    interface: str
    """Its data interface, by the name that it has inside."""
    mac: str
    ip: str
    node_ip: str
    mgmt_ip: str
    """Where its SSH server listens; reachable from the root namespace only."""
    access: ssh.Access

    def inside(self, argv: Sequence[str]) -> list[str]:
        """`argv` as a command line that enters this host's network and mount namespaces first."""
        return ["mnexec", "-a", str(self.pid), *argv]

    def run(
        self, argv: Sequence[str], *, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command inside and wait. Raises RunFailed if it fails (unless `check` is False) or hangs."""
        try:
            done = subprocess.run(self.inside(argv), capture_output=True, text=True, timeout=timeout, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunFailed(f"`{' '.join(argv)}`: {error}", where=f"host {self.name}") from error
        if check and done.returncode != 0:
            message = (done.stderr or done.stdout).strip()
            raise RunFailed(
                f"`{' '.join(argv)}` ended with code {done.returncode}: {message}", where=f"host {self.name}"
            )
        return done

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside; `options` are subprocess.Popen's."""
        return subprocess.Popen(self.inside(argv), **options)


class Network:
    """`start()`, use, `stop()`; or as a context manager, which stops also if `start` fails.

    Everything is recorded in `state` before it exists. Logs go to `run_dir/network/`.
    """

    def __init__(self, resolved: ResolvedTopology, run_dir: Path, state: RunState) -> None:
        self.resolved = resolved
        self.logs = Path(run_dir) / "network"
        self.state = state
        self.plan: Plan
        self.hosts: dict[str, VirtualHost] = {}
        self.datapath = ""
        """`kernel` or `userspace`, once started."""
        self.ovs_version = ""
        self.controller_version = ""
        """`ryu 4.34` or `os-ken …`."""
        self.limits: list[dict[str, str]] = []
        """What could not be had as asked: wanted, got, why (as in the summary)."""
        self.nic_impairments: dict[str, dict[str, float]] = {}
        """Host → what its NIC's port must do: the host's own `nic.impair` together with the delay and loss of its cable
        that the kernel could not give, each way. Only hosts for which that differs from `nic.impair`."""
        self.controller: ControllerClient
        self.access: ssh.Access
        self._controller_process: ControllerProcess | None = None
        self._mininet: Any = None
        self._bridges: dict[str, Any] = {}
        self._servers: list[ssh.Server] = []
        self._undo: list[tuple[str, Callable[[], None]]] = []

    # -- building

    def start(self) -> None:
        """Build it all; returns when every host reaches every other and accepts SSH.

        Raises EnvironmentProblem or RunFailed; what exists by then has been removed again.
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
            self._undo.append((f"host {name}", self._ender(host, token)))
        for name, bridge in self.plan.bridges.items():
            dpid = f"{self.plan.datapath_ids[name]:016x}"
            kind = "kernel" if self.datapath == "kernel" else "user"
            switch = self._mininet.addSwitch(
                bridge, cls=Bridge, run_id=self.state.run_id, dpid=dpid, datapath=kind, inNamespace=False
            )
            token = self.state.record("process", pid=switch.pid, role="switch shell", name=name)
            self._undo.append((f"the shell of switch {name}", self._ender(switch, token)))
            self._bridges[name] = switch

    def _ender(self, node: Any, token: str) -> Callable[[], None]:
        begun = False

        def end() -> None:
            nonlocal begun
            if node.shell is not None and node.inNamespace:
                # A program that its agent could not end would keep the namespaces, and the interfaces in them, alive.
                machine.end_namespace(node.pid)
            if not begun:
                begun = True
                node.terminate()
            elif node.shell is not None:
                # Interrupted in `terminate`, which would now close a descriptor that may be another file's.
                node.shell.kill()
                node.shell.wait()
                node.shell = None
            self.state.forget(token)

        return end

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
        """Addresses and kernel settings of every host; offloads of every end of every cable."""
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
                # An app's own address lives in the same subnet as its host's: removing one must not remove the other.
                "net/ipv4/conf/all/promote_secondaries": 1,
                # The data interface has the address beside its IPv4 address, and says next to nothing unasked.
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
                scheduling.first(base)
                size = stack.enter_context(fixtures.wide_receive_buffers(base))
                if size < fixtures.SOCKET_MEMORY:
                    self.limits.append(
                        {
                            "wanted": f"receive buffers of {fixtures.SOCKET_MEMORY >> 20} MiB at the switches' ports",
                            "got": f"{size >> 10} KiB: bursts of more than some twenty frames lose packets",
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
        """After the bridges: Open vSwitch clears the queueing discipline of an interface when it becomes a port."""
        for wire in self.plan.wires:
            applied = True
            for end in (wire.a, wire.b):
                pid = None if end.port else self._node(end.node).pid
                applied &= shaping.shape(end.interface, wire.bw, wire.mtu, wire.delay, wire.loss, pid)
            if not applied:
                self._hand_over(wire)

    def _hand_over(self, wire: Wire) -> None:
        """Delay and loss of a cable that the kernel cannot give. Raises EnvironmentProblem between two switches."""
        host = self.plan.hosts.get(wire.a.node)
        if host is None:
            raise EnvironmentProblem(
                "this kernel has no netem, so a link between switches can have neither delay nor loss",
                where=f"link {wire.name}",
                hint="give them to the hosts' links: there the NIC's port plays them",
            )
        self.nic_impairments[host.name] = shaping.combined(host.nic.impair, wire.delay, wire.loss)
        self.limits.append(
            {
                "wanted": f"delay and loss of link {wire.name} by the kernel (netem)",
                "got": "by the NIC's port: they concern RDMA packets only",
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
        """Remove all of it, newest first. Goes on after a failure; raises RunFailed at the end, naming what stayed.

        Can be called again, also after an interrupt in the midst of it: a step counts as done when it has ended, so
        each must bear being repeated. What stayed is still in the state file, so `testbed clean` knows it.
        """
        left: list[str] = []
        while self._undo:
            what, undo = self._undo[-1]
            try:
                undo()
            except Exception as error:  # whatever it is: the rest must go too
                left.append(f"{what}: {error}")
            self._undo.pop()
        self.hosts = {}
        self._servers = []
        self._bridges = {}
        self._mininet = None
        if left:
            raise RunFailed(
                "not everything could be removed: " + "; ".join(left), where="network", hint="testbed clean"
            )

    def _release(self) -> None:
        """Give tag and slot back. The mount points go when the last run's folder has gone (`fixtures.clean`)."""
        (self.state.directory / "network.json").unlink(missing_ok=True)

    def __enter__(self) -> Network:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
