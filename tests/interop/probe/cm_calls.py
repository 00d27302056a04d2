"""Commands of /dev/infiniband/rdma_cm as they are (rdma/rdma_user_cm.h), right and wrong, in every state of an id.

Run like calls.py: one line for each command, its result or its errno, and one for the events that it brought. The ends
of a connection are both in this process, so that nothing depends on who is the other machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

(
    CREATE_ID, DESTROY_ID, BIND_IP, RESOLVE_IP, RESOLVE_ROUTE, QUERY_ROUTE, CONNECT, LISTEN, ACCEPT, REJECT, DISCONNECT,
    INIT_QP_ATTR, GET_EVENT, _, SET_OPTION, NOTIFY, JOIN_IP_MCAST, LEAVE_MCAST, MIGRATE_ID, QUERY, BIND, RESOLVE_ADDR,
    JOIN_MCAST,
) = range(23)  # fmt: skip
TCP, UDP, IPOIB, IB = 0x106, 0x111, 0x2, 0x13F
EVENTS = [
    "ADDR_RESOLVED", "ADDR_ERROR", "ROUTE_RESOLVED", "ROUTE_ERROR", "CONNECT_REQUEST", "CONNECT_RESPONSE",
    "CONNECT_ERROR", "UNREACHABLE", "REJECTED", "ESTABLISHED", "DISCONNECTED", "DEVICE_REMOVAL", "MULTICAST_JOIN",
    "MULTICAST_ERROR", "ADDR_CHANGE", "TIMEWAIT_EXIT",
]  # fmt: skip
WITH_PARAMETERS = {"CONNECT_REQUEST", "CONNECT_RESPONSE", "ESTABLISHED", "REJECTED", "MULTICAST_JOIN"}
AF_IB = 27
MOMENT = 0.02
"""Seconds without an event after which no more are expected, once a message has made its way there and back."""
LONG = 3.0


def own(family: str) -> str:
    """This end's address."""
    words = ["ip", f"-{family}", "-o", "address", "show", "dev", "eth0", "scope", "global"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[3].partition("/")[0]


OWN4, OWN6 = own("4"), own("6")
SUBNET = OWN4.rpartition(".")[0]


def name_of(error: OSError) -> str:
    """The name of an error's number."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def address(text: str, port: int = 0, scope: int = 0) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    if ":" not in text:
        return struct.pack("<H2s4s8x", socket.AF_INET, port.to_bytes(2, "big"), socket.inet_aton(text))
    packed = socket.inet_pton(socket.AF_INET6, text)
    return struct.pack("<H2s4x16sI", socket.AF_INET6, port.to_bytes(2, "big"), packed, scope)


QPNS = count(0x1000)
"""One that was seen before is a stale connection to the kernel."""


def parameters(private: bytes = b"", valid: int = 1, **more: int) -> bytes:
    """struct rdma_ucm_conn_param."""
    fields = {"srq": 0, "responder": 1, "initiator": 1, "flow": 0, "retry": 5, "rnr": 6, **more}
    qpn, length = fields.pop("qpn", 0) or next(QPNS), fields.pop("length", len(private))
    return struct.pack("<II256s8B", qpn, 0, private, length, *fields.values(), valid)


class Event(NamedTuple):
    """One event: whose it is, its name, and everything of it that is the same in each run."""

    uid: int
    handle: int
    kind: str
    text: str


class Cm:
    """One open of rdma_cm."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/infiniband/rdma_cm", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._answer = ctypes.create_string_buffer(1024)
        self.room = ctypes.addressof(self._answer)
        self._command = ctypes.create_string_buffer(4096)
        self._uid = 0

    def command(self, number: int, body: bytes = b"", out: int = 0) -> bytes:
        """Write one command whose body names `room` for its answer. Raises OSError."""
        self.write(struct.pack("<IHH", number, len(body), out) + body)
        return self._answer.raw[:out]

    def write(self, message: bytes) -> None:
        """Zeros follow what is written: the kernel reads whole structures, however little was written."""
        ctypes.memset(self._command, 0, 4096)
        self._command[: len(message)] = message
        os.write(self.fd, memoryview(self._command)[: len(message)])

    def say(self, name: str, number: int, body: bytes = b"", out: int = 0) -> bytes | None:
        """Make a command and print what comes of it; its answer, or None."""
        try:
            answer = self.command(number, body, out)
        except OSError as error:
            print(f"{name}: {name_of(error)}")
            return None
        print(f"{name}: ok")
        return answer

    def create(self, space: int = TCP, kind: int = 2) -> int:
        """A new id's handle."""
        self._uid += 1
        return self.handle(CREATE_ID, struct.pack("<QQHB5x", self._uid, self.room, space, kind))

    def handle(self, number: int, body: bytes) -> int:
        """A command that answers with a number."""
        return int(struct.unpack("<I", self.command(number, body, 4))[0])

    def destroy(self, *handles: int) -> None:
        """Forget ids; those that have gone already are fine."""
        for handle in handles:
            try:
                self.command(DESTROY_ID, struct.pack("<QII", self.room, handle, 0), 4)
            except OSError:
                continue

    def event(self, wait: float = LONG) -> Event | None:
        """The next event, if one comes within `wait` seconds."""
        if not select.select([self.fd], [], [], wait)[0]:
            return None
        raw = self.command(GET_EVENT, struct.pack("<Q", self.room), 336)
        uid, handle, kind, status = struct.unpack_from("<QIIi", raw)
        text = f"{EVENTS[kind]} {status}"
        if EVENTS[kind] in WITH_PARAMETERS:
            text += f" {parameters_of(raw[20:324])} ECE {raw[328:336].hex()}"
        return Event(uid, handle, EVENTS[kind], text)

    def events(self, wait: float = MOMENT) -> list[Event]:
        """Those that come, until none has come for `wait` seconds."""
        found = []
        while (event := self.event(wait)) is not None:
            found.append(event)
        return found

    def settled(self) -> list[Event]:
        """What came before a connection to nobody, asked for now, was refused, and a moment later."""
        handle = self.create()
        uid, found = self._uid, []
        bind(self, handle, address(OWN4, 7090))
        for step, number, body in (
            ("ADDR_RESOLVED", RESOLVE_ADDR, towards(address(OWN4, 7099))(self, handle)),
            ("ROUTE_RESOLVED", RESOLVE_ROUTE, struct.pack("<II", handle, 2000)),
            ("REJECTED", CONNECT, parameters() + struct.pack("<IIII", handle, 0, 0, 0)),
        ):
            self.command(number, body)
            while (event := self.event()) is not None and event.uid != uid:
                found.append(event)
            assert event is not None, f"no {step}"
            assert event.kind == step, event
        self.destroy(handle)
        return found + self.events()

    def want(self, kind: str) -> Event:
        """The next event, which must be of that kind."""
        event = self.event()
        if event is None or event.kind != kind:
            raise AssertionError(f"expected {kind}, came {event}")
        return event


def parameters_of(raw: bytes) -> str:
    """What an event says, but for queue pair numbers; datagrams' events have a structure of their own."""
    qpn, qkey, private, length, *rest = struct.unpack_from("<II256s8B", raw)
    if any(rest[:-1]) or not any(raw[8:40]) or length > 31:
        return f"qpn {qpn > 0} qkey {qkey:#x} private {length} {private.rstrip(bytes(1)).hex()} {rest[:-1]}"
    return f"datagrams qpn {qpn > 0} qkey {qkey:#x}"


# --- ids in each state: (what the commands are about, everything to be destroyed) ---


def bind(cm: Cm, handle: int, to: bytes) -> None:
    cm.command(BIND, struct.pack("<IHH128s", handle, len(to), 0, to))


def resolve(cm: Cm, handle: int, to: bytes, source: bytes = b"", timeout: int = 300) -> None:
    cm.command(RESOLVE_ADDR, struct.pack("<IIHHI128s128s", handle, timeout, len(source), len(to), 0, source, to))


def idle(cm: Cm, space: int = TCP) -> list[int]:
    return [cm.create(space)]


def bound(cm: Cm, space: int = TCP) -> list[int]:
    made = idle(cm, space)
    bind(cm, made[0], address(OWN4, 7001))
    return made


def bound_to_any(cm: Cm, space: int = TCP) -> list[int]:
    made = idle(cm, space)
    bind(cm, made[0], address("0.0.0.0", 7001))
    return made


def resolved(cm: Cm, space: int = TCP) -> list[int]:
    made = bound(cm, space)
    resolve(cm, made[0], address(OWN4, 7002))
    cm.want("ADDR_RESOLVED")
    return made


def routed(cm: Cm, space: int = TCP) -> list[int]:
    made = resolved(cm, space)
    cm.command(RESOLVE_ROUTE, struct.pack("<II", made[0], 2000))
    cm.want("ROUTE_RESOLVED")
    return made


def listening(cm: Cm, space: int = TCP) -> list[int]:
    made = idle(cm, space)
    bind(cm, made[0], address(OWN4, 7002))
    cm.command(LISTEN, struct.pack("<Ii", made[0], 3))
    return made


def requested(cm: Cm, space: int = TCP) -> list[int]:
    """The server's new id; then the client, the listener."""
    listener = listening(cm, space)
    client = routed(cm, space)
    cm.command(CONNECT, parameters(b"hello", srq=1) + struct.pack("<IIII", client[0], 0, 0, 0))
    child = cm.want("CONNECT_REQUEST").handle
    return [child, *client, *listener]


def connecting(cm: Cm, space: int = TCP) -> list[int]:
    child, client, listener = requested(cm, space)
    return [client, child, listener]


def accept(cm: Cm, handle: int, param: bytes) -> None:
    cm.command(ACCEPT, struct.pack("<Q", 77) + param + struct.pack("<IIII", handle, 0, 0, 0))


def accepted(cm: Cm, space: int = TCP) -> list[int]:
    """The server's id, which waits for the client to say that it is ready: no queue pair of rdma_cm's here."""
    child, client, listener = requested(cm, space)
    accept(cm, child, parameters(b"welcome"))
    cm.want("ESTABLISHED" if space == UDP else "CONNECT_RESPONSE")
    return [child, client, listener]


def responded(cm: Cm, space: int = TCP) -> list[int]:
    child, client, listener = accepted(cm, space)
    return [client, child, listener]


def connected(cm: Cm, space: int = TCP) -> list[int]:
    made = responded(cm, space)
    if space == TCP:
        cm.command(ACCEPT, struct.pack("<Q", 0) + parameters(valid=0) + struct.pack("<IIII", made[0], 0, 0, 0))
        cm.want("ESTABLISHED")
    return made


def disconnected(cm: Cm, space: int = TCP) -> list[int]:
    made = connected(cm, space)
    cm.command(DISCONNECT, struct.pack("<I", made[0]))
    cm.settled()
    return made


STATES = (
    idle, bound, bound_to_any, resolved, routed, listening, requested, connecting, accepted, responded, connected,
    disconnected,
)  # fmt: skip


ENGAGED = (connecting, accepted, responded, connected, disconnected)
ANSWERS = ("ACCEPT", "REJECT", "DISCONNECT", "DESTROY")
"""Deeds that are left out there: Linux 6.1 may wait more than a minute in the DESTROY_ID that follows."""


# --- commands on one id ---


def option(level: int, name: int, value: bytes) -> Callable[[Cm, int], bytes]:
    kept = ctypes.create_string_buffer(value, max(len(value), 1))
    commands.append(kept)
    pointer = ctypes.addressof(kept)
    return lambda _, handle: struct.pack("<QIIII", pointer, handle, level, name, len(value))


commands: list[Any] = []
"""What options point to stays in memory."""


def with_parameters(param: Callable[[], bytes], accepting: bool) -> Callable[[Cm, int], bytes]:
    head = struct.pack("<Q", 88) if accepting else b""
    return lambda _, handle: head + param() + struct.pack("<IIII", handle, 0, 0, 0)


def to_address(to: bytes) -> Callable[[Cm, int], bytes]:
    return lambda _, handle: struct.pack("<IHH128s", handle, len(to), 0, to)


def towards(to: bytes, source: bytes = b"") -> Callable[[Cm, int], bytes]:
    return lambda _, handle: struct.pack("<IIHHI128s128s", handle, 300, len(source), len(to), 0, source, to)


def plain(layout: str, *more: Any) -> Callable[[Cm, int], bytes]:
    return lambda _, handle: struct.pack(layout, handle, *more)


def answered(layout: str, *more: Any) -> Callable[[Cm, int], bytes]:
    return lambda cm, handle: struct.pack(layout, cm.room, handle, *more)


def group(cm: Cm, handle: int) -> bytes:
    to = address("239.1.2.3")
    return struct.pack("<QQIHH128s", cm.room, 99, handle, len(to), 0, to)


class Deed(NamedTuple):
    """A command: its number, its body for an id, the bytes of its answer."""

    number: int
    body: Callable[[Cm, int], bytes]
    out: int = 0


DEEDS: dict[str, Deed] = {
    "BIND": Deed(BIND, to_address(address(OWN4, 7003))),
    "BIND_IP": Deed(BIND_IP, lambda cm, handle: struct.pack("<Q28sI", cm.room, address(OWN4, 7003), handle)),
    "RESOLVE_ADDR": Deed(RESOLVE_ADDR, towards(address(OWN4, 7002))),
    "RESOLVE_IP": Deed(RESOLVE_IP, lambda _, handle: struct.pack("<28s28sII", b"", address(OWN4, 7002), handle, 300)),
    "RESOLVE_ROUTE": Deed(RESOLVE_ROUTE, plain("<II", 2000)),
    "RESOLVE_ROUTE in no time": Deed(RESOLVE_ROUTE, plain("<II", 0)),
    "LISTEN": Deed(LISTEN, plain("<Ii", 5)),
    "CONNECT": Deed(CONNECT, with_parameters(lambda: parameters(), False)),
    "CONNECT not valid": Deed(CONNECT, with_parameters(lambda: parameters(valid=0), False)),
    "CONNECT without ECE": Deed(CONNECT, lambda _, handle: parameters() + struct.pack("<II", handle, 0)),
    "CONNECT with much private data": Deed(CONNECT, with_parameters(lambda: parameters(bytes(57)), False)),
    "ACCEPT": Deed(ACCEPT, with_parameters(lambda: parameters(), True)),
    "ACCEPT not valid": Deed(ACCEPT, with_parameters(lambda: parameters(valid=0), True)),
    "ACCEPT with much private data": Deed(ACCEPT, with_parameters(lambda: parameters(bytes(197)), True)),
    "REJECT": Deed(REJECT, plain("<IBBxx256s", 3, 28, b"why")),
    "REJECT reason 0": Deed(REJECT, plain("<IBBxx256s", 3, 0, b"why")),
    "REJECT reason 8": Deed(REJECT, plain("<IBBxx256s", 3, 8, b"why")),
    "REJECT reason 35": Deed(REJECT, plain("<IBBxx256s", 3, 35, b"why")),
    "REJECT with much private data": Deed(REJECT, plain("<IBBxx256s", 149, 28, b"why")),
    "DISCONNECT": Deed(DISCONNECT, plain("<I")),
    "NOTIFY": Deed(NOTIFY, plain("<II", 4)),
    "NOTIFY another event": Deed(NOTIFY, plain("<II", 3)),
    "QUERY_ROUTE": Deed(QUERY_ROUTE, answered("<QII", 0), 208),
    **{f"QUERY {what}": Deed(QUERY, answered("<QII", what), 304) for what in range(4)},
    **{f"INIT_QP_ATTR {state}": Deed(INIT_QP_ATTR, answered("<QII", state), 152) for state in range(8)},
    "SET_OPTION class": Deed(SET_OPTION, option(0, 0, b"\x20")),
    "SET_OPTION reuse": Deed(SET_OPTION, option(0, 1, b"\1\0\0\0")),
    "SET_OPTION family only": Deed(SET_OPTION, option(0, 2, b"\1\0\0\0")),
    "SET_OPTION ACK timeout": Deed(SET_OPTION, option(0, 3, b"\x0e")),
    "JOIN_MCAST": Deed(JOIN_MCAST, group, 4),
    "MIGRATE_ID": Deed(MIGRATE_ID, lambda cm, handle: struct.pack("<QII", cm.room, handle, cm.fd), 4),
    "DESTROY_ID": Deed(DESTROY_ID, answered("<QII", 0), 4),
}


def fields(deed: Deed, answer: bytes) -> str:
    """What an answer says, but for addresses and numbers of the device."""
    if deed.number == INIT_QP_ATTR:
        mask, state, _, mtu, _, qkey, rq_psn, sq_psn, dest, access = struct.unpack_from("<10I", answer)
        gid, flow, index, hops, tclass = struct.unpack_from("<16sIBBB", answer, 40)
        tail = struct.unpack_from("<IHH11B", answer, 104 + 16)
        return (
            f"mask {mask:#x} state {state} mtu {mtu} qkey {qkey:#x} access {access} dest {dest > 0} "
            f"psn {rq_psn > 0} {sq_psn > 0} gid {any(gid)} flow {flow:#x} index {index > 0} hops {hops} class {tclass} "
            f"tail {tail}"
        )
    if deed.number == QUERY_ROUTE:
        count, port = struct.unpack_from("<IB", answer, 8 + 128 + 56)
        return f"paths {count} port {port} guid {any(answer[:8])} path {answer[40:72].hex()}"
    if deed.number == QUERY and deed.body(CM, 0)[12] == 1:
        (count,) = struct.unpack_from("<I", answer)
        return f"paths {count}" + (f" {answer[8:16].hex()} {answer[60:80].hex()}" if count else "")
    if deed.number == QUERY:
        guid, port, pkey, sizes = answer[:8], answer[8], struct.unpack_from("<H", answer, 10)[0], answer[12:16].hex()
        ends = [answer[at : at + 4].hex() for at in (16, 144)]
        return f"guid {any(guid)} port {port} pkey {pkey:#x} sizes {sizes} ends {ends}"
    return ""


CM: Cm


def states(cm: Cm) -> None:
    """Every command on an id in every state."""
    for space, label in ((TCP, ""), (UDP, " of datagrams")):
        for make in STATES:
            if space == UDP and make in (accepted, responded, disconnected):
                continue
            for name, deed in DEEDS.items():
                if make in ENGAGED and name.startswith(ANSWERS):
                    continue
                one(cm, f"{make.__name__.replace('_', ' ')}{label}, {name}", make, space, deed)


def one(cm: Cm, name: str, make: Callable[[Cm, int], list[int]], space: int, deed: Deed) -> None:
    """One command on one fresh id."""
    made = make(cm, space)
    answer = cm.say(name, deed.number, deed.body(cm, made[0]), deed.out)
    print(f"{name}, answer: {fields(deed, answer) if answer is not None else None}")
    found = cm.settled()
    cm.destroy(*made, *(event.handle for event in found if event.kind == "CONNECT_REQUEST"))
    found += cm.events(0.02)
    print(f"{name}, events: {sorted(event.text for event in found)}")


def shapes(cm: Cm) -> None:
    """Headers and bodies that are cut, and commands that are none."""
    handle = cm.create()
    for number in (13, 23, 24, 100, 0xFFFFFFFF):
        cm.say(f"command {number}", number, bytes(64), 64)
    for name, deed in DEEDS.items():
        body = deed.body(cm, handle)
        cm.say(f"{name}, a byte short", deed.number, body[:-1], deed.out)
        if deed.out:
            cm.say(f"{name}, without room", deed.number, body, 0)
        cm.say(f"{name} of nothing", deed.number, deed.body(cm, 0x7FFFFFF0), deed.out)
    for size in (0, 4, 7):
        try:
            cm.write(bytes(size))
            print(f"{size} bytes: ok")
        except OSError as error:
            print(f"{size} bytes: {name_of(error)}")
    try:
        cm.write(struct.pack("<IHH", LISTEN, 64, 0) + bytes(8))
        print("longer in its header: ok")
    except OSError as error:
        print(f"longer in its header: {name_of(error)}")
    cm.say("GET_EVENT of none", GET_EVENT, struct.pack("<Q", cm.room), 336)
    cm.say("GET_EVENT without room", GET_EVENT, struct.pack("<Q", cm.room), 100)
    other = Cm()
    for name, deed in DEEDS.items():
        other.say(f"{name} of another file's", deed.number, deed.body(other, cm.create()), deed.out)
    os.close(other.fd)


def kinds(cm: Cm) -> None:
    """Port spaces and types of queue pairs."""
    for space in (0, TCP, UDP, IPOIB, IB, 0x105, 0xFFFF):
        for kind in range(10):
            cm.say(f"CREATE_ID {space:#x} {kind}", CREATE_ID, struct.pack("<QQHB5x", 1, cm.room, space, kind), 4)


PLACES = {
    "any": address("0.0.0.0"), "any IPv6": address("::"), "own": address(OWN4), "own IPv6": address(OWN6),
    "loopback": address("127.0.0.1"), "loopback IPv6": address("::1"), "nobody's": address(SUBNET + ".77"),
    "no route": address("192.0.2.1"), "no route IPv6": address("2001:db8::1"), "broadcast": address("255.255.255.255"),
    "subnet's broadcast": address(SUBNET + ".255"), "group": address("239.1.2.3"), "group IPv6": address("ff0e::7"),
    "link local": address("fe80::77"), "link local with a scope": address("fe80::77", 0, 1),
    "InfiniBand": struct.pack("<HHI16sQQQ", AF_IB, 0xFFFF, 0, bytes(16), 0, 0, 0),
    "no family": bytes(28), "unknown family": struct.pack("<H26x", 99), "UNIX": struct.pack("<H26x", 1),
    "short": address(OWN4)[:8], "mapped": address("::ffff:" + OWN4),
}  # fmt: skip


def places(cm: Cm) -> None:
    """Binding to and resolving addresses of every kind."""
    for space, label in ((TCP, ""), (UDP, " of datagrams")):
        for name, to in PLACES.items():
            made = idle(cm, space)
            cm.say(f"BIND to {name}{label}", BIND, to_address(to)(cm, made[0]))
            cm.say(f"BIND to {name}{label}, then LISTEN", LISTEN, struct.pack("<Ii", made[0], 1))
            cm.destroy(*made)
            made = idle(cm, space)
            body = struct.pack("<Q28sI", cm.room, to[:28], made[0])
            cm.say(f"BIND_IP to {name}{label}", BIND_IP, body)
            cm.destroy(*made)
            for source in ("", "own", "own IPv6", "any", "loopback", "nobody's"):
                made = idle(cm, space)
                line = f"RESOLVE_ADDR of {name}{label} from {source or 'nowhere'}"
                started = time.monotonic()
                begin = cm.say(line, RESOLVE_ADDR, towards(to, PLACES.get(source, b""))(cm, made[0])) is not None
                event = cm.event(1.0) if begin else None
                print(f"{line}, event: {event and event.text} {time.monotonic() - started > 0.25}")
                route = f"{line}, RESOLVE_ROUTE"
                if event is not None and event.kind == "ADDR_RESOLVED":
                    cm.say(route, RESOLVE_ROUTE, struct.pack("<II", made[0], 300))
                    print(f"{route}, events: {[found.text for found in cm.events(0.1)]}")
                else:
                    print(f"{route}: not asked for\n{route}, events: none")
                cm.destroy(*made)


def ports(cm: Cm) -> None:
    """Who may have a port that somebody has."""
    ends = {"any": "0.0.0.0", "own": OWN4, "any IPv6": "::", "own IPv6": OWN6}
    set_reuse, set_only = DEEDS["SET_OPTION reuse"], DEEDS["SET_OPTION family only"]
    for first, begin in ends.items():
        for second, other in ends.items():
            for flags in ("", "reuse", "only", "reuse, listening", "spaces"):
                made = [cm.create(), cm.create(UDP if flags == "spaces" else TCP)]
                for handle in made:
                    if flags.startswith("reuse"):
                        cm.command(set_reuse.number, set_reuse.body(cm, handle))
                    if flags == "only" and ":" in (begin if handle == made[0] else other):
                        cm.command(set_only.number, set_only.body(cm, handle))
                bind(cm, made[0], address(begin, 7010))
                if flags.endswith("listening"):
                    cm.command(LISTEN, struct.pack("<Ii", made[0], 1))
                line = f"BIND to {second} beside {first} {flags}"
                cm.say(line, BIND, to_address(address(other, 7010))(cm, made[1]))
                cm.say(f"{line}, then LISTEN", LISTEN, struct.pack("<Ii", made[1], 1))
                cm.destroy(*made)
    made = idle(cm)
    cm.say("BIND to a low port", BIND, to_address(address(OWN4, 80))(cm, made[0]))
    cm.destroy(*made)


def options(cm: Cm) -> None:
    """Options' levels, names, sizes and values."""
    for level in (0, 1, 2):
        for number in range(6):
            for size in (0, 1, 2, 4, 8):
                for value in (0, 1, 0x1F, 0x20, 0xFF):
                    if value and not size:
                        continue
                    made = idle(cm)
                    body = option(level, number, value.to_bytes(size, "little") if size else b"")(cm, made[0])
                    cm.say(f"SET_OPTION {level} {number} {size} bytes {value}", SET_OPTION, body)
                    cm.destroy(*made)
    for size in (0, 8, 72, 100000):
        made = idle(cm)
        kept = ctypes.create_string_buffer(100000)
        body = struct.pack("<QIIII", ctypes.addressof(kept), made[0], 1, 1, size)
        cm.say(f"SET_OPTION path of {size} bytes", SET_OPTION, body)
        cm.say(f"SET_OPTION elsewhere of {size} bytes", SET_OPTION, struct.pack("<QIIII", 8, made[0], 0, 1, size))
        cm.destroy(*made)


def connections(cm: Cm) -> None:
    """What both ends learn of a connection: parameters, private data, reasons, ECE."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "private data": ({"private": bytes(range(1, 57))}, {"private": bytes(range(1, 197))}),
        "depths": ({"responder": 9, "initiator": 4}, {"responder": 3, "initiator": 2}),
        "deep": ({"responder": 255, "initiator": 255}, {"responder": 255, "initiator": 255}),
        "none": ({"responder": 0, "initiator": 0}, {"responder": 0, "initiator": 0}),
        "flow control": ({"flow": 1, "srq": 1}, {"flow": 1, "srq": 1}),
        "flow control, much": ({"flow": 2, "srq": 9}, {"flow": 2, "srq": 9}),
        "counts": ({"retry": 255, "rnr": 255}, {"retry": 9, "rnr": 9}),
        "no counts": ({"retry": 0, "rnr": 0}, {"retry": 0, "rnr": 0}),
        "wide QPN": ({"qpn": 0xFF123456}, {"qpn": 0xFF123457}),
    }  # fmt: skip
    for name, (client, server) in cases.items():
        for ece in (struct.pack("<II", 0, 0), struct.pack("<II", 0x12345678, 0x9ABCDEF0)):
            ends = listening(cm) + routed(cm)
            label = f"connection, {name}, ECE {ece.hex()}"
            cm.say(f"{label}, CONNECT", CONNECT, parameters(**client) + struct.pack("<II", ends[1], 0) + ece)
            request = cm.event()
            print(f"{label}, request: {request and request.text}")
            if request is not None and request.kind == "CONNECT_REQUEST":
                ends.append(request.handle)
                for state in (1, 2, 3):
                    shown(cm, f"{label}, server INIT_QP_ATTR {state}", ends[2], f"INIT_QP_ATTR {state}")
                body = struct.pack("<Q", 5) + parameters(**server) + struct.pack("<II", ends[2], 0) + ece
                cm.say(f"{label}, ACCEPT", ACCEPT, body)
                print(f"{label}, response: {[event.text for event in cm.settled()]}")
                for state in (1, 2, 3):
                    shown(cm, f"{label}, client INIT_QP_ATTR {state}", ends[1], f"INIT_QP_ATTR {state}")
            cm.destroy(*ends)
            cm.events(0.02)
    for length in (0, 1, 148):
        for reason in (28, 6):
            child, client, listener = requested(cm)
            body = struct.pack("<IBBxx256s", child, length, reason, bytes(range(1, 149)))
            label = f"REJECT with {length} bytes, reason {reason}"
            cm.say(label, REJECT, body)
            print(f"{label}, event: {[event.text for event in cm.settled()]}")
            cm.destroy(child, client, listener)
    made = routed(cm)
    cm.say("CONNECT to nobody", CONNECT, parameters() + struct.pack("<IIII", made[0], 0, 0, 0))
    print(f"CONNECT to nobody, events: {[event.text for event in cm.events(1.0)]}")
    cm.destroy(*made)


def shown(cm: Cm, line: str, handle: int, name: str) -> None:
    """One of the deeds, its answer printed."""
    deed = DEEDS[name]
    answer = cm.say(line, deed.number, deed.body(cm, handle), deed.out)
    print(f"{line}, answer: {fields(deed, answer) if answer is not None else None}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for part in (shapes, kinds, places, ports, options, states, connections):
        if len(sys.argv) > 1 and part.__name__ not in sys.argv[1:]:
            continue
        print(f"# {part.__name__}")
        CM = Cm()
        try:
            part(CM)
        except Exception as error:
            print(f"# {part.__name__} ended early: {type(error).__name__}: {error}")
        os.close(CM.fd)
    os._exit(0)
