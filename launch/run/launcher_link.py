"""The launcher's connection to the controller: a frontend called ``launcher`` without requests."""

from __future__ import annotations

import math
import time

import msgspec
import zmq

from ...engine.protocol.cluster_state import ClusterState
from ...engine.protocol.frontends import Degraded, Drain, FrontendHello, RankLost, ToFrontend
from ...engine.protocol.message import Message, Stop, encode
from ...engine.protocol.sockets import client_socket
from ...engine.protocol.specs import Keys

_REPEAT = 1.0
_SILENCE = 3.0  # the controller sends its state twice a second


class LauncherLink:
    """Holds the last ClusterState received (``state``) and its time (``heard``, monotonic seconds).

    The lease never expires: the launcher is silent while ranks load, and no controller outlives
    its launcher anyway. A controller that follows another has the same address and keys.
    """

    def __init__(self, address: str, keys: Keys) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = client_socket(self._context, zmq.DEALER, keys, b"launcher")
        self.socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self.state: ClusterState | None = None
        self.heard = time.monotonic()
        self._lost: dict[int, RankLost] = {}
        self._degraded = ""
        self._next_repeat = 0.0
        self._hello = FrontendHello("launcher", lease=math.inf)
        self.greet()

    def read(self, timeout: float) -> ClusterState | None:
        """Reads all messages, waits up to ``timeout`` seconds for the first; returns ``state``."""
        wait = max(0, int(timeout * 1000))
        while self.socket.poll(wait):
            message = self._decoder.decode(self.socket.recv())
            wait = 0
            if isinstance(message, ClusterState):
                self.state = message
                self.heard = time.monotonic()
        self._repeat()
        return self.state

    def _repeat(self) -> None:
        """Repeats, each second, every message that the last state does not reflect: messages are
        lost when the controller's connection breaks. Sends another hello to a silent controller.
        """
        now, state = time.monotonic(), self.state
        if state is None or now < self._next_repeat:
            return
        self._next_repeat = now + _REPEAT
        if now - self.heard > _SILENCE:
            self.greet()
            return
        for rank in state.ranks:
            lost = self._lost.get(rank.rank)
            if lost is not None and lost.pid == rank.pid and rank.state != "lost":
                self._send(lost)
        if state.degraded != self._degraded:
            self._send(Degraded(self._degraded))

    def greet(self) -> None:
        """Sends a hello to a controller that does not know the launcher yet, once it runs."""
        self._send(self._hello)

    def drain(self, deadline: float) -> None:
        self._send(Drain(deadline))

    def rank_lost(self, rank: int, reason: str, pid: int) -> None:
        self._lost[rank] = RankLost(rank, reason, pid)
        self._send(self._lost[rank])

    def degraded(self, reason: str) -> None:
        self._degraded = reason
        self._send(Degraded(reason))

    def stop(self, reason: str) -> None:
        self._send(Stop(reason))

    def close(self) -> None:
        self.socket.close(linger=500)
        self._context.term()

    def _send(self, message: Message) -> None:
        self.socket.send(encode(message), zmq.DONTWAIT)
