"""The speed of an interface (SIOCETHTOOL)."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from typing import Final

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GSET: Final = 1
_COMMAND_BYTES: Final = 44
"""struct ethtool_cmd: the command first, the speed's low half at 12, its high half at 28."""
_UNKNOWN: Final = (0, 0xFFFF, 0xFFFFFFFF)


def link_speed(interface: str) -> int | None:
    """Return Mbit/s; None when the driver does not know or report it, or the interface has gone."""
    command = ctypes.create_string_buffer(struct.pack("=I", _ETHTOOL_GSET), _COMMAND_BYTES)
    request = struct.pack("=16sQ16x", interface.encode(), ctypes.addressof(command))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    except OSError:
        return None
    low, high = struct.unpack_from("=12xH14xH", command)
    speed = int(high << 16 | low)
    return None if speed in _UNKNOWN else speed
