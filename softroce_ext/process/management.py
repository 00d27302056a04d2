"""The commands of the management socket, one method each, in one table (`COMMANDS`)."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softroce_ext.control.server import Respond
from softroce_ext.device import checkpoint, image, limits
from softroce_ext.device.context import Context
from softroce_ext.device.errors import ImageError, StateError
from softroce_ext.port.capture import Capture
from softroce_ext.trace.queue_pairs import DEFAULT_LIMIT
from softroce_ext.uverbs import hw_counters
from softroce_ext.uverbs.server import inner_pid_of, open_process
from softroce_ext.wire.path import address_text

if TYPE_CHECKING:
    from softroce_ext.cm.server import CmFile
    from softroce_ext.process.nic import Nic

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


def _both(contexts: list[Context], files: list[CmFile]) -> list[Context | CmFile]:
    return [*contexts, *files]


def _reach(items: list[Context | CmFile]) -> None:
    """Get a descriptor of each held program's process, so that all of them can be released, or of none.

    Raises StateError.
    """
    try:
        for item in items:
            if item.pidfd < 0:
                item.pidfd = open_process(item.pid)
    except StateError:
        for item in items:
            if item.pidfd >= 0:
                os.close(item.pidfd)
                item.pidfd = -1
        raise


def _ip(arguments: Arguments, name: str) -> bytes:
    text = _argument(arguments, name, str)
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise CommandError(f"argument {name!r} is {text!r}, expected an IP address such as 10.0.0.2") from None


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
        except (TypeError, OverflowError, RecursionError) as error:  # a list where a name belongs, a number too large
            respond({"ok": False, "error": f"{name}: an argument is of the wrong kind: {error}", "hint": ""})
        else:
            if answer is not None:
                respond({"ok": True, **answer})

    # -- looking ---------------------------------------------------------------------------------------------------

    def status(self, _: Arguments, __: Respond) -> dict[str, Any]:
        nic = self._nic
        counters = nic.counters()
        return {
            "device": "rxe0",
            "interface": nic.config.interface,
            "mac": nic.port.mac.hex(":"),
            "number_base": nic.config.number_base,
            "active_mtu": limits.MTU_BYTES[limits.active_mtu(nic.adapter.interface_mtu)],
            "addresses": [address_text(ip) for ip in nic.adapter.addresses()],
            "migros": nic.config.migros,
            "contexts": [context.summary() for context in nic.adapter.contexts.values()],
            "rdma_cm": [nic.cm_files.summary(file) for file in nic.cm_files.files.values()],
            "counters": counters,
            "hw_counters": hw_counters.rxe_view(counters),
        }

    def counters(self, _: Arguments, __: Respond) -> dict[str, Any]:
        counters = self._nic.counters()
        return {"counters": counters, "hw_counters": hw_counters.rxe_view(counters)}

    def gaps(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Longest gap between completions, of each queue pair and of each context (seconds, CLOCK_MONOTONIC)."""
        reset = _argument(arguments, "reset", bool, False)
        contexts = []
        for context in self._nic.adapter.contexts.values():
            qps = [(qp.qpn, qp.transport.statistics) for qp in context.queue_pairs]
            rows = [
                {"qpn": qpn, "last": c.gap_last, "longest": c.gap_longest, "longest_end": c.gap_longest_end}
                for qpn, c in qps
            ]
            ended = [(c.gap_longest, c.gap_longest_end) for _, c in qps if c.gap_longest_end is not None]
            worst = max(ended, default=(None, None))
            lasts = [row["last"] for row in rows if row["last"] is not None]
            contexts.append(
                {
                    "id": context.id,
                    "pid": context.pid,
                    "longest": worst[0],
                    "longest_end": worst[1],
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

    def trace_qp(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Trace queue pairs `qpns` (default: all) to `file`; null ends it. Answers with the ended trace's lines."""
        path = _argument(arguments, "file", str, None)
        qpns = _argument(arguments, "qpns", list, None)
        limit = _argument(arguments, "limit", int, DEFAULT_LIMIT)
        if qpns is not None and not all(type(qpn) is int and 0 <= qpn < 1 << 24 for qpn in qpns):
            raise CommandError(f"argument 'qpns' is {qpns!r}, expected queue pair numbers")
        if limit < 1:
            raise CommandError(f"argument 'limit' is {limit}, expected a positive number of lines")
        return {"lines": self._nic.trace_qps(path, qpns, limit)}

    def shutdown(self, _: Arguments, __: Respond) -> dict[str, Any]:
        self._nic.stop()
        return {}

    # -- contexts ----------------------------------------------------------------------------------------------------

    def _opens(self, arguments: Arguments) -> tuple[list[Context], list[CmFile]]:
        """What `contexts` names: contexts of verbs, and opens of rdma_cm, which are numbered together."""
        wanted = _argument(arguments, "contexts", list)
        contexts, files = self._nic.adapter.contexts, self._nic.cm_files.files
        missing = [str(name) for name in wanted if name not in contexts and name not in files]
        if missing:
            known = ", ".join((*contexts, *files))
            raise CommandError(f"no context {', '.join(missing)}", f"there are: {known or 'none'}")
        return [contexts[name] for name in wanted if name in contexts], [
            files[name] for name in wanted if name in files
        ]

    def _held(self, arguments: Arguments, otherwise: str) -> tuple[list[Context], list[CmFile]]:
        """The same, all of them held. Raises StateError with `otherwise`."""
        contexts, files = self._opens(arguments)
        for item in _both(contexts, files):
            if not item.held:
                raise StateError(f"context {item.id} {otherwise}")
        return contexts, files

    def _summaries(self, contexts: list[Context], files: list[CmFile]) -> list[dict[str, Any]]:
        return [*(context.summary() for context in contexts), *map(self._nic.cm_files.summary, files)]

    def hold(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """The programs `pids` are frozen: take in what they sent, stop their queue pairs, ignore closed descriptors.

        Answers with the contexts found, those of verbs and those of rdma_cm (none is no error: the program does not use
        the device).
        """
        pids = set(_argument(arguments, "pids", list))
        nic = self._nic
        contexts = [context for context in nic.adapter.contexts.values() if context.pid in pids]
        files = nic.cm_files.of(pids)
        if any(item.held for item in _both(contexts, files)):
            raise StateError("a context of these processes is held already")
        if files:
            nic.serve_waiting()
            files = nic.cm_files.of(pids)
        for context in contexts:
            nic.hold(context)
        for file in files:
            nic.cm_files.hold(file)
        return {"contexts": self._summaries(contexts, files), "at": time.monotonic()}

    def dump(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Write the image of held contexts to `file`."""
        path = _argument(arguments, "file", str)
        contexts, files = self._held(arguments, "is not held: its program may be running")
        records = self._nic.cm_files.dump(files)
        length = image.write(path, *checkpoint.dump(self._nic.adapter, contexts, records))
        return {"bytes": length, "contexts": [item.id for item in _both(contexts, files)]}

    def unhold(self, arguments: Arguments, respond: Respond) -> dict[str, Any] | None:
        """Roll back: the programs run on here. Partners get RESUME; answers as `resume` does."""
        contexts, files = self._held(arguments, "is not held")
        return self._resume(contexts, files, None, arguments, respond)

    def discard(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Forget held contexts without a packet: they live elsewhere now, or were never resumed here."""
        contexts, files = self._held(arguments, "is in use here: hold it first")
        for context in contexts:
            self._nic.unwatch_context(context)
            self._nic.adapter.forget(context)
        for file in files:
            self._nic.cm_files.discard(file)
        return {}

    def reserve(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Check that contexts `contexts` with queue pairs `qpns` could be restored here."""
        adapter = self._nic.adapter
        for name in _argument(arguments, "contexts", list, []):
            if name in adapter.contexts or name in self._nic.cm_files.files:
                raise StateError(f"context {name} exists here already")
        for qpn in _argument(arguments, "qpns", list, []):
            if qpn in adapter.queue_pairs:
                raise StateError(f"QPN {qpn} is taken here; number bases must differ")
        return {"number_base": adapter.number_base}

    def restore(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """Make the objects of image `file`, all Stopped, and the files of their channels.

        addresses: {address of the queue pairs at the source: address here}; those not named stay the same.
        """
        path = _argument(arguments, "file", str)
        addresses = {
            _ip({"addresses": there}, "addresses"): _ip({"addresses": here}, "addresses")
            for there, here in _argument(arguments, "addresses", dict, {}).items()
        }
        nic = self._nic
        found, rings = image.read(path)
        contexts = checkpoint.restore(nic.adapter, found, rings, nic.make_channel, addresses)
        try:
            files = nic.cm_files.restore(found.cm, addresses)
        except ImageError:
            for context in contexts:
                nic.adapter.forget(context)
            raise
        return {"contexts": self._summaries(contexts, files)}

    def attach(self, arguments: Arguments, _: Respond) -> dict[str, Any]:
        """The programs of restored contexts exist again; `pids`: inner pid → pid here (of `contexts`, or of all)."""
        pids = _argument(arguments, "pids", dict)
        nic = self._nic
        waiting: list[Context | CmFile] = [*nic.adapter.contexts.values(), *nic.cm_files.files.values()]
        if "contexts" in arguments:
            contexts, files = self._opens(arguments)
            waiting = [*contexts, *files]
        attached = []
        for context in waiting:
            outer = pids.get(str(context.inner_pid))
            if context.pid is not None or outer is None:
                continue
            if not isinstance(outer, int):
                raise CommandError(f"pid {outer!r} is no number")
            try:
                inner = inner_pid_of(outer)
            except OSError:
                raise StateError(f"there is no process {outer}") from None
            if inner != context.inner_pid:
                raise StateError(f"process {outer} is {inner} inside, not {context.inner_pid}")
            context.pid = context.memory.pid = outer
            attached.append(context.id)
        missing = [context.id for context in waiting if context.pid is None and "contexts" in arguments]
        if missing:
            raise StateError(f"no process given for context {', '.join(missing)}")
        return {"contexts": attached}

    def resume(self, arguments: Arguments, respond: Respond) -> dict[str, Any] | None:
        """Un-stop restored contexts and send RESUME, from `source_ip` where the old address is not here.

        wait (default true): answer when every partner has acknowledged, or fail after `timeout` seconds (default 10;
        the RESUMEs go on then). Answers with `started` and `settled` (times) and when each queue pair's was.
        """
        contexts, files = self._held(arguments, "is not held")
        source = _ip(arguments, "source_ip") if arguments.get("source_ip") is not None else None
        for item in _both(contexts, files):
            if item.pid is None:
                raise StateError(f"context {item.id} has no process yet: attach first")
        return self._resume(contexts, files, source, arguments, respond)

    def _resume(
        self,
        contexts: list[Context],
        files: list[CmFile],
        source: bytes | None,
        arguments: Arguments,
        respond: Respond,
    ) -> dict[str, Any] | None:
        wait = _argument(arguments, "wait", bool, True)
        timeout = float(_argument(arguments, "timeout", (int, float), 10.0))
        nic = self._nic
        _reach(_both(contexts, files))
        started = time.monotonic()
        for context in contexts:
            nic.release(context, source)
        for file in files:
            nic.cm_files.release(file)
        if not wait:
            return {"started": started}
        deadline = started + timeout
        qps = [qp for context in contexts for qp in context.queue_pairs]

        def settled(now: float) -> bool:
            left = [qp.qpn for qp in qps if not qp.transport.resume_settled]
            if left and now < deadline:
                return False
            if left:
                numbers = ", ".join(map(str, left[:8]))
                respond(
                    {
                        "ok": False,
                        "error": f"resume: no answer from the partners of QPN {numbers} within {timeout} s",
                        "hint": "do the flows lead to the new place? status shows remote_ip of each queue pair",
                        "started": started,
                    }
                )
                return True
            rows = [{"qpn": qp.qpn, "acked_at": qp.transport.movement.resume_acked_at} for qp in qps]
            respond({"ok": True, "started": started, "settled": time.monotonic(), "qps": rows})
            return True

        nic.loop.wait_for(settled)
        return None


Command = Callable[[Management, Arguments, Respond], "dict[str, Any] | None"]

COMMANDS: Final[dict[str, Command]] = {
    "status": Management.status,
    "counters": Management.counters,
    "gaps": Management.gaps,
    "address_add": Management.address_add,
    "address_remove": Management.address_remove,
    "hold": Management.hold,
    "dump": Management.dump,
    "unhold": Management.unhold,
    "discard": Management.discard,
    "reserve": Management.reserve,
    "restore": Management.restore,
    "attach": Management.attach,
    "resume": Management.resume,
    "capture": Management.capture,
    "trace": Management.trace,
    "trace_qp": Management.trace_qp,
    "shutdown": Management.shutdown,
}
"""Name → method. A method that returns None answers later through `respond`."""
