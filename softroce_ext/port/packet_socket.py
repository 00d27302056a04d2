"""Frames in and out of an interface, in batches: AF_PACKET, sendmmsg(2), recvmmsg(2), buffers made once.

Nothing is lost here that the kernel did not lose: a full socket is back-pressure, and the frames wait. Frames to an
address of this NIC itself go round inside, because a packet socket never sees them come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final

from softroce_ext.device.addressing import group_mac
from softroce_ext.wire.frame import Path, build

if TYPE_CHECKING:
    from softroce_ext.port.capture import Capture
    from softroce_ext.port.impairment import Impairment

Buffer = bytes | bytearray | memoryview

BATCH: Final = 64
LOOPBACK_LIMIT: Final = 8192
"""Frames to this NIC's own addresses that may wait inside."""
SLOT: Final = 9216
"""Bytes of a slot: the longest frame of a 9000-byte MTU and some room."""
ROCE_PORT: Final = 4791
RECEIVE_BUFFER: Final = 64 << 20
SEND_BUFFER: Final = 4 << 20

_ETH_P_IP: Final = 0x0800
_ETH_P_IPV6: Final = 0x86DD
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_DROP_MEMBERSHIP, _PACKET_MR_MULTICAST = 263, 1, 2, 0
_SIOCGIFHWADDR, _SIOCGIFMTU = 0x8927, 0x8921
_SO_ATTACH_FILTER: Final = 26
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_MSG_DONTWAIT: Final = 0x40
_PKTTYPE: Final = 0xFFFFF000 + 4  # SKF_AD_OFF + SKF_AD_PKTTYPE

_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg, _recvmmsg = _libc.sendmmsg, _libc.recvmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]

_MMSGHDR = struct.Struct("=QIxxxxQQQQixxxxIxxxx")
"""struct mmsghdr on 64-bit: name, namelen, iov, iovlen, control, controllen, flags, length."""
_LENGTH_WORD: Final = 14  # msg_len's place, in 32-bit words
_WORDS: Final = _MMSGHDR.size // 4

# (code, jump true, jump false, operand): for us or for a group, IPv4, UDP to port 4791, not a later fragment.
_ROCE_FILTER: Final = (
    (0x20, 0, 0, _PKTTYPE),
    (0x15, 1, 0, 0),  # PACKET_HOST
    (0x15, 0, 9, 2),  # PACKET_MULTICAST
    (0x28, 0, 0, 12),
    (0x15, 0, 7, _ETH_P_IP),
    (0x30, 0, 0, 23),
    (0x15, 0, 5, socket.IPPROTO_UDP),
    (0x28, 0, 0, 20),
    (0x45, 3, 0, 0x1FFF),
    (0xB1, 0, 0, 14),
    (0x48, 0, 0, 16),
    (0x15, 1, 0, ROCE_PORT),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0x40000),
)
# The same for IPv6 without extension headers.
_ROCE_FILTER_IPV6: Final = (
    (0x20, 0, 0, _PKTTYPE),
    (0x15, 1, 0, 0),
    (0x15, 0, 6, 2),
    (0x28, 0, 0, 12),
    (0x15, 0, 4, _ETH_P_IPV6),
    (0x30, 0, 0, 20),
    (0x15, 0, 2, socket.IPPROTO_UDP),
    (0x28, 0, 0, 56),
    (0x15, 1, 0, ROCE_PORT),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0x40000),
)
_DROP_ALL: Final = ((0x06, 0, 0, 0),)


def _attach_filter(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


def _hardware(name: str) -> tuple[bytes, int]:
    """(MAC, MTU in bytes) of an interface, by ioctl: /sys may show another network namespace. Raises OSError."""
    request = struct.pack("=16s24x", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        mac = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, request)[18:24]
        (mtu,) = struct.unpack_from("=i", fcntl.ioctl(any_socket, _SIOCGIFMTU, request), 16)
    return mac, mtu


class _Arena:
    """BATCH slots and the structures by which the kernel reads or fills them in one call."""

    def __init__(self) -> None:
        self._slots = bytearray(BATCH * SLOT)
        view = memoryview(self._slots)
        self.views = [view[i * SLOT : (i + 1) * SLOT] for i in range(BATCH)]
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._slots))
        self._iovecs = bytearray(16 * BATCH)
        self._headers = bytearray(_MMSGHDR.size * BATCH)
        iovecs_at = ctypes.addressof(ctypes.c_char.from_buffer(self._iovecs))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._headers))
        for i in range(BATCH):
            struct.pack_into("=QQ", self._iovecs, 16 * i, base + i * SLOT, SLOT)
            _MMSGHDR.pack_into(self._headers, _MMSGHDR.size * i, 0, 0, iovecs_at + 16 * i, 1, 0, 0, 0, 0)
        self.iov_words = memoryview(self._iovecs).cast("Q")  # length of slot i: [2 * i + 1]
        self.header_words = memoryview(self._headers).cast("I")


class Port:
    """A RoCEv2 port on interface `name`; it is the engine's frame sink as well (`room`, `add`)."""

    def __init__(self, name: str) -> None:
        """Raises OSError when the interface does not exist or packet sockets are not allowed."""
        self.name = name
        self.index = socket.if_nametoindex(name)
        self.mac, self.mtu = _hardware(name)
        self.own: set[bytes] = set()
        """IP addresses of this NIC, and of the multicast groups with members here; frames to them go round inside."""
        self._groups: set[bytes] = set()
        self.loopback: deque[bytes] = deque()
        self.loopback_lost = 0
        self.room = BATCH
        self.capture: Capture | None = None
        self.impairment: Impairment | None = None
        self.tx_packets = self.tx_bytes = self.rx_packets = self.rx_bytes = 0
        self.tx_busy = 0
        """Times that the socket was full."""
        self.tx_errors = 0
        """Frames that the interface did not take (it is down, or they are too long for it)."""
        self._out, self._in = _Arena(), _Arena()
        self._filled = self._sent = 0
        self._out_views = self._out.views
        self._out_lengths = self._out.iov_words

        self._socket = self._open(_ETH_P_IP, _ROCE_FILTER)
        self._socket6 = self._open(_ETH_P_IPV6, _ROCE_FILTER_IPV6)
        self._fd = self._socket.fileno()
        self._in6 = _Arena()
        # Somebody must own UDP port 4791, else the kernel answers each frame with ICMP port unreachable.
        self._silencers = [self._silencer(socket.AF_INET, "")]
        with contextlib.suppress(OSError):  # a kernel without IPv6
            self._silencers.append(self._silencer(socket.AF_INET6, "::"))

    def _open(self, protocol: int, program: tuple[tuple[int, int, int, int], ...]) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        for plain, forced, size in (
            (socket.SO_RCVBUF, _SO_RCVBUFFORCE, RECEIVE_BUFFER),
            (socket.SO_SNDBUF, _SO_SNDBUFFORCE, SEND_BUFFER),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, plain, size)
        _attach_filter(sock, program)
        # Bound only now: no frame that the filter would refuse gets in.
        sock.bind((self.name, protocol))
        return sock

    def _silencer(self, family: int, anywhere: str) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        _attach_filter(sock, _DROP_ALL)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((anywhere, ROCE_PORT))
        return sock

    def set_addresses(self, own: set[bytes]) -> None:
        """The IP addresses of this NIC."""
        self.own = own | self._groups

    def set_group(self, address: bytes, member: bool) -> None:
        """Whether frames of a multicast group are wanted."""
        change = _PACKET_ADD_MEMBERSHIP if member else _PACKET_DROP_MEMBERSHIP
        request = struct.pack("=iHH8s", self.index, _PACKET_MR_MULTICAST, 6, group_mac(address))
        with contextlib.suppress(OSError):  # the interface may be gone
            self._socket.setsockopt(_SOL_PACKET, change, request)
        for addresses in (self._groups, self.own):
            (addresses.add if member else addresses.discard)(address)

    def fileno(self) -> int:
        """For the event loop: IPv4 frames."""
        return self._fd

    def fileno6(self) -> int:
        """For the event loop: IPv6 frames."""
        return self._socket6.fileno()

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self) -> list[memoryview]:
        """HOT. The IPv4 frames that have arrived, at most BATCH; valid until the next call."""
        return self._receive(self._fd, self._in)

    def receive6(self) -> list[memoryview]:
        """HOT. The IPv6 frames that have arrived, at most BATCH; valid until the next call."""
        return self._receive(self._socket6.fileno(), self._in6)

    def _receive(self, fd: int, arena: _Arena) -> list[memoryview]:
        count = _recvmmsg(fd, arena.address, BATCH, _MSG_DONTWAIT, None)
        if count <= 0:
            return []
        words, views = arena.header_words, arena.views
        frames = [views[i][: words[i * _WORDS + _LENGTH_WORD]] for i in range(count)]
        self.rx_packets += count
        self.rx_bytes += sum(map(len, frames))
        if self.capture is not None:
            self.capture.write(frames)
        return frames

    # -- sending -------------------------------------------------------------------------------------------------

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """HOT. transport.engine.FrameSink: build one frame into the next slot."""
        ip_id = path.ip_id
        path.ip_id = (ip_id + 1) & 0xFFFF
        slot = self._filled
        view = self._out_views[slot]
        length = build(path, ip_id, headers, payload, pad, view)
        if path.destination_ip in self.own:
            if len(self.loopback) < LOOPBACK_LIMIT:
                self.loopback.append(bytes(view[:length]))
            else:
                self.loopback_lost += 1  # only datagrams without end come here: connections have a window
            if path.destination_ip not in self._groups:
                return
        self._out_lengths[2 * slot + 1] = length
        self._filled = slot + 1
        self.room = BATCH - 1 - slot

    def flush(self) -> bool:
        """HOT. Hand the built frames to the kernel; False when it does not take them all now (try again later)."""
        filled, sent = self._filled, self._sent
        if filled == sent:
            return True
        if self.impairment is not None:
            return self._flush_impaired()
        arena = self._out
        while sent < filled:
            done = _sendmmsg(self._fd, arena.address + sent * 64, filled - sent, _MSG_DONTWAIT)
            if done <= 0:
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                if code in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM):
                    self.tx_busy += 1
                    self._sent = sent
                    return False
                self.tx_errors += 1
                done = 1  # the interface is down or the frame too long for it: that frame is lost, as on a cable
            sent += done
        self._account()
        self._filled = self._sent = 0
        self.room = BATCH
        return True

    def _account(self) -> None:
        lengths = self._out_lengths
        filled = self._filled
        self.tx_packets += filled
        self.tx_bytes += sum(lengths[1 : 2 * filled : 2])
        if self.capture is not None:
            self.capture.write([self._out_views[i][: lengths[2 * i + 1]] for i in range(filled)])

    def _flush_impaired(self) -> bool:
        assert self.impairment is not None
        lengths = self._out_lengths
        for slot in range(self._filled):
            self.impairment.take(bytes(self._out_views[slot][: lengths[2 * slot + 1]]))
        self._account()
        self._filled = self._sent = 0
        self.room = BATCH
        self.send_due()
        return True

    def send_due(self) -> None:
        """Send what the impairment lets out by now."""
        if self.impairment is None:
            return
        for frame in self.impairment.due():
            try:
                self._socket.send(frame)
            except OSError:
                self.tx_busy += 1  # one more impairment

    @property
    def unsent(self) -> bool:
        """Whether built frames wait for room in the socket."""
        return self._filled != self._sent

    def close(self) -> None:
        """Close every socket."""
        for sock in (self._socket, self._socket6, *self._silencers):
            sock.close()
