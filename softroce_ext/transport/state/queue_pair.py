"""Everything that the protocol remembers about one queue pair, and its form as plain data.

As in a hardware NIC, this state together with the application's memory and queues is the connection: a dump is
`to_plain`, a restore is `from_plain`. Each record has one owner (see the records); nothing here refers to memory,
queues, sockets or other objects of the process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, Final

from softroce_ext.transport.interfaces import RecvWqe, SendWqe, Sge
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.movement import Movement
from softroce_ext.transport.state.receiver import (
    Acknowledge,
    Answer,
    AtomicAnswer,
    ReadAnswer,
    Receiver,
    ResponderResource,
)
from softroce_ext.transport.state.sender import Sender, SendRecord
from softroce_ext.transport.state.statistics import Statistics
from softroce_ext.transport.verbs import CONNECTED, QpType
from softroce_ext.wire.path import Path

DUMP_VERSION: Final = 2


@dataclass(slots=True)
class QueuePairState:
    """The records of one queue pair. RC uses all of them, UC and UD a part."""

    attributes: Attributes
    sender: Sender = field(default_factory=Sender)
    receiver: Receiver = field(default_factory=Receiver)
    movement: Movement = field(default_factory=Movement)
    statistics: Statistics = field(default_factory=Statistics)

    def records(self) -> list[Any]:
        """The records, in the order of RECORDS."""
        return [getattr(self, name) for name in RECORDS]

    def reset(self) -> None:
        """Forget everything but what the queue pair was created with (a move to RESET)."""
        old = self.attributes
        fresh = QueuePairState(Attributes(old.qpn, old.qp_type, old.sq_sig_all, old.srq))
        for record, empty in zip(self.records(), fresh.records(), strict=True):
            for item in fields(record):
                setattr(record, item.name, getattr(empty, item.name))

    def move_to(self, path: Path) -> None:
        """From here on this end is where `path` begins.

        When that is another address, a connected peer that was never heard must be told, too.
        """
        attributes = self.attributes
        before = attributes.path
        attributes.replace_path(path)
        if before is None or before.source_ip == path.source_ip:
            return
        unheard = self.receiver.expected_psn == attributes.rq_psn and self.sender.una_psn == attributes.sq_psn
        if attributes.qp_type == QpType.RC and attributes.state in CONNECTED and unheard:
            self.movement.request_announcement()

    def to_plain(self) -> dict[str, Any]:
        """JSON-able data: numbers, strings (bytes in hexadecimal), lists, dicts, None. Shares nothing with self."""
        plain: dict[str, Any] = {"version": DUMP_VERSION}
        for name in RECORDS:
            record = getattr(self, name)
            plain[name] = {item.name: getattr(record, item.name) for item in fields(record)}
        path = self.attributes.path
        plain["attributes"].update(path=None if path is None else path.to_plain(), state=int(self.attributes.state))
        plain["sender"]["inflight"] = [
            [_send_to_plain(record.wqe), record.first_psn, record.packets, int(record.status), record.done]
            for record in self.sender.inflight
        ]
        plain["receiver"].update(_receiver_to_plain(self.receiver))
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> QueuePairState:
        """The inverse of `to_plain`. Raises ValueError when `plain` is not the dump of a queue pair of this version."""
        check_version(plain)
        try:
            values = {name: dict(plain[name]) for name in RECORDS}
            path = values["attributes"]["path"]
            values["attributes"]["path"] = None if path is None else Path.from_plain(path)
            values["sender"]["inflight"] = deque(
                SendRecord(_send_from_plain(wqe), first_psn, packets, status, done)
                for wqe, first_psn, packets, status, done in values["sender"]["inflight"]
            )
            _receiver_from_plain(values["receiver"])
            return cls(**{name: RECORDS[name](**values[name]) for name in RECORDS})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not the state of a queue pair: {error!r}") from None


RECORDS: Final[dict[str, type[Any]]] = {
    "attributes": Attributes,
    "sender": Sender,
    "receiver": Receiver,
    "movement": Movement,
    "statistics": Statistics,
}
"""The records of a queue pair's state, by their names in it."""


def check_version(plain: Any) -> None:
    """Raise ValueError when `plain` is not the state of a queue pair, or of another version."""
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != DUMP_VERSION:
        raise ValueError(f"the state of a queue pair has version {version!r}, this NIC reads {DUMP_VERSION}")


def _send_to_plain(wqe: SendWqe) -> list[Any]:
    plain = wqe._asdict()
    plain["sges"] = [list(sge) for sge in wqe.sges]
    plain["inline"] = None if wqe.inline is None else wqe.inline.hex()
    plain["destination"] = None if wqe.destination is None else list(wqe.destination)
    return list(plain.values())


def _send_from_plain(plain: list[Any]) -> SendWqe:
    wqe = SendWqe(*plain)
    return wqe._replace(
        sges=tuple(Sge(*sge) for sge in wqe.sges),
        inline=None if wqe.inline is None else bytes.fromhex(str(wqe.inline)),
        destination=None if wqe.destination is None else (wqe.destination[0], wqe.destination[1], wqe.destination[2]),
    )


def _receiver_to_plain(receiver: Receiver) -> dict[str, Any]:
    """The fields of a receiver that are not numbers.

    Answers refer to resources by identity, perhaps to one that is no longer kept for duplicates: such resources follow
    the `resources_kept` ones.
    """
    wqe = receiver.recv_wqe
    resources = list(receiver.resources)
    for answer in receiver.answers:
        if not isinstance(answer, Acknowledge) and not any(answer.resource is known for known in resources):
            resources.append(answer.resource)
    return {
        "recv_wqe": None if wqe is None else [wqe.wr_id, wqe.length, [list(sge) for sge in wqe.sges]],
        "resources": [[getattr(resource, item.name) for item in fields(resource)] for resource in resources],
        "resources_kept": len(receiver.resources),
        "answers": [_answer_to_plain(answer, resources) for answer in receiver.answers],
    }


def _receiver_from_plain(values: dict[str, Any]) -> None:
    """Replace in `values` what `_receiver_to_plain` has made."""
    kept = values.pop("resources_kept")
    if values["recv_wqe"] is not None:
        wr_id, length, sges = values["recv_wqe"]
        values["recv_wqe"] = RecvWqe(wr_id, length, tuple(Sge(*sge) for sge in sges))
    resources = [ResponderResource(*item) for item in values["resources"]]
    values["resources"] = deque(resources[:kept])
    values["answers"] = deque(_answer_from_plain(item, resources) for item in values["answers"])


def _answer_to_plain(answer: Answer, resources: list[ResponderResource]) -> list[Any]:
    if isinstance(answer, Acknowledge):
        return ["ack", answer.psn, answer.syndrome, answer.msn, answer.resumed]
    index = next(i for i, resource in enumerate(resources) if resource is answer.resource)
    if isinstance(answer, ReadAnswer):
        return ["again" if answer.again else "read", index, answer.next_packet]
    return ["atomic", index]


def _answer_from_plain(plain: list[Any], resources: list[ResponderResource]) -> Answer:
    kind, *rest = plain
    if kind == "ack":
        return Acknowledge(*rest)
    if kind in ("read", "again"):
        return ReadAnswer(resources[rest[0]], rest[1], kind == "again")
    if kind == "atomic":
        return AtomicAnswer(resources[rest[0]])
    raise ValueError(f"unknown answer {kind!r}")
