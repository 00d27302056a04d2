"""Which IP addresses an interface has, followed by rtnetlink: Linux's RoCE GID tables follow them in the same way."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Final

from softroce_ext.neighbours import HEADER, NLM_F_REQUEST, attributes

RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR, RTM_NEWLINK = 20, 21, 22, 16
NLM_F_DUMP: Final = 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_IFADDRMSG = struct.Struct("=BBBBI")
_IFINFOMSG = struct.Struct("=BxHiII")
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_TENTATIVE, IFA_F_DADFAILED = 0x40, 0x08
IFF_RUNNING: Final = 0x40


class AddressWatch:
    """The addresses of interface `index`. `read` when `fileno` is readable, `start` once at the beginning."""

    def __init__(
        self, index: int, added: Callable[[bytes], None], removed: Callable[[bytes], None], link: Callable[[bool], None]
    ) -> None:
        """added, removed: called with an address of 4 or 16 bytes; link: with whether the interface is running."""
        self._index = index
        self._added = added
        self._removed = removed
        self._link = link
        self._running: bool | None = None
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def start(self) -> None:
        """Report every address that is there now."""
        self._ask()
        self._socket.settimeout(1.0)
        try:
            while not self._receive():
                pass
        except TimeoutError:
            pass
        finally:
            self._socket.settimeout(0)

    def read(self) -> None:
        """Report what has changed."""
        try:
            while True:
                self._receive()
        except BlockingIOError:
            return

    def _ask(self) -> None:
        body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        self._socket.send(HEADER.pack(HEADER.size + len(body), RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)

    def _receive(self) -> bool:
        """Take one datagram of messages; whether it ended a dump."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # events were lost: look at everything again
                self._ask()
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
            elif kind == RTM_NEWLINK:
                self._interface(body)
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
        if address is None or len(address) not in (4, 16):
            return
        if not new:
            self._removed(address)
        elif not flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED):  # reported again when it is known to be unique
            self._added(address)

    def _interface(self, body: bytes) -> None:
        _family, _kind, index, flags, _ = _IFINFOMSG.unpack_from(body)
        running = bool(flags & IFF_RUNNING)
        if index == self._index and running != self._running:
            before, self._running = self._running, running
            if before is not None or not running:
                self._link(running)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
