"""A rank's two connections to the controller."""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..protocol.sockets import ABSENCE_SECONDS, client_socket, keep_watch, rank_identity
from ..protocol.specs import RankSpec
from .contract import ControllerLost

POLL_MILLISECONDS = 500


class RankSockets:
    """The step and the bulk connection to the controller.

    ``poll`` raises ControllerLost when a connection has been down for ``absence`` seconds, or was
    not made within ``patience`` seconds.
    """

    _MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

    def __init__(self, spec: RankSpec, absence: float = ABSENCE_SECONDS, patience: float = 60.0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._addresses: dict[zmq.Socket[bytes], str] = {}  # by the monitor of the socket
        self._down: set[zmq.Socket[bytes]] = set()
        self.step = self._connect(spec, spec.step_address)
        self.bulk = self._connect(spec, spec.bulk_address)
        self._absence = absence
        self._lost_at = time.monotonic() + patience - absence

    def poll(self, milliseconds: int = POLL_MILLISECONDS) -> tuple[bool, bool, bool]:
        """Waits up to ``milliseconds``. Returns whether (both connections are up again, bulk has a
        message, step has a message).

        A rank must not say hello before its step connection is up: a plan sent to it could be lost.
        """
        ready = dict(self._poller.poll(milliseconds))
        made = [self._watch(monitor) for monitor in self._addresses if monitor in ready]
        connected = any(made) and not self._down
        if not made and time.monotonic() - self._lost_at > self._absence:
            addresses = " and ".join(
                self._addresses[monitor] for monitor in self._addresses if monitor in self._down
            )
            raise ControllerLost(f"no connection to the controller at {addresses} for {self._absence:g} s")
        return connected, self.bulk in ready, self.step in ready

    def discard(self) -> list[bytes]:
        """Reads everything that has arrived. Returns the messages of the bulk connection."""
        while self.step.poll(0):
            self.step.recv_multipart()
        messages = []
        while self.bulk.poll(0):
            messages.append(self.bulk.recv())
        return messages

    def close(self) -> None:
        """Closes everything; the last message has a second to leave."""
        for socket in (self.step, self.bulk):
            socket.disable_monitor()
        for monitor in self._addresses:
            monitor.close(linger=0)
        for socket in (self.step, self.bulk):
            socket.close(linger=1000)
        self._context.term()

    def _connect(self, spec: RankSpec, address: str) -> zmq.Socket[bytes]:
        socket = client_socket(self._context, zmq.DEALER, spec.keys, rank_identity(spec.rank))
        monitor = socket.get_monitor_socket(self._MONITORED)
        self._addresses[monitor] = address
        self._down.add(monitor)
        for each in (socket, monitor):
            self._poller.register(each, zmq.POLLIN)
        keep_watch(socket)
        socket.connect(address)
        return socket

    def _watch(self, monitor: zmq.Socket[bytes]) -> bool:
        """Reads one event. Returns whether it brings the connection up."""
        up = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if up:
            self._down.discard(monitor)
            self._lost_at = self._lost_at if self._down else float("inf")
        else:
            if not self._down:
                self._lost_at = time.monotonic()
            self._down.add(monitor)
        return up
