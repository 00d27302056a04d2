"""The files of /sys/class/infiniband* and /dev/infiniband that libibverbs and the tools read, below the run directory.

libibverbs recognises a device by the modification time of class/infiniband/<name>, so after `create` only the contents
of files change, in place. Every row of the GID table needs its file, empty ones too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from softroce_ext.device import limits
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.link import PHYS_TEXT, STATE_TEXT
from softroce_ext.uverbs import abi

DEVICE_NUMBER: Final = (231, 192)
"""Major and minor of uverbs0, as the kernel numbers it."""
CM_ABI_VERSION: Final = 4
CM_MINOR: Final = 191
"""Minor number of rdma_cm in this picture (the kernel takes any free one)."""
DEVICE_NAME: Final = "rxe0"
"""libibverbs chooses the rxe provider for a name that starts with rxe."""


def colons(data: bytes) -> str:
    """Groups of two bytes in hexadecimal, as sysfs prints GIDs and GUIDs."""
    text = data.hex()
    return ":".join(text[at : at + 4] for at in range(0, len(text), 4))


class SysfsPicture:
    """Writes the picture, and keeps its port and its GID table up to date."""

    def __init__(self, run_directory: Path, adapter: Adapter, interface: str) -> None:
        self._class = run_directory / "sys" / "class"
        self._dev = run_directory / "dev"
        self._adapter = adapter
        self._interface = interface
        self.port = self._class / "infiniband" / DEVICE_NAME / "ports" / "1"
        """The folder of port 1; its counters are `hw_counters.CounterFiles`'."""

    def create(self) -> None:
        """Write everything. Must be called before any program can open the device."""
        guid = colons(self._adapter.guid)
        verbs = self._class / "infiniband_verbs"
        device = self._class / "infiniband" / DEVICE_NAME
        rdma_cm = self._class / "misc" / "rdma_cm"
        texts = {
            rdma_cm / "abi_version": str(CM_ABI_VERSION),
            rdma_cm / "dev": f"{DEVICE_NUMBER[0]}:{CM_MINOR}",
            verbs / "abi_version": str(abi.ABI_VERSION),
            verbs / "uverbs0" / "ibdev": DEVICE_NAME,
            verbs / "uverbs0" / "dev": f"{DEVICE_NUMBER[0]}:{DEVICE_NUMBER[1]}",
            verbs / "uverbs0" / "abi_version": str(abi.RXE_ABI_VERSION),
            device / "node_type": "1: CA",
            device / "node_guid": guid,
            device / "sys_image_guid": guid,
            device / "node_desc": DEVICE_NAME,
            device / "fw_ver": "",
            device / "parent": self._interface,
            self.port / "lid": "0x0",
            self.port / "lid_mask_count": "0",
            self.port / "sm_lid": "0x0",
            self.port / "sm_sl": "0",
            self.port / "link_layer": "Ethernet",
            self.port / "cap_mask": f"0x{limits.PORT_CAP_FLAGS:08x}",
            self.port / "pkeys" / "0": f"0x{limits.DEFAULT_PKEY:04x}",
        }
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        self.set_port()
        for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (self.port / folder).mkdir(parents=True, exist_ok=True)
        gids = self._adapter.addressing.gids
        for index in range(limits.GID_TABLE_LENGTH):
            self.set_gid(index, gids[index] if index < len(gids) else None)
        self._dev.mkdir(parents=True, exist_ok=True)
        (self._dev / "uverbs0").touch()
        (self._dev / "rdma_cm").touch()

    def set_port(self) -> None:
        """Write the files that depend on the interface, in place."""
        link = self._adapter.link
        self._put("state", STATE_TEXT[link.state])
        self._put("phys_state", PHYS_TEXT[link.phys_state])
        self._put("rate", link.rate.text)
        self._put("mtu", str(limits.MTU_BYTES[limits.active_mtu(link.mtu)]))

    def set_gid(self, index: int, gid: bytes | None) -> None:
        """Write one row of the GID table, in place."""
        self._put(f"gids/{index}", colons(gid or bytes(16)))
        self._put(f"gid_attrs/types/{index}", "RoCE v2")
        self._put(f"gid_attrs/ndevs/{index}", self._interface if gid else "")

    def _put(self, name: str, text: str) -> None:
        # A reader must never see an empty file: overwrite, then cut.
        data = text.encode() + b"\n"
        fd = os.open(f"{self.port}/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)
