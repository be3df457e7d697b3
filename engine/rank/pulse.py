"""The pulse of a rank: a thread that a step cannot block tells the controller of progress, cuts off
an epoch that is over or whose step is overdue, and leaves when the controller says Stop and the
step does not end.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import msgspec
import zmq

from ...parallel.recovery import SPENT_STATUS, ProcessSpent
from ..protocol.bulk import Disband, StepProgress
from ..protocol.message import Stop, encode
from ..protocol.sockets import client_socket, keep_watch, pulse_identity
from ..protocol.specs import RankSpec

_LOG = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
LEAVE_SECONDS = 1.0
"""Seconds after a Stop in which the loop may end by itself: it does unless a step keeps it."""


CUT_SECONDS = 0.25
"""Seconds after a Disband in which the loop may leave the epoch by itself: it does unless it waits
for a device."""


class Pacemaker(Protocol):
    """The step under way, as any thread may read it."""

    @property
    def progress(self) -> tuple[int, int, int] | None:
        """(epoch, step, phases entered so far); None between steps."""
        ...


class Pulse:
    """Says every second how far a step is that takes longer than that. ``leave`` ends the process
    with a status; a step that is cut off has nothing to save. ``cut`` ends what a device waits for
    in an epoch, or raises ProcessSpent where nothing can; so does ``cut_overdue``, called at every
    beat, where a step has been with the device for too long: the controller may be silent.
    """

    def __init__(
        self,
        spec: RankSpec,
        loop: Pacemaker,
        leave: Callable[[int], None],
        cut: Callable[[int], None],
        cut_overdue: Callable[[], None],
    ) -> None:
        self._spec, self._loop, self._leave = spec, loop, leave
        self._cut, self._cut_overdue = cut, cut_overdue
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = client_socket(context, zmq.DEALER, self._spec.keys, pulse_identity(self._spec.rank))
        keep_watch(socket)
        socket.connect(self._spec.bulk_address)
        try:
            self._beat(socket)
        finally:
            socket.close(linger=0)
            context.term()

    def _beat(self, socket: zmq.Socket[bytes]) -> None:
        decode = msgspec.msgpack.Decoder(Stop | Disband).decode
        before: tuple[int, int, int] | None = None
        while not self._ended.is_set():
            if socket.poll(int(1000 * BEAT_SECONDS)):
                message = decode(socket.recv())
                if isinstance(message, Disband):
                    if not self._ended.wait(CUT_SECONDS):
                        self._or_leave(functools.partial(self._cut, message.epoch))
                    continue
                if not self._ended.wait(LEAVE_SECONDS):
                    self._leave(0)
                return
            self._or_leave(self._cut_overdue)
            progress = self._loop.progress
            if progress is not None and before is not None and progress[:2] == before[:2]:
                socket.send(encode(StepProgress(self._spec.rank, *progress)), zmq.DONTWAIT)
            before = progress

    def _or_leave(self, cut: Callable[[], None]) -> None:
        try:
            cut()
        except ProcessSpent as spent:
            _LOG.warning("%s", spent)
            self._leave(SPENT_STATUS)
