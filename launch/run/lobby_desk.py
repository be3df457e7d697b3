"""The launcher's end of the lobby: receives the reports of processes."""

from __future__ import annotations

import msgspec
import zmq

from ...engine.protocol.cluster_state import Report
from ...engine.protocol.sockets import authenticate, server_socket


class LobbyDesk:
    """A PULL socket on ``host`` that only holders of ``allowed`` keys can write to."""

    def __init__(self, host: str, public: str, secret: str, allowed: tuple[str, ...]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = authenticate(self._context, allowed)
        self.socket = server_socket(self._context, zmq.PULL, public, secret)
        port = self.socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._decoder = msgspec.msgpack.Decoder(Report)

    def read(self, timeout: float) -> list[Report]:
        """All reports, after waiting up to ``timeout`` seconds for the first."""
        reports = []
        wait = max(0, int(timeout * 1000))
        while self.socket.poll(wait):
            reports.append(self._decoder.decode(self.socket.recv()))
            wait = 0
        return reports

    def close(self) -> None:
        self.socket.close()
        self._gate.stop()
        self._context.term()
