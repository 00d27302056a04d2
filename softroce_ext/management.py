"""The commands of the management socket, one method each, in one table (`COMMANDS`)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softroce_ext.capture import Capture
from softroce_ext.control import Respond
from softroce_ext.device.context import Context
from softroce_ext.device.errors import ImageError, StateError

if TYPE_CHECKING:
    from softroce_ext.nic import Nic

Arguments = dict[str, Any]


class CommandError(Exception):
    """The caller's fault: an argument is missing or of the wrong kind. `hint` says what is expected."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def _argument(arguments: Arguments, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    value = arguments.get(name, default)
    if value is ...:
        raise CommandError(f"argument {name!r} is missing")
    if value is not default and not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise CommandError(f"argument {name!r} is {value!r}, expected {names}")
    return value


def _ip(arguments: Arguments, name: str) -> bytes:
    text = _argument(arguments, name, str)
    try:
        return socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise CommandError(f"argument {name!r} is {text!r}, expected an IPv4 address such as 10.0.0.2") from None


class Management:
    """Carries the commands out on a `Nic`."""

    def __init__(self, nic: Nic) -> None:
        self._nic = nic

    def handle(self, request: dict[str, Any], respond: Respond) -> None:
        """One request; every fault of the caller becomes an answer with `error` and `hint`."""
        name = request["command"]
        command = COMMANDS.get(name)
        if command is None:
            respond({"ok": False, "error": f"unknown command {name!r}", "hint": f"there are: {', '.join(COMMANDS)}"})
            return
        try:
            answer = command(self, {key: value for key, value in request.items() if key != "command"}, respond)
        except CommandError as error:
            respond({"ok": False, "error": f"{name}: {error}", "hint": error.hint})
        except (StateError, ImageError, ValueError, OSError) as error:
            respond({"ok": False, "error": f"{name}: {error}", "hint": ""})
        else:
            if answer is not None:
                respond({"ok": True, **answer})

    # -- looking ---------------------------------------------------------------------------------------------------

    def status(self, _: Arguments, __: Respond) -> dict[str, Any]:
        nic = self._nic
        return {
            "device": "rxe0",
            "interface": nic.config.interface,
            "mac": nic.port.mac.hex(":"),
            "number_base": nic.config.number_base,
            "addresses": [socket.inet_ntoa(ip) for ip in nic.adapter.addresses()],
            "migros": nic.config.migros,
            "contexts": [context.summary() for context in nic.adapter.contexts.values()],
            "counters": self._counters(),
        }

    def counters(self, _: Arguments, __: Respond) -> dict[str, Any]:
        return {"counters": self._counters()}

    def _counters(self) -> dict[str, int]:
        port = self._nic.port
        counters = dict(self._nic.engine.counters)
        for name in ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "tx_busy"):
            counters[name] = getattr(port, name)
        if port.impairment is not None:
            for name in ("lost", "duplicated", "reordered", "corrupted"):
                counters[f"impairment_{name}"] = getattr(port.impairment, name)
        return counters

    def gaps(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Longest gap between completions, of each queue pair and of each context (seconds, CLOCK_MONOTONIC)."""
        reset = _argument(arguments, "reset", bool, False)
        contexts = []
        for context in self._nic.adapter.contexts.values():
            qps = [(qp.qpn, qp.transport.context) for qp in context.queue_pairs]
            rows = [
                {"qpn": qpn, "last": c.gap_last, "longest": c.gap_longest, "longest_end": c.gap_longest_end}
                for qpn, c in qps
            ]
            known = [row for row in rows if row["longest_end"] is not None]
            worst = max(known, key=lambda row: row["longest"], default=None)
            lasts = [row["last"] for row in rows if row["last"] is not None]
            contexts.append(
                {
                    "id": context.id,
                    "pid": context.pid,
                    "longest": worst["longest"] if worst else None,
                    "longest_end": worst["longest_end"] if worst else None,
                    "last": max(lasts, default=None),
                    "qps": rows,
                }
            )
            if reset:
                for _qpn, c in qps:
                    c.reset_gaps()
        return {"now": time.monotonic(), "contexts": contexts}

    # -- addresses, capture, trace -----------------------------------------------------------------------------------

    def address_add(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        return {"index": self._nic.adapter.add_address(_ip(arguments, "ip"))}

    def address_remove(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        self._nic.adapter.remove_address(_ip(arguments, "ip"))
        return {}

    def capture(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        path = _argument(arguments, "file", str, None)
        snaplen = _argument(arguments, "snaplen", int, 65535)
        port = self._nic.port
        frames = 0
        new = Capture(path, snaplen) if path else None
        if port.capture is not None:
            frames = port.capture.frames
            port.capture.close()
        port.capture = new
        return {"frames": frames}

    def trace(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        self._nic.trace_to(_argument(arguments, "file", str, None))
        return {}

    def shutdown(self, _: Arguments, __: Respond) -> dict[str, Any]:
        self._nic.stop()
        return {}

    # -- contexts ----------------------------------------------------------------------------------------------------

    def _contexts(self, arguments: Arguments) -> list[Context]:
        wanted = _argument(arguments, "contexts", list)
        known = self._nic.adapter.contexts
        missing = [str(name) for name in wanted if name not in known]
        if missing:
            raise CommandError(f"no context {', '.join(missing)}", f"there are: {', '.join(known) or 'none'}")
        return [known[name] for name in wanted]


Command = Callable[[Management, Arguments, Respond], "dict[str, Any] | None"]

COMMANDS: Final[dict[str, Command]] = {
    "status": Management.status,
    "counters": Management.counters,
    "gaps": Management.gaps,
    "address_add": Management.address_add,
    "address_remove": Management.address_remove,
    "capture": Management.capture,
    "trace": Management.trace,
    "shutdown": Management.shutdown,
}
"""Name → method. A method that returns None answers later through `respond`."""
