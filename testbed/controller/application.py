"""The OpenFlow 1.3 application: sends what `routes` decides, waits for barriers, answers ARP and neighbour discovery.

Runs unchanged on Ryu and on os-ken. The framework delivers events on this application's own event thread; requests from
the northbound socket arrive on threads of their own, take `self._one_at_a_time`, send, and sleep until the event thread
has seen every barrier reply.

An IPv4 address and the IPv6 address beside it (`testbed.base.ip6`) are moved together: requests name the former.
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
from testbed.controller.routes import Change, RouteTable, Stage, side_by_side

fw = framework.loaded()
ofp, parser = fw.ofproto, fw.parser

ARP_PRIORITY: Final = 0xA000
"""Above every address's flows."""
BARRIER_TIMEOUT: Final = 10.0
"""Seconds. A switch confirms within milliseconds; on a machine whose cores are all taken it may be a second."""
FOLLOW_TIMEOUT: Final = 10.0
"""Seconds. Until the datapath follows its tables; usually one to three milliseconds."""
COOKIE: Final = 0x6D6967726F73
"""Marks our flow entries ("migros")."""

log = logging.getLogger("testbed.controller")

Handler = TypeVar("Handler", bound=Callable[..., None])


def on(event: Any, states: Any) -> Callable[[Handler], Handler]:
    """The framework's decorator for event handlers, with a type."""
    return cast("Callable[[Handler], Handler]", fw.handler.set_ev_cls(event, states))


class Reroute(fw.App):  # type: ignore[misc, name-defined]
    """One instance per process. The launcher sets the class attributes before the framework makes it."""

    OFP_VERSIONS: ClassVar = [ofp.OFP_VERSION]
    fabric: ClassVar[Fabric]
    listener: ClassVar[Any]
    """Northbound socket, listening."""
    flow_cache: ClassVar[FlowCache | None] = None
    """Of the Open vSwitch that all switches are bridges of; None: a barrier reply is all the confirmation there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = RouteTable(self.fabric)
        self.datapaths: dict[str, Any] = {}
        self.ports: dict[str, dict[int, str]] = {}
        """Switch → OpenFlow port → interface, as the switch itself describes them."""
        self.first_paths = FirstPaths(self._install, self._missing, fw.hub)
        self.arp_answered = 0
        self._names = {dpid: name for name, dpid in self.fabric.switches.items()}
        self._one_at_a_time = threading.Lock()
        self._waiting: dict[tuple[str, int], threading.Event] = {}
        """(switch, xid) of a barrier request → set at its reply."""
        self._confirmed: dict[tuple[str, int], float] = {}
        self._refused: dict[str, str] = {}
        """Switch → the last error message from it."""

    def start(self) -> None:
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
                log.warning("switch with datapath id %#x is none of ours", datapath.id)
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
            datapath.send_msg(self._flow_mod(datapath, ofp.OFPFC_DELETE, everything, 0, []))
        to_controller = [parser.OFPActionOutput(ofp.OFPP_CONTROLLER, ofp.OFPCML_NO_BUFFER)]
        for question in ({"eth_type": 0x0806}, {"eth_type": 0x86DD, "ip_proto": 58, "icmpv6_type": SOLICITATION}):
            match = parser.OFPMatch(**question)
            datapath.send_msg(self._flow_mod(datapath, ofp.OFPFC_ADD, match, ARP_PRIORITY, to_controller))
        for flow in self.table.flows_of(name):
            for message in self._messages(datapath, Change("added", flow)):
                datapath.send_msg(message)
        datapath.send_msg(parser.OFPPortDescStatsRequest(datapath, 0))
        log.info("%s: connected", name)

    @on(fw.ofp_event.EventOFPPortDescStatsReply, fw.handler.MAIN_DISPATCHER)
    def on_ports(self, event: Any) -> None:
        """The ports that a switch has. Once all switches are there, the first paths go in."""
        name = self._names[event.msg.datapath.id]
        found = {port.port_no: port.name.decode(errors="replace").rstrip("\0") for port in event.msg.body}
        self.ports[name] = {**self.ports.get(name, {}), **found}
        self.first_paths.look()

    @on(fw.ofp_event.EventOFPPortStatus, fw.handler.MAIN_DISPATCHER)
    def on_port_status(self, event: Any) -> None:
        """A port has come or gone since."""
        name, port = self._names[event.msg.datapath.id], event.msg.desc
        if event.msg.reason == ofp.OFPPR_DELETE:
            self.ports.get(name, {}).pop(port.port_no, None)
        else:
            self.ports.setdefault(name, {})[port.port_no] = port.name.decode(errors="replace").rstrip("\0")
            self.first_paths.look()

    @on(fw.ofp_event.EventOFPBarrierReply, fw.handler.MAIN_DISPATCHER)
    def on_barrier(self, event: Any) -> None:
        """All that was sent to this switch before has been carried out."""
        key = self._names[event.msg.datapath.id], event.msg.xid
        if waiting := self._waiting.pop(key, None):
            self._confirmed[key] = time.monotonic()
            waiting.set()

    @on(fw.ofp_event.EventOFPErrorMsg, [fw.handler.CONFIG_DISPATCHER, fw.handler.MAIN_DISPATCHER])
    def on_error(self, event: Any) -> None:
        """A switch has refused something; the barrier that follows tells the one who asked."""
        name = self._names.get(event.msg.datapath.id, "?")
        self._refused[name] = f"OpenFlow error type {event.msg.type}, code {event.msg.code}"
        log.error("%s: %s", name, self._refused[name])

    @on(fw.ofp_event.EventOFPPacketIn, fw.handler.MAIN_DISPATCHER)
    def on_packet(self, event: Any) -> None:
        """Only questions for MACs come here. Known addresses are answered from the table, the rest is dropped: nothing
        is flooded."""
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
        """What to say to a question for a MAC."""
        request, question = ArpFrame.parse(frame), Solicitation.parse(frame)
        if request is not None and request.is_request:
            mac = self.table.mac_of(str(ipaddress.IPv4Address(request.target_ip)))
            return reply_to(request, mac) if mac is not None else None
        if question is not None:
            mac = self.table.mac_of(question.target_ip)
            return advertise(question, mac) if mac is not None else None
        return None

    # -- to the switches

    def _flow_mod(self, datapath: Any, command: int, match: Any, priority: int, actions: list[Any]) -> Any:
        deletes = command in (ofp.OFPFC_DELETE, ofp.OFPFC_DELETE_STRICT)
        apply = [] if deletes else [parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, actions)]
        return parser.OFPFlowMod(
            datapath=datapath,
            cookie=0 if deletes else COOKIE,
            command=command,
            priority=priority,
            match=match,
            instructions=apply,
            out_port=ofp.OFPP_ANY,
            out_group=ofp.OFPG_ANY,
        )

    def _messages(self, datapath: Any, change: Change) -> list[Any]:
        """The flow-mods of one change. A companion entry comes after its flow and goes before it."""
        flow = change.flow
        rewrite = [parser.OFPActionSetField(eth_dst=flow.eth_dst)] if flow.eth_dst else []
        field, address = flow.match
        match = {"eth_type": 0x0800 if field == "ipv4_dst" else 0x86DD, field: address}
        onward = [*rewrite, parser.OFPActionOutput(flow.out_port)]
        back = [*rewrite, parser.OFPActionOutput(ofp.OFPP_IN_PORT)]
        entries = [
            (parser.OFPMatch(**match), flow.priority, onward),
            (parser.OFPMatch(in_port=flow.out_port, **match), flow.priority + 1, back),
        ]
        if change.action == "added":
            return [self._flow_mod(datapath, ofp.OFPFC_ADD, *entry) for entry in entries]
        return [self._flow_mod(datapath, ofp.OFPFC_DELETE_STRICT, *entry) for entry in reversed(entries)]

    def _carry_out(self, stages: list[Stage]) -> list[dict[str, Any]]:
        """Each stage to its switches, a barrier to each, then the next stage.

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
                        for message in self._messages(datapath, change):
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
        """What the fabric promises and no switch has announced."""
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
            raise northbound.Unready(f"not ready: {', '.join(self._missing()) or 'first paths not confirmed yet'}")

    # -- northbound calls (docs/controller.md); parameter names are part of the interface

    def status(self) -> dict[str, Any]:
        """What is connected, what is missing."""
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
        """The fabric, with the addresses where they are now."""
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
        """Names on the way of a packet for `ip`, `from_host` and the receiving host included."""
        return {"path": self.table.path(from_host, ip)}

    def prepare_move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Put the new flows beneath the old ones; no packet takes another way yet."""
        with self._one_at_a_time:
            self._begin(ip)
            self._require_ready()
            flows = self._carry_out(self._prepare(ip, to_host))
        return {"prepared_at": time.monotonic(), "flows": flows}

    def move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Let packets for `ip` go to `to_host`; prepares first if that has not been done."""
        with self._one_at_a_time:
            self._begin(ip)
            self._require_ready()
            return self._move(ip, to_host)

    def undo_move(self, ip: str) -> dict[str, Any]:
        """Take the last preparation or move back. A second call finds nothing to undo."""
        with self._one_at_a_time:
            self._require_ready()
            begun = time.monotonic()
            target = self.table.undo_target(ip)
            if target is None:
                return {"begun_at": begun, "confirmed_at": begun, "flows": []}
            answer = self._move(ip, target)
            self._begin(ip)
            return answer

    def add_address(self, ip: str, host: str) -> dict[str, Any]:
        """A further address at `host`: paths to it and ARP answers for it."""
        self._require_ready()
        with self._one_at_a_time:
            stages = [self.table.announce(ip, host)]
            if ":" not in ip:
                stages.append(self.table.announce(ip6.companion(ip), host))
            flows = self._carry_out(side_by_side(*stages))
        return {"confirmed_at": time.monotonic(), "flows": flows}

    def _both(self, ip: str) -> list[str]:
        """An address and the one beside it, as far as they are known here."""
        try:
            return [address for address in ip6.both(ip) if address == ip or address in self.table.owner]
        except ValueError:  # no IPv4 address: there is none beside it, and the table says whether it knows it
            return [ip]

    def _begin(self, ip: str) -> None:
        for address in self._both(ip):
            self.table.begin(address)

    def _prepare(self, ip: str, to_host: str) -> list[Stage]:
        return side_by_side(*(self.table.prepare(address, to_host) for address in self._both(ip)))

    def _move(self, ip: str, to_host: str) -> dict[str, Any]:
        begun = time.monotonic()
        flows = []
        if any(self.table.prepared.get(address) != to_host for address in self._both(ip)):
            flows += self._carry_out(self._prepare(ip, to_host))
        moves = {address: self.table.move(address, to_host) for address in self._both(ip)}
        flows += self._carry_out(side_by_side(*moves.values()))
        for address, stages in moves.items():
            self.table.moved(address, to_host)
            self._follow(address, stages)
        return {"begun_at": begun, "confirmed_at": time.monotonic(), "flows": flows}

    def _follow(self, ip: str, stages: list[Stage]) -> None:
        """Until no cached flow for `ip` uses a port that its flows have left. Raises Unready after FOLLOW_TIMEOUT.

        Once at the end is enough: a packet that a lagging cache sends to a switch which has changed already is turned
        back there, into an entry that the cache does not have yet.
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
        """The switch does not send the address out of that port any more."""
        now = self.table.effective(change.flow.switch, change.flow.address)
        return now is None or now.out_port != change.flow.out_port
