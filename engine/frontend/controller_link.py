"""The link to the controller: a DEALER socket on the event loop, heartbeats, and the watch for a
controller that falls silent.

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

from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Abort, Drain, FrontendHello, Heartbeat, Rejected, Started, Submit, TokenBatch
from ..protocol.message import Stop
from ..protocol.results import PromptLogprobs
from ..protocol.sockets import client_socket, encode
from ..protocol.specs import FrontendSpec

LEASE = 10.0
BEAT = 1.0
SILENCE = 5.0  # the controller sends its state twice a second

FromController = TokenBatch | PromptLogprobs | Started | Rejected | ClusterState | Stop
_log = logging.getLogger("lockstep.frontend")


class ControllerLink:
    """Belongs to the running loop, and says hello at once. Sends without waiting; calls
    ``on_message`` with each message and ``on_lost`` when the controller has fallen silent.

    After a loss it says hello until it is answered, and so finds a restarted controller.
    """

    def __init__(
        self, spec: FrontendSpec, on_message: Callable[[FromController], None], on_lost: Callable[[], None]
    ) -> None:
        self._hello = FrontendHello(spec.name, LEASE, secrets.randbits(62))
        self._on_message = on_message
        self._on_lost = on_lost
        self._decode = msgspec.msgpack.Decoder(FromController).decode
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = client_socket(self._context, zmq.DEALER, spec.keys, spec.name.encode())
        self._socket.connect(spec.address)
        self._descriptor: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._read_scheduled = False
        self._heard = time.monotonic()
        self.lost = True  # until the first message
        self._loop.add_reader(self._descriptor, self._read)
        self.send(self._hello)
        self._beats = self._loop.create_task(self._beat())

    def send(self, message: Submit | Abort | Heartbeat | Drain | FrontendHello) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:  # no connection to queue for: the controller has refused our key
            self._lose()
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._read_after_send)

    def close(self) -> None:
        """Waits at most half a second until all messages have left."""
        self._beats.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=500)
        self._context.term()

    def _read_after_send(self) -> None:
        self._read_scheduled = False
        self._read()

    def _read(self) -> None:
        receive = self._socket.recv
        while not self._socket.closed:
            try:
                frame = receive(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            self.lost = False
            try:
                self._on_message(self._decode(frame))
            except Exception:  # the socket must be read until it is empty, even past a bad message
                _log.exception("a message of %d bytes from the controller could not be handled", len(frame))

    async def _beat(self) -> None:
        """Sends heartbeats and watches for the controller's. A second in which our own loop stalled
        does not count as silence of the controller.
        """
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            self._read()
            if self.lost:
                self.send(self._hello)
            elif now - before < 2 * BEAT and now - self._heard > SILENCE:
                self._lose()
            else:
                self.send(Heartbeat())

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            _log.error("the controller has been silent for %.1f s", time.monotonic() - self._heard)
            self._loop.call_soon(self._on_lost)
