"""The OpenFlow 1.3 application: sends what `routes` decides, waits for barriers, answers ARP and neighbour discovery.

It runs unchanged on Ryu and on os-ken. The framework delivers events on the application's event thread; each connection
to the northbound socket has a thread, which takes `self._one_at_a_time`, sends, and sleeps until the event thread has
seen every barrier reply.

An IPv4 address and its companion IPv6 address (`testbed.base.ip6`) move together; requests name the IPv4 address.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeVar, cast

from testbed.base import ip6
from testbed.controller import framework, northbound
from testbed.controller.arp import ArpFrame, reply_to
from testbed.controller.datapath import FlowCache, FlowCacheError
from testbed.controller.discovery import SOLICITATION, Solicitation, advertise
from testbed.controller.fabric import Fabric
from testbed.controller.first_paths import FirstPaths
from testbed.controller.openflow import flow_mod, messages
from testbed.controller.routes import Change, RouteTable, Stage, side_by_side

fw = framework.loaded()
ofp, parser = fw.ofproto, fw.parser

ARP_PRIORITY: Final = 0xA000
"""Priority of the flows for ARP and neighbour discovery, above those of every address."""
BARRIER_TIMEOUT: Final = 10.0
"""Seconds to wait for a barrier reply. It takes milliseconds, or up to a second on a fully loaded machine."""
FOLLOW_TIMEOUT: Final = 10.0
"""Seconds to wait until the datapath follows its tables; it usually takes one to three milliseconds."""

log = logging.getLogger("testbed.controller")

Handler = TypeVar("Handler", bound=Callable[..., None])


def on(event: Any, states: Any) -> Callable[[Handler], Handler]:
    """The framework's decorator for event handlers, with a type annotation."""
    return cast("Callable[[Handler], Handler]", fw.handler.set_ev_cls(event, states))


class Reroute(fw.App):  # type: ignore[misc, name-defined]
    """The application; one instance per process. `__main__` sets the class attributes before it is created."""

    OFP_VERSIONS: ClassVar = [ofp.OFP_VERSION]
    fabric: ClassVar[Fabric]
    listener: ClassVar[Any]
    """The listening northbound socket."""
    flow_cache: ClassVar[FlowCache | None] = None
    """Flow cache of the Open vSwitch that has all bridges; if None, a barrier reply is the only confirmation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = RouteTable(self.fabric)
        self.datapaths: dict[str, Any] = {}
        self.ports: dict[str, dict[int, str]] = {}
        """Switch → OpenFlow port → interface, as announced by the switch."""
        self.first_paths = FirstPaths(self._install, self._missing, fw.hub)
        self.arp_answered = 0
        self._names = {dpid: name for name, dpid in self.fabric.switches.items()}
        self._one_at_a_time = threading.Lock()
        self._waiting: dict[tuple[str, int], threading.Event] = {}
        """(switch, xid) of a barrier request → event that is set by its reply."""
        self._confirmed: dict[tuple[str, int], float] = {}
        self._refused: dict[str, str] = {}
        """Switch → its last error message."""

    def start(self) -> None:
        """Start serving the northbound socket."""
        super().start()
        calls: dict[str, northbound.Call] = {
            "status": self.status,
            "topology": self.topology,
            "path": self.path,
            "prepare_move": self.prepare_move,
            "move": self.move,
            "undo_move": self.undo_move,
            "add_address": self.add_address,
        }
        fw.hub.spawn(northbound.serve, self.listener, calls, fw.hub.spawn)

    # -- from the switches

    @on(fw.ofp_event.EventOFPStateChange, [fw.handler.MAIN_DISPATCHER, fw.handler.DEAD_DISPATCHER])
    def on_state(self, event: Any) -> None:
        """A switch has finished its handshake, or its connection has ended."""
        datapath = event.datapath
        name = self._names.get(datapath.id)
        if name is None:
            if datapath.id is not None:
                log.warning("unknown switch with datapath id %#x", datapath.id)
            return
        if event.state == fw.handler.DEAD_DISPATCHER:
            if self.datapaths.get(name) is datapath:
                del self.datapaths[name]
                log.warning("%s: connection lost; its flows stay", name)
            return
        known = name in self.ports
        self.datapaths[name] = datapath
        if not known:
            # A bridge that this controller sees for the first time starts from nothing.
            everything = parser.OFPMatch()
            datapath.send_msg(flow_mod(datapath, ofp.OFPFC_DELETE, everything, 0, []))
        to_controller = [parser.OFPActionOutput(ofp.OFPP_CONTROLLER, ofp.OFPCML_NO_BUFFER)]
        for question in ({"eth_type": 0x0806}, {"eth_type": 0x86DD, "ip_proto": 58, "icmpv6_type": SOLICITATION}):
            match = parser.OFPMatch(**question)
            datapath.send_msg(flow_mod(datapath, ofp.OFPFC_ADD, match, ARP_PRIORITY, to_controller))
        for flow in self.table.flows_of(name):
            for message in messages(datapath, Change("added", flow)):
                datapath.send_msg(message)
        datapath.send_msg(parser.OFPPortDescStatsRequest(datapath, 0))
        log.info("%s: connected", name)

    @on(fw.ofp_event.EventOFPPortDescStatsReply, fw.handler.MAIN_DISPATCHER)
    def on_ports(self, event: Any) -> None:
        """A switch has listed its ports. Once every switch has, the first paths are installed."""
        name = self._names[event.msg.datapath.id]
        found = {port.port_no: port.name.decode(errors="replace").rstrip("\0") for port in event.msg.body}
        self.ports[name] = {**self.ports.get(name, {}), **found}
        self.first_paths.check()

    @on(fw.ofp_event.EventOFPPortStatus, fw.handler.MAIN_DISPATCHER)
    def on_port_status(self, event: Any) -> None:
        """A port has been added, changed or removed since the switch listed its ports."""
        name, port = self._names[event.msg.datapath.id], event.msg.desc
        if event.msg.reason == ofp.OFPPR_DELETE:
            self.ports.get(name, {}).pop(port.port_no, None)
        else:
            self.ports.setdefault(name, {})[port.port_no] = port.name.decode(errors="replace").rstrip("\0")
            self.first_paths.check()

    @on(fw.ofp_event.EventOFPBarrierReply, fw.handler.MAIN_DISPATCHER)
    def on_barrier(self, event: Any) -> None:
        """The switch has carried out everything that was sent to it before the barrier."""
        key = self._names[event.msg.datapath.id], event.msg.xid
        if waiting := self._waiting.pop(key, None):
            self._confirmed[key] = time.monotonic()
            waiting.set()

    @on(fw.ofp_event.EventOFPErrorMsg, [fw.handler.CONFIG_DISPATCHER, fw.handler.MAIN_DISPATCHER])
    def on_error(self, event: Any) -> None:
        """A switch has refused a message; the thread that sent it sees the refusal at the barrier that follows."""
        name = self._names.get(event.msg.datapath.id, "?")
        self._refused[name] = f"OpenFlow error type {event.msg.type}, code {event.msg.code}"
        log.error("%s: %s", name, self._refused[name])

    @on(fw.ofp_event.EventOFPPacketIn, fw.handler.MAIN_DISPATCHER)
    def on_packet(self, event: Any) -> None:
        """Answer a question for a MAC, the only kind of packet that switches send here.

        Questions for known addresses are answered from the table, all others are dropped; nothing is flooded.
        """
        message = event.msg
        answer = self._answer(message.data)
        if answer is None:
            return
        datapath = message.datapath
        datapath.send_msg(
            parser.OFPPacketOut(
                datapath=datapath,
                buffer_id=ofp.OFP_NO_BUFFER,
                in_port=ofp.OFPP_CONTROLLER,
                actions=[parser.OFPActionOutput(message.match["in_port"])],
                data=answer,
            )
        )
        self.arp_answered += 1

    def _answer(self, frame: bytes) -> bytes | None:
        """The answer to an ARP request or a neighbour solicitation; None if there is none to give."""
        request, question = ArpFrame.parse(frame), Solicitation.parse(frame)
        if request is not None and request.is_request:
            mac = self.table.mac_of(str(ipaddress.IPv4Address(request.target_ip)))
            return reply_to(request, mac) if mac is not None else None
        if question is not None:
            mac = self.table.mac_of(question.target_ip)
            return advertise(question, mac) if mac is not None else None
        return None

    # -- to the switches

    def _carry_out(self, stages: list[Stage]) -> list[dict[str, Any]]:
        """Send each stage to its switches, with a barrier to each, and wait for the replies before the next stage.

        Returns the changes with the times of their barrier replies. Raises Unready if a switch is not connected,
        refuses, or does not confirm in time.
        """
        done: list[dict[str, Any]] = []
        for stage in stages:
            waiting: dict[str, tuple[int, threading.Event]] = {}
            switches = sorted({change.flow.switch for change in stage})
            for switch in switches:
                datapath = self.datapaths.get(switch)
                if datapath is None:
                    raise northbound.Unready(f"{switch} is not connected")
                self._refused.pop(switch, None)
                for change in stage:
                    if change.flow.switch == switch:
                        for message in messages(datapath, change):
                            datapath.send_msg(message)
                barrier = parser.OFPBarrierRequest(datapath)
                datapath.set_xid(barrier)
                event = self._waiting[switch, barrier.xid] = threading.Event()
                waiting[switch] = barrier.xid, event
                datapath.send_msg(barrier)
            deadline = time.monotonic() + BARRIER_TIMEOUT
            for switch, (xid, event) in waiting.items():
                if not event.wait(max(0.0, deadline - time.monotonic())):
                    self._waiting.pop((switch, xid), None)
                    raise northbound.Unready(f"{switch} did not confirm within {BARRIER_TIMEOUT:g} s")
                at = self._confirmed.pop((switch, xid))
                if switch in self._refused:
                    raise northbound.Unready(f"{switch} refused: {self._refused[switch]}")
                changes = [change for change in stage if change.flow.switch == switch]
                self.table.confirm(changes)
                done += [{"action": change.action, **change.flow.to_plain(), "t": at} for change in changes]
        return done

    def _install(self) -> None:
        with self._one_at_a_time:
            self._carry_out([self.table.install()])

    def _missing(self) -> list[str]:
        """The switches and ports of the fabric that have not been announced yet, in words."""
        missing = [f"switch {name}" for name in self.fabric.switches if name not in self.datapaths]
        for name, ports in self.ports.items():
            for port, interface in self.fabric.expected_ports(name).items():
                if port not in ports:
                    missing.append(f"port {port} of {name}")
                elif interface and ports[port] != interface[:15]:
                    missing.append(f"port {port} of {name} ({ports[port]} instead of {interface})")
        return missing

    def _require_ready(self) -> None:
        if self.first_paths.ready_at is None:
            missing = ", ".join(self._missing())
            reason = f"missing {missing}" if missing else "the first paths are not confirmed yet"
            raise northbound.Unready(f"the network is not ready: {reason}")

    # -- northbound calls (docs/controller.md); parameter names are part of the interface

    def status(self) -> dict[str, Any]:
        """Readiness: which switches are connected and what is missing."""
        return {
            "framework": framework.version(fw.kind),
            "ready": self.first_paths.ready_at is not None,
            "ready_at": self.first_paths.ready_at,
            "switches": {name: name in self.datapaths for name in self.fabric.switches},
            "missing": self._missing(),
            "flows": sum(len(flows) for flows in self.table.installed.values()),
            "arp_answered": self.arp_answered,
        }

    def topology(self) -> dict[str, Any]:
        """The fabric, with the addresses at their current hosts."""
        hosts = {
            name: {
                "addresses": sorted(ip for ip, host in self.table.owner.items() if host == name),
                "mac": host.mac,
                "switch": host.switch,
                "port": host.port,
            }
            for name, host in self.fabric.hosts.items()
        }
        links = [[t.a, t.a_port, t.b, t.b_port] for t in self.fabric.trunks]
        return {"hosts": hosts, "switches": dict(self.fabric.switches), "links": links, "ports": self.ports}

    def path(self, from_host: str, ip: str) -> dict[str, Any]:
        """Names of the nodes on the path of a packet for `ip`, from `from_host` to the receiving host."""
        return {"path": self.table.path(from_host, ip)}

    def prepare_move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Add the new flows below the old ones; no packet changes its path yet."""
        with self._one_at_a_time:
            self._begin(ip)
            self._require_ready()
            flows = self._carry_out(self._prepare(ip, to_host))
        return {"prepared_at": time.monotonic(), "flows": flows}

    def move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Redirect packets for `ip` to `to_host`; prepares the move first if that has not been done."""
        with self._one_at_a_time:
            self._begin(ip)
            self._require_ready()
            return self._move(ip, to_host)

    def undo_move(self, ip: str) -> dict[str, Any]:
        """Undo the last preparation or move. Does nothing if there is none, so it may be called again."""
        with self._one_at_a_time:
            self._require_ready()
            now = time.monotonic()
            target = self.table.undo_target(ip)
            if target is None:
                return {"begun_at": now, "confirmed_at": now, "flows": []}
            answer = self._move(ip, target)
            self._begin(ip)
            return answer

    def add_address(self, ip: str, host: str) -> dict[str, Any]:
        """Add another address at `host`: install paths to it and answer ARP requests for it."""
        self._require_ready()
        with self._one_at_a_time:
            stages = [self.table.announce(ip, host)]
            if ":" not in ip:
                stages.append(self.table.announce(ip6.companion(ip), host))
            flows = self._carry_out(side_by_side(*stages))
        return {"confirmed_at": time.monotonic(), "flows": flows}

    def _both(self, ip: str) -> list[str]:
        """The address and its companion IPv6 address, if that one is known here."""
        try:
            return [address for address in ip6.both(ip) if address == ip or address in self.table.owner]
        except ValueError:  # Not an IPv4 address, so it has no companion; the table checks whether it is known.
            return [ip]

    def _begin(self, ip: str) -> None:
        for address in self._both(ip):
            self.table.begin(address)

    def _prepare(self, ip: str, to_host: str) -> list[Stage]:
        return side_by_side(*(self.table.prepare(address, to_host) for address in self._both(ip)))

    def _move(self, ip: str, to_host: str) -> dict[str, Any]:
        started_at = time.monotonic()
        flows = []
        if any(self.table.prepared.get(address) != to_host for address in self._both(ip)):
            flows += self._carry_out(self._prepare(ip, to_host))
        moves = {address: self.table.move(address, to_host) for address in self._both(ip)}
        flows += self._carry_out(side_by_side(*moves.values()))
        for address, stages in moves.items():
            self.table.moved(address, to_host)
            self._follow(address, stages)
        return {"begun_at": started_at, "confirmed_at": time.monotonic(), "flows": flows}

    def _follow(self, ip: str, stages: list[Stage]) -> None:
        """Wait until no cached flow for `ip` uses a port that its flows have left. Raises Unready after FOLLOW_TIMEOUT.

        Doing this once at the end is enough: a packet that a lagging cache sends to a switch that has already changed
        is turned back there, to an entry that the cache does not have yet.
        """
        left = {
            self.ports[change.flow.switch][change.flow.out_port]
            for stage in stages
            for change in stage
            if change.flow.out_port in self.ports[change.flow.switch] and self._has_left(change)
        }
        if self.flow_cache is None or not left:
            return
        deadline = time.monotonic() + FOLLOW_TIMEOUT
        try:
            while stale := self.flow_cache.outputs(ip) & left:
                if time.monotonic() > deadline:
                    raise northbound.Unready(f"the datapath still sends {ip} to {', '.join(sorted(stale))}")
                time.sleep(0.0003)
        except FlowCacheError as error:
            raise northbound.Unready(f"cannot read the flow cache: {error}") from error

    def _has_left(self, change: Change) -> bool:
        """Whether the switch no longer sends packets for the address out of that port."""
        now = self.table.effective(change.flow.switch, change.flow.address)
        return now is None or now.out_port != change.flow.out_port
