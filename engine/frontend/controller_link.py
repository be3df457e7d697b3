"""The link to the controller: a DEALER socket on the event loop, heartbeats, and the watch for a
controller that falls silent or a connection that breaks.

The socket's descriptor is edge-triggered: after it fires, and after every send, the socket must be
read until it is empty.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Abort, Drain, FrontendHello, Heartbeat, Rejected, Started, Submit, TokenBatch
from ..protocol.message import Stop, encode
from ..protocol.results import PromptLogprobs
from ..protocol.sockets import client_socket
from ..protocol.specs import FrontendSpec
from ..protocol.timeline import AskTimeline, StepSpans, TimelineEnd
from ..protocol.turns import Turns

LEASE = 10.0
BEAT = 1.0
SILENCE = 5.0  # the controller sends its state twice a second

FromController = (
    TokenBatch | PromptLogprobs | Started | Rejected | ClusterState | StepSpans | TimelineEnd | Stop
)
_log = logging.getLogger("lockstep.frontend")


class ControllerLink:
    """Belongs to the running loop, and sends a hello at once. Sends without waiting; calls
    ``on_message`` with each message.

    ``lost``: the controller does not answer. After ``spec.pause_deadline`` seconds without an
    answer, ``on_lost`` is called. After silence, a broken connection or a standstill of this
    process, messages may be lost: it repeats the hello until it is answered, and then calls
    ``on_found``.
    """

    def __init__(
        self,
        spec: FrontendSpec,
        on_message: Callable[[FromController], None],
        on_found: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._hello = FrontendHello(spec.name, LEASE, secrets.randbits(62))
        self._on_message = on_message
        self._on_found = on_found
        self._on_lost = on_lost
        self._patience = spec.pause_deadline
        self._decode = msgspec.msgpack.Decoder(FromController).decode
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = client_socket(self._context, zmq.DEALER, spec.keys, spec.name.encode())
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(spec.address)
        self._descriptor: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._read_scheduled = False
        self._heard = time.monotonic()
        self._turns = Turns(self._heard)
        self.lost = True  # until the first message
        self._doubtful = False  # messages may be lost
        self._given_up = False
        self._connections = 0
        self._loop.add_reader(self._descriptor, self._read)
        self.send(self._hello)
        self._beats = self._loop.create_task(self._beat())

    def send(self, message: Submit | Abort | Heartbeat | Drain | FrontendHello | AskTimeline) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:  # no connection to queue for: the controller has refused our key
            self.lost = self._doubtful = True
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._read_after_send)

    def close(self) -> None:
        """Waits at most half a second until all messages have left."""
        self._beats.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=500)
        self._context.term()

    def _read_after_send(self) -> None:
        self._read_scheduled = False
        self._read()

    def _read(self) -> None:
        receive = self._socket.recv
        answered = False
        while not self._socket.closed:
            try:
                frame = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._heard = time.monotonic()
            answered = True
            try:
                self._on_message(self._decode(frame))
            except Exception:  # the socket must be read until it is empty, even past a bad message
                _log.exception("a message of %d bytes from the controller could not be handled", len(frame))
        if answered:
            self.lost = self._given_up = False
            if self._doubtful:
                self._doubtful = False
                self.send(self._hello)  # first: our lease may have ended
                self._on_found()

    async def _beat(self) -> None:
        """Sends heartbeats and watches for the controller's. Time in which our own process stood
        still does not count as silence of the controller.
        """
        while True:
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            stood_still = self._turns.take(now) > 0.0
            if self._reconnected() or stood_still:
                self._doubtful = True
            self._read()
            silence = now - self._heard
            if not self.lost and silence > SILENCE and self._turns.settled(now):
                self.lost = self._doubtful = True
                _log.error("the controller has been silent for %.1f s", silence)
            if self.lost and not self._given_up and silence > self._patience:
                self._given_up = True
                self._on_lost()
            self.send(self._hello if self.lost or self._doubtful else Heartbeat())

    def _reconnected(self) -> bool:
        """Whether a connection was made since the last call, and it was not the first."""
        before = self._connections
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._connections += 1
        return before > 0 and self._connections > before
