"""The state and the IP addresses of an interface, followed by rtnetlink as Linux's RoCE ports and GID tables do."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Final

from softroce_ext.port.neighbours import HEADER, NLM_F_ACK, NLM_F_REQUEST, attributes

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 16, 17, 18, 20, 21, 22
NLM_F_DUMP: Final = 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
_LINK_GROUP, _ADDRESS_GROUPS = 0x1, 0x10 | 0x100
"""RTMGRP_LINK; RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR."""
_IFADDRMSG = struct.Struct("=BBBBI")
_IFINFOMSG = struct.Struct("=BxHiII")
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_TENTATIVE, IFA_F_DADFAILED = 0x40, 0x08
IFLA_MTU: Final = 4
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000


class InterfaceWatch:
    """Follows interface `index`. Call `start` once at the beginning, and `read` when `fileno` is readable."""

    def __init__(
        self,
        index: int,
        link: Callable[[bool, bool, int], None],
        added: Callable[[bytes], None] | None = None,
        removed: Callable[[bytes], None] | None = None,
    ) -> None:
        """link: called with whether the interface is up, whether it has a carrier, and its MTU, when one has changed;
        added, removed: called with an address of 4 or 16 bytes (None: addresses are not followed).
        """
        self._index = index
        self._link = link
        self._added = added
        self._removed = removed
        self._known: tuple[bool, bool, int] | None = None
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, _LINK_GROUP | (_ADDRESS_GROUPS if added is not None else 0)))

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def start(self) -> None:
        """Report the link and every address that is there now."""
        self._socket.settimeout(1.0)
        try:
            self._ask_link()
            while not self._receive():
                pass
            if self._added is not None:
                self._ask_addresses()
                while not self._receive():
                    pass
        except TimeoutError:
            pass
        finally:
            self._socket.settimeout(0)

    def read(self) -> None:
        """Report every change since the last call."""
        try:
            while True:
                self._receive()
        except BlockingIOError:
            return

    def _ask_link(self) -> None:
        body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, self._index, 0, 0)
        self._send(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK, body)

    def _ask_addresses(self) -> None:
        self._send(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body)

    def _receive(self) -> bool:
        """Take one datagram of messages; whether it ended an answer."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # events were lost: query everything again
                self._ask_link()
                if self._added is not None:
                    self._ask_addresses()
                return False
            raise
        at = 0
        while at + HEADER.size <= len(data):
            length, kind, _, _, _ = HEADER.unpack_from(data, at)
            if length < HEADER.size:
                break
            body = data[at + HEADER.size : at + length]
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return True
            if kind in (RTM_NEWADDR, RTM_DELADDR):
                self._address(kind == RTM_NEWADDR, body)
            elif kind in (RTM_NEWLINK, RTM_DELLINK):
                self._interface(kind == RTM_NEWLINK, body)
            at += (length + 3) & ~3
        return False

    def _address(self, new: bool, body: bytes) -> None:
        _family, _prefix, flags, _scope, index = _IFADDRMSG.unpack_from(body)
        if index != self._index:
            return
        found = attributes(body[_IFADDRMSG.size :])
        if IFA_FLAGS in found:
            (flags,) = struct.unpack("=I", found[IFA_FLAGS])
        address = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
        if address is None or len(address) not in (4, 16) or self._added is None or self._removed is None:
            return
        if not new:
            self._removed(address)
        elif not flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED):  # reported again once it is known to be unique
            self._added(address)

    def _interface(self, new: bool, body: bytes) -> None:
        family, _kind, index, flags, _ = _IFINFOMSG.unpack_from(body)
        if index != self._index or family != socket.AF_UNSPEC:  # a bridge reports its ports with the same messages
            return
        mtu = attributes(body[_IFINFOMSG.size :]).get(IFLA_MTU)
        size = struct.unpack("=I", mtu)[0] if mtu else self._known[2] if self._known else 1500
        now = (new and bool(flags & IFF_UP), new and bool(flags & IFF_LOWER_UP), size)
        if now != self._known:
            self._known = now
            self._link(*now)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
