"""All user contexts of the NIC: the openings of verbs, with their doorbells, queue pairs and commands."""

from __future__ import annotations

import time

from softroce_ext.device.adapter import Adapter
from softroce_ext.device.opening import Openings
from softroce_ext.device.user_context import UserContext
from softroce_ext.port.packet_socket import Port
from softroce_ext.process.loop import Descriptors, Loop
from softroce_ext.uverbs.server import CommandServer


class UserContexts(Openings[UserContext]):
    """Watches the programs that have opened verbs, holds them for a move, and frees what they owned."""

    def __init__(
        self,
        adapter: Adapter,
        descriptors: Descriptors,
        *,
        loop: Loop,
        commands: CommandServer,
        port: Port,
    ) -> None:
        super().__init__(adapter.contexts, descriptors)
        self._adapter = adapter
        self._loop = loop
        self._commands = commands
        self._port = port

    def _watch_doorbell(self, context: UserContext) -> None:
        self._loop.watch_doorbell(context, self.drop)

    def _stop_watching_doorbell(self, context: UserContext) -> None:
        self._loop.stop_watching_doorbell(context)

    def _before_drop(self, context: UserContext) -> None:
        self._loop.settle(context)
        self._loop.last_turn(context.queue_pairs)

    def _close(self, context: UserContext) -> None:
        self._adapter.forget(context)

    def _discard(self, context: UserContext) -> None:
        self._adapter.forget(context)

    def _before_hold(self, context: UserContext) -> None:
        """Take in every command and doorbell that the frozen program has sent (nothing new can come)."""
        self._commands.serve_all()
        self._commands.fail_waiting(context)
        context.channel.silence_doorbell()
        context.channel.arm_doorbell()
        self._loop.serve_doorbell(context)

    def _stop(self, context: UserContext) -> None:
        for qp in context.queue_pairs:
            qp.transport.stop()
        # What was executed must be visible (memory written, completions in their queues) before anything is copied.
        self._adapter.engine.end_of_batch(time.monotonic())

    def _resume(self, context: UserContext, source: bytes | None) -> None:
        handles = []
        for qp in context.queue_pairs:
            path = qp.transport.attributes.path
            if path is not None:
                here = path.source_ip in self._port.own or (source is not None and len(source) != len(path.source_ip))
                path = path.replace(source_mac=self._port.mac, source_ip=None if here else source)
            qp.transport.resume(path)
            handles.append(qp.handle)
        context.channel.all_dirty(handles)
        self._loop.wake(context)
