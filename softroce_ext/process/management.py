"""The commands of the management socket, one function each, in one table (`COMMANDS`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from softroce_ext.cm.server import CmFile, CmFiles
from softroce_ext.control.server import Respond
from softroce_ext.device import checkpoint, image, limits
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.errors import ImageError, StateError
from softroce_ext.device.opening import Opening, Openings, open_processes
from softroce_ext.device.user_context import UserContext
from softroce_ext.port.packet_socket import Port
from softroce_ext.process.arguments import Arguments, CommandError, argument, ip_argument
from softroce_ext.process.loop import Loop
from softroce_ext.process.user_contexts import UserContexts
from softroce_ext.trace.queue_pairs import DEFAULT_LIMIT
from softroce_ext.uverbs import hw_counters
from softroce_ext.uverbs.channel import FileChannel
from softroce_ext.uverbs.server import CommandServer
from softroce_ext.wire.path import address_text


class Config(Protocol):
    """What `status` says of the NIC's configuration (`nic.NicConfig`)."""

    @property
    def interface(self) -> str: ...

    @property
    def number_base(self) -> int: ...

    @property
    def migros(self) -> bool: ...


class Parts(Protocol):
    """What the commands work on (`nic.Nic`)."""

    @property
    def config(self) -> Config: ...

    @property
    def port(self) -> Port: ...

    @property
    def adapter(self) -> Adapter: ...

    @property
    def loop(self) -> Loop: ...

    @property
    def commands(self) -> CommandServer: ...

    @property
    def user_contexts(self) -> UserContexts: ...

    @property
    def cm_files(self) -> CmFiles: ...

    def counters(self) -> dict[str, int]: ...
    def capture_to(self, path: str | None, snaplen: int) -> int: ...
    def trace_to(self, path: str | None) -> None: ...
    def trace_qps(self, path: str | None, qpns: list[int] | None, limit: int) -> int: ...
    def make_channel(self, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel: ...
    def stop(self) -> None: ...


class Management:
    """Carries out the commands on a NIC."""

    def __init__(self, nic: Parts) -> None:
        self._nic = nic

    def handle(self, request: dict[str, Any], respond: Respond) -> None:
        """Carry out one request; every fault of the caller becomes an answer with `error` and `hint`."""
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

    # -- queries ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        nic = self._nic
        counters = nic.counters()
        return {
            "device": "rxe0",
            "interface": nic.config.interface,
            "mac": nic.port.mac.hex(":"),
            "number_base": nic.config.number_base,
            "active_mtu": limits.MTU_BYTES[limits.active_mtu(nic.adapter.interface_mtu)],
            "addresses": [address_text(ip) for ip in nic.adapter.addressing.addresses()],
            "migros": nic.config.migros,
            "contexts": [context.summary() for context in nic.adapter.contexts.values()],
            "rdma_cm": [file.summary() for file in nic.cm_files.by_id.values()],
            "counters": counters,
            "hw_counters": hw_counters.rxe_view(counters),
        }

    def counters(self) -> dict[str, Any]:
        counters = self._nic.counters()
        return {"counters": counters, "hw_counters": hw_counters.rxe_view(counters)}

    def gaps(self, arguments: Arguments) -> dict[str, Any]:
        """Longest gap between completions, of each queue pair and of each context (seconds, CLOCK_MONOTONIC)."""
        reset = argument(arguments, "reset", bool, False)
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

    def address_add(self, arguments: Arguments) -> dict[str, Any]:
        return {"index": self._nic.adapter.addressing.add(ip_argument(arguments, "ip"))}

    def address_remove(self, arguments: Arguments) -> dict[str, Any]:
        self._nic.adapter.addressing.remove(ip_argument(arguments, "ip"))
        return {}

    def capture(self, arguments: Arguments) -> dict[str, Any]:
        path = argument(arguments, "file", str, None)
        snaplen = argument(arguments, "snaplen", int, 65535)
        return {"frames": self._nic.capture_to(path, snaplen)}

    def trace(self, arguments: Arguments) -> dict[str, Any]:
        self._nic.trace_to(argument(arguments, "file", str, None))
        return {}

    def trace_qp(self, arguments: Arguments) -> dict[str, Any]:
        """Trace queue pairs `qpns` (default: all) to `file`; null ends it. Answers with the lines of the last trace."""
        path = argument(arguments, "file", str, None)
        qpns = argument(arguments, "qpns", list, None)
        limit = argument(arguments, "limit", int, DEFAULT_LIMIT)
        if qpns is not None and not all(type(qpn) is int and 0 <= qpn < 1 << 24 for qpn in qpns):
            raise CommandError(f"argument 'qpns' is {qpns!r}, expected queue pair numbers")
        if limit < 1:
            raise CommandError(f"argument 'limit' is {limit}, expected a positive number of lines")
        return {"lines": self._nic.trace_qps(path, qpns, limit)}

    def shutdown(self) -> dict[str, Any]:
        self._nic.stop()
        return {}

    # -- openings ----------------------------------------------------------------------------------------------------

    def _all(self) -> list[Opening]:
        return [*self._nic.user_contexts.by_id.values(), *self._nic.cm_files.by_id.values()]

    def _kind(self, opening: Opening) -> Openings[Any]:
        """What keeps the openings of this one's kind."""
        return self._nic.user_contexts if isinstance(opening, UserContext) else self._nic.cm_files

    def _named(self, arguments: Arguments) -> list[Opening]:
        """The openings that `contexts` names; those of verbs and of rdma_cm are numbered together."""
        wanted = argument(arguments, "contexts", list)
        known = {opening.id: opening for opening in self._all()}
        missing = [str(name) for name in wanted if name not in known]
        if missing:
            raise CommandError(f"no context {', '.join(missing)}", f"there are: {', '.join(known) or 'none'}")
        found = [known[name] for name in wanted]
        return sorted(found, key=lambda opening: not isinstance(opening, UserContext))

    def _held(self, arguments: Arguments, otherwise: str) -> list[Opening]:
        """The same, all of them held. Raises StateError with `otherwise`."""
        found = self._named(arguments)
        for opening in found:
            if not opening.held:
                raise StateError(f"context {opening.id} {otherwise}")
        return found

    def _of(self, pids: set[int]) -> list[Opening]:
        return [opening for opening in self._all() if opening.pid in pids]

    def hold(self, arguments: Arguments) -> dict[str, Any]:
        """The programs `pids` are frozen: take in what they sent, stop their queue pairs, ignore closed descriptors.

        Answers with the openings found, those of verbs and those of rdma_cm (none is not an error: the program does not
        use the device).
        """
        pids = set(argument(arguments, "pids", list))
        found = self._of(pids)
        if any(opening.held for opening in found):
            raise StateError("a context of these processes is held already")
        if found:
            self._nic.commands.serve_all()
            found = self._of(pids)
        for opening in found:
            self._kind(opening).hold(opening)
        return {"contexts": [opening.summary() for opening in found], "at": time.monotonic()}

    def dump(self, arguments: Arguments) -> dict[str, Any]:
        """Write the image of held openings to `file`."""
        path = argument(arguments, "file", str)
        found = self._held(arguments, "is not held: its program may be running")
        contexts = [opening for opening in found if isinstance(opening, UserContext)]
        records = self._nic.cm_files.dump([opening for opening in found if isinstance(opening, CmFile)])
        length = image.write(path, *checkpoint.dump(self._nic.adapter, contexts, records))
        return {"bytes": length, "contexts": [opening.id for opening in found]}

    def unhold(self, arguments: Arguments, respond: Respond) -> dict[str, Any] | None:
        """Roll back: the programs resume here. Peers get RESUME; answers as `resume` does."""
        return self._unhold(self._held(arguments, "is not held"), None, arguments, respond)

    def discard(self, arguments: Arguments) -> dict[str, Any]:
        """Forget held openings without a packet: they live elsewhere now, or were never resumed here."""
        for opening in self._held(arguments, "is in use here: hold it first"):
            self._kind(opening).discard(opening)
        return {}

    def reserve(self, arguments: Arguments) -> dict[str, Any]:
        """Check that contexts `contexts` with queue pairs `qpns` could be restored here."""
        adapter = self._nic.adapter
        for name in argument(arguments, "contexts", list, []):
            if name in adapter.contexts or name in self._nic.cm_files.by_id:
                raise StateError(f"context {name} exists here already")
        for qpn in argument(arguments, "qpns", list, []):
            if qpn in adapter.queue_pairs:
                raise StateError(f"QPN {qpn} is taken here; number bases must differ")
        return {"number_base": adapter.number_base}

    def restore(self, arguments: Arguments) -> dict[str, Any]:
        """Make the objects of image `file`, all Stopped, and the files of their channels.

        addresses: {address of the queue pairs at the source: address here}; those not named stay the same.
        """
        path = argument(arguments, "file", str)
        addresses = {
            ip_argument({"addresses": there}, "addresses"): ip_argument({"addresses": here}, "addresses")
            for there, here in argument(arguments, "addresses", dict, {}).items()
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
        return {"contexts": [opening.summary() for opening in (*contexts, *files)]}

    def attach(self, arguments: Arguments) -> dict[str, Any]:
        """The programs of restored openings exist again; `pids`: inner pid → pid here (of `contexts`, or of all)."""
        pids = argument(arguments, "pids", dict)
        named = "contexts" in arguments
        waiting = self._named(arguments) if named else self._all()
        attached = []
        for opening in waiting:
            outer = pids.get(str(opening.inner_pid))
            if opening.pid is not None or outer is None:
                continue
            if not isinstance(outer, int):
                raise CommandError(f"pid {outer!r} is not a number")
            opening.attach(outer)
            attached.append(opening.id)
        missing = [opening.id for opening in waiting if opening.pid is None and named]
        if missing:
            raise StateError(f"no process given for context {', '.join(missing)}")
        return {"contexts": attached}

    def resume(self, arguments: Arguments, respond: Respond) -> dict[str, Any] | None:
        """Resume restored openings and send RESUME, from `source_ip` where the old address is not here.

        wait (default true): answer when every peer has acknowledged, or fail after `timeout` seconds (default 10; the
        RESUMEs continue then). Answers with `started` and `settled` (times) and when each queue pair's was.
        """
        found = self._held(arguments, "is not held")
        source = ip_argument(arguments, "source_ip") if arguments.get("source_ip") is not None else None
        for opening in found:
            if opening.pid is None:
                raise StateError(f"context {opening.id} has no process yet: attach first")
        return self._unhold(found, source, arguments, respond)

    def _unhold(
        self, found: list[Opening], source: bytes | None, arguments: Arguments, respond: Respond
    ) -> dict[str, Any] | None:
        wait = argument(arguments, "wait", bool, True)
        timeout = float(argument(arguments, "timeout", (int, float), 10.0))
        open_processes(found)
        started = time.monotonic()
        for opening in found:
            self._kind(opening).unhold(opening, source)
        if not wait:
            return {"started": started}
        deadline = started + timeout
        qps = [qp for opening in found if isinstance(opening, UserContext) for qp in opening.queue_pairs]

        def settled(now: float) -> bool:
            left = [qp.qpn for qp in qps if not qp.transport.resume_settled]
            if left and now < deadline:
                return False
            if left:
                numbers = ", ".join(map(str, left[:8]))
                respond(
                    {
                        "ok": False,
                        "error": f"resume: no answer from the peers of QPN {numbers} within {timeout} s",
                        "hint": "do the flows lead to the new place? status shows remote_ip of each queue pair",
                        "started": started,
                    }
                )
                return True
            rows = [{"qpn": qp.qpn, "acked_at": qp.transport.movement.resume_acked_at} for qp in qps]
            respond({"ok": True, "started": started, "settled": time.monotonic(), "qps": rows})
            return True

        self._nic.loop.wait_for(settled)
        return None


Answer = dict[str, Any] | None
"""None: the command answers later through `respond`."""
Command = Callable[[Management, Arguments, Respond], Answer]


def _plain(method: Callable[[Management], Answer]) -> Command:
    return lambda management, _arguments, _respond: method(management)


def _taking(method: Callable[[Management, Arguments], Answer]) -> Command:
    return lambda management, arguments, _respond: method(management, arguments)


COMMANDS: Final[dict[str, Command]] = {
    "status": _plain(Management.status),
    "counters": _plain(Management.counters),
    "gaps": _taking(Management.gaps),
    "address_add": _taking(Management.address_add),
    "address_remove": _taking(Management.address_remove),
    "hold": _taking(Management.hold),
    "dump": _taking(Management.dump),
    "unhold": Management.unhold,
    "discard": _taking(Management.discard),
    "reserve": _taking(Management.reserve),
    "restore": _taking(Management.restore),
    "attach": _taking(Management.attach),
    "resume": Management.resume,
    "capture": _taking(Management.capture),
    "trace": _taking(Management.trace),
    "trace_qp": _taking(Management.trace_qp),
    "shutdown": _plain(Management.shutdown),
}
"""Name → method, by what it takes: nothing, the arguments, or the arguments and the way to answer later."""
