"""Protection domains, memory regions and memory windows, and the key checks of IBA 10.6.3.

A region is a range of the program's virtual addresses; nothing is pinned or copied. The data stay in the program's own
memory, which is why a checkpoint of the program carries them.
"""

from __future__ import annotations

import errno
import mmap

from softroce_ext.device import image as im
from softroce_ext.device.errors import ImageError, VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.user_object import Device, Restore, UserObject
from softroce_ext.transport.interfaces import ProtectionError, SendWqe
from softroce_ext.transport.verbs import Access, WrOpcode
from softroce_ext.wire.path import Path

KEY_BITS = 8
"""Low bits of a key that the owner may change; the rest is the region's index (IBA 10.6.2)."""

TYPE_2 = 2
"""enum ib_mw_type: a window bound by a work request of its own queue pair, and invalidated by one."""

SUPPORTED_ACCESS = 0x1F | 0x20 | 0x100000
"""Local write, remote write, read, atomic, window binding; zero-based and relaxed ordering are hints to rxe."""


class MemoryRegion(UserObject):
    """A registered range: `iova` is the address that work requests use, `start` the program's own."""

    __slots__ = ("access", "end", "iova", "key", "length", "memory", "pd", "shift", "start", "windows")

    def __init__(
        self, pd: ProtectionDomain, memory: ProcessMemory, key: int, start: int, length: int, iova: int, access: int
    ) -> None:
        self.pd = pd
        self.memory = memory
        self.key = key
        self.start = start
        self.length = length
        self.iova = iova
        self.access = access
        self.end = iova + length
        self.shift = iova - start
        self.handle = 0
        self.windows = 0
        """Windows that are bound to it."""

    def enter(self, device: Device) -> None:
        self.pd.users += 1
        self.pd.keys[self.key >> KEY_BITS] = self

    def free(self, device: Device) -> None:
        self.pd.users -= 1
        self.pd.keys.pop(self.key >> KEY_BITS, None)

    def to_record(self, rings: im.RingSection) -> im.MrRecord:
        """Describe it for an image."""
        return im.MrRecord(
            handle=self.handle,
            pd=self.pd.handle,
            key=self.key,
            start=self.start,
            length=self.length,
            iova=self.iova,
            access=self.access,
        )

    @classmethod
    def from_record(cls, record: im.MrRecord, restore: Restore) -> MemoryRegion:
        """Make it from its record."""
        pd = restore.get(record.pd, ProtectionDomain)
        return cls(pd, restore.memory, record.key, record.start, record.length, record.iova, record.access)


class MemoryWindow(UserObject):
    """A window, unbound until a bind work request gives it a region."""

    __slots__ = ("access", "end", "iova", "key", "kind", "pd", "qpn", "region")

    def __init__(self, pd: ProtectionDomain, key: int, kind: int) -> None:
        self.pd = pd
        self.key = key
        self.kind = kind
        self.region: MemoryRegion | None = None
        self.iova = self.end = self.access = 0
        self.qpn = 0
        """The queue pair that bound a type 2 window."""
        self.handle = 0

    def enter(self, device: Device) -> None:
        self.pd.users += 1
        self.pd.keys[self.key >> KEY_BITS] = self
        if self.region is not None:
            self.region.windows += 1

    def free(self, device: Device) -> None:
        self.pd.users -= 1
        self.pd.keys.pop(self.key >> KEY_BITS, None)
        if self.region is not None:
            self.region.windows -= 1

    def to_record(self, rings: im.RingSection) -> im.MwRecord:
        """Describe it for an image."""
        return im.MwRecord(
            handle=self.handle,
            pd=self.pd.handle,
            key=self.key,
            kind=self.kind,
            mr=self.region.handle if self.region is not None else None,
            iova=self.iova,
            end=self.end,
            access=self.access,
            qpn=self.qpn,
        )

    @classmethod
    def from_record(cls, record: im.MwRecord, restore: Restore) -> MemoryWindow:
        """Make it from its record. Raises ImageError when it reaches beyond its region."""
        window = cls(restore.get(record.pd, ProtectionDomain), record.key, record.kind)
        if record.mr is not None:
            region = restore.find(record.mr)
            if not isinstance(region, MemoryRegion) or record.iova < region.iova or record.end > region.end:
                raise ImageError(f"window {record.handle} is not within region {record.mr}")
            window.region = region
        window.iova, window.end, window.access = record.iova, record.end, record.access
        window.qpn = record.qpn
        return window


Keys = dict[int, MemoryRegion | MemoryWindow]
"""All keys of a device, by index (key >> 8)."""


class ProtectionDomain(UserObject):
    """A protection domain; answers the transport's key lookups (transport.interfaces.ProtectionDomain)."""

    __slots__ = ("keys", "paths", "users")

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.paths: dict[int, Path] = {}
        """The domain's address handles, by number: the resolved path to each one's destination."""
        self.handle = 0
        self.users = 0
        """Objects that refer to this domain; it cannot be freed while there are any."""

    def to_record(self, rings: im.RingSection) -> im.PdRecord:
        """Describe it for an image."""
        return im.PdRecord(handle=self.handle)

    @classmethod
    def from_record(cls, record: im.PdRecord, restore: Restore) -> ProtectionDomain:
        """Make it from its record."""
        return cls(restore.keys)

    def local(self, lkey: int, address: int, length: int, access: int) -> tuple[ProcessMemory, int]:
        """HOT. Check a local key; return the memory and the address in it. Raises ProtectionError."""
        region = self.keys.get(lkey >> KEY_BITS)
        if (
            region is None
            or region.key != lkey
            or region.pd is not self
            or address < region.iova
            or address + length > region.end
            or access & ~region.access
            or region.__class__ is not MemoryRegion
        ):
            raise ProtectionError(f"lkey {lkey:#x}: not {length} bytes at {address:#x} with access {access:#x}")
        return region.memory, address - region.shift

    def remote(self, rkey: int, address: int, length: int, access: int, qpn: int) -> tuple[ProcessMemory, int]:
        """HOT. As `local`, for a key that the peer sent to queue pair `qpn`; also a memory window's.

        Raises ProtectionError.
        """
        region = self.keys.get(rkey >> KEY_BITS)
        if (
            region is None
            or region.key != rkey
            or region.pd is not self
            or address < region.iova
            or address + length > region.end
            or access & ~region.access
        ):
            raise ProtectionError(f"rkey {rkey:#x}: not {length} bytes at {address:#x} with access {access:#x}")
        if region.__class__ is MemoryWindow:
            if region.region is None:
                raise ProtectionError(f"window {rkey:#x} is not bound")
            if region.kind == TYPE_2 and region.qpn != qpn:
                raise ProtectionError(f"window {rkey:#x} is another queue pair's")
            region = region.region
        return region.memory, address - region.shift  # type: ignore[union-attr]

    def address(self, ah_number: int) -> Path:
        """HOT. The path of one of this domain's address handles. Raises ProtectionError."""
        path = self.paths.get(ah_number)
        if path is None:
            raise ProtectionError(f"no address handle {ah_number} in this protection domain")
        return path

    # -- windows (IBA 10.6.7; the rules that rxe checks) -----------------------------------------------------------

    def local_operation(self, wqe: SendWqe, qpn: int) -> None:
        """Carry out a BIND_MW or LOCAL_INV request. Raises ProtectionError.

        A bind carries (`uverbs.rings`): remote_address and length the range, compare_add the region's lkey, swap the
        window's present key << 32 | access, rkey the window's key to be.
        """
        if wqe.opcode == WrOpcode.LOCAL_INV:
            self.invalidate(wqe.imm, qpn)
            return
        window = self._window(wqe.swap >> 32)
        access = wqe.swap & 0xFFFFFFFF
        if window.kind == TYPE_2 and window.region is not None:
            raise ProtectionError("a type 2 window must be invalidated before it is bound again")
        region: MemoryRegion | None = None
        if wqe.length:
            found = self.keys.get(wqe.compare_add >> KEY_BITS)
            if not isinstance(found, MemoryRegion) or found.key != wqe.compare_add or found.pd is not self:
                raise ProtectionError(f"no region with lkey {wqe.compare_add:#x}")
            region = found
            if not region.access & Access.MW_BIND:
                raise ProtectionError("the region does not allow windows")
            if access & (Access.REMOTE_WRITE | Access.REMOTE_ATOMIC) and not region.access & Access.LOCAL_WRITE:
                raise ProtectionError("a writing window needs a region with local write access")
            if wqe.remote_address < region.iova or wqe.remote_address + wqe.length > region.end:
                raise ProtectionError("the window reaches beyond its region")
        elif window.kind == TYPE_2:
            raise ProtectionError("a type 2 window cannot be empty")
        if window.region is not None:
            window.region.windows -= 1
        if region is not None:
            region.windows += 1
        window.region = region
        window.key = window.key & ~0xFF | wqe.rkey & 0xFF
        window.iova, window.end, window.access = wqe.remote_address, wqe.remote_address + wqe.length, access
        window.qpn = qpn if window.kind == TYPE_2 else 0

    def invalidate(self, rkey: int, qpn: int) -> None:
        """End the use of a type 2 window that queue pair `qpn` bound. Raises ProtectionError."""
        window = self._window(rkey)
        if window.kind != TYPE_2 or window.region is None or window.qpn != qpn:
            raise ProtectionError(f"{rkey:#x} is not a type 2 window that this queue pair bound")
        window.region.windows -= 1
        window.region = None
        window.iova = window.end = window.access = 0

    def _window(self, key: int) -> MemoryWindow:
        window = self.keys.get(key >> KEY_BITS)
        if not isinstance(window, MemoryWindow) or window.key != key or window.pd is not self:
            raise ProtectionError(f"no window with key {key:#x}")
        return window


def check_access(access: int) -> None:
    """Raise VerbsError for access flags that a registration cannot have (IBA 11.2.8.2)."""
    if access & ~SUPPORTED_ACCESS:
        raise VerbsError(errno.EINVAL, f"access flags {access:#x}")
    if access & (Access.REMOTE_WRITE | Access.REMOTE_ATOMIC) and not access & Access.LOCAL_WRITE:
        raise VerbsError(errno.EINVAL, "remote write or atomic access needs local write access")


def check_range(memory: ProcessMemory, start: int, length: int, iova: int, access: int) -> None:
    """Raise VerbsError when a range cannot be registered: it wraps, or is not mapped as the access needs."""
    if start + length > 1 << 64 or iova + length > 1 << 64:
        raise VerbsError(errno.EINVAL, "the range wraps")
    if not length and not iova % mmap.PAGESIZE:
        raise VerbsError(errno.EINVAL, "an empty range has no page (one that begins inside a page has that page)")
    writable = bool(access & (Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC))
    if not memory.accessible(start, max(length, 1), writable):
        raise VerbsError(errno.EFAULT, f"{length} bytes at {start:#x} are not mapped as access {access:#x} needs")
