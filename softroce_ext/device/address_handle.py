"""Address vectors as the verbs ABI has them, and the address handles of UD queue pairs."""

from __future__ import annotations

import struct
from typing import NamedTuple

from softroce_ext.device import image as im
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.user_object import Device, Restore, UserObject
from softroce_ext.wire.path import Path

_DESTINATION = struct.Struct("<16sIHHBBBBBBBB")
"""struct ib_uverbs_qp_dest."""
_HANDLE_ATTRIBUTES = struct.Struct("<16sIBBBxHBBBBBx")
"""struct ib_uverbs_ah_attr: a struct ib_uverbs_global_route, then the local part."""


class Destination(NamedTuple):
    """An address vector (struct ib_uverbs_qp_dest, in its order)."""

    dgid: bytes = bytes(16)
    flow_label: int = 0
    dlid: int = 0
    reserved: int = 0
    sgid_index: int = 0
    hop_limit: int = 0
    traffic_class: int = 0
    sl: int = 0
    src_path_bits: int = 0
    static_rate: int = 0
    is_global: int = 0
    port_num: int = 0

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return _DESTINATION.pack(*self)

    @classmethod
    def of_handle(cls, attributes: bytes) -> Destination:
        """From the 32 bytes of struct ib_uverbs_ah_attr (the fields of a queue pair's vector, in another order)."""
        dgid, flow_label, sgid_index, hop_limit, traffic_class, dlid, sl, bits, rate, is_global, port = (
            _HANDLE_ATTRIBUTES.unpack(attributes)
        )
        return cls(
            dgid, flow_label, dlid, 0, sgid_index, hop_limit, traffic_class, sl, bits, rate, is_global, port
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Destination:
        """From 32 bytes."""
        return cls._make(_DESTINATION.unpack_from(data))


class AddressHandle(UserObject):
    """An address handle of UD; `number` is what work requests carry."""

    __slots__ = ("attributes", "number", "path", "pd")

    def __init__(self, pd: ProtectionDomain, attributes: bytes, number: int, path: Path) -> None:
        """attributes: struct ib_uverbs_ah_attr; path: the resolved path to its destination."""
        self.pd = pd
        self.attributes = attributes
        self.number = number
        self.path = path
        self.handle = 0

    def enter(self, device: Device) -> None:
        self.pd.users += 1
        self.pd.paths[self.number] = self.path
        device.ah_numbers.claim(self.number)

    def free(self, device: Device) -> None:
        self.pd.users -= 1
        self.pd.paths.pop(self.number, None)
        device.ah_numbers.give_back(self.number)

    def to_record(self, rings: im.RingSection) -> im.AhRecord:
        """Describe it for an image."""
        return im.AhRecord(
            handle=self.handle,
            pd=self.pd.handle,
            number=self.number,
            attributes=self.attributes.hex(),
            path=self.pd.paths[self.number].to_plain(),
        )

    @classmethod
    def from_record(cls, record: im.AhRecord, restore: Restore) -> AddressHandle:
        """Make it from its record."""
        pd = restore.get(record.pd, ProtectionDomain)
        return cls(pd, bytes.fromhex(record.attributes), record.number, restore.path(record.path))
