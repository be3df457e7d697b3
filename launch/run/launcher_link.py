"""The launcher's connection to the controller: a frontend called ``launcher`` without requests."""

from __future__ import annotations

import math
import time

import msgspec
import zmq

from ...engine.protocol.cluster_state import ClusterState
from ...engine.protocol.frontends import Degraded, Drain, FrontendHello, RankLost, ToFrontend
from ...engine.protocol.message import Message, Stop
from ...engine.protocol.sockets import client_socket, encode
from ...engine.protocol.specs import Keys


class LauncherLink:
    """Holds the last ClusterState received (``state``) and its time (``heard``, monotonic seconds).

    The lease never expires: the launcher is silent while ranks load, and no controller outlives
    its launcher anyway.
    """

    def __init__(self, address: str, keys: Keys) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = client_socket(self._context, zmq.DEALER, keys, b"launcher")
        self.socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self.state: ClusterState | None = None
        self.heard = time.monotonic()
        self._send(FrontendHello("launcher", lease=math.inf))

    def read(self, timeout: float) -> ClusterState | None:
        """Reads all messages, waits up to ``timeout`` seconds for the first; returns ``state``."""
        wait = max(0, int(timeout * 1000))
        while self.socket.poll(wait):
            message = self._decoder.decode(self.socket.recv())
            wait = 0
            if isinstance(message, ClusterState):
                self.state = message
                self.heard = time.monotonic()
        return self.state

    def drain(self, deadline: float) -> None:
        self._send(Drain(deadline))

    def rank_lost(self, rank: int, reason: str) -> None:
        self._send(RankLost(rank, reason))

    def degraded(self, reason: str) -> None:
        self._send(Degraded(reason))

    def stop(self, reason: str) -> None:
        self._send(Stop(reason))

    def close(self) -> None:
        self.socket.close(linger=500)
        self._context.term()

    def _send(self, message: Message) -> None:
        self.socket.send(encode(message), zmq.DONTWAIT)
