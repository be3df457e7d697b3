"""Progress reports of a starting process to the launcher, and to its own log."""

from __future__ import annotations

import logging
import os
import socket as network
from types import TracebackType

import zmq

from .cluster_state import Report
from .message import encode
from .sockets import client_socket
from .specs import LobbySpec

_log = logging.getLogger(__name__)


class Lobby:
    """A process's end of the lobby: a PUSH socket to the launcher. Without a spec, reports go
    to the log only.

    Not thread-safe. ``close`` waits up to two seconds for the last report to leave, so that a
    process that fails says why.
    """

    def __init__(self, spec: LobbySpec | None, role: str, index: int = 0) -> None:
        self._role = role
        self._index = index
        self._host = network.gethostname()
        self._logged: tuple[str, str] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        if spec is not None:
            self._context = zmq.Context()
            self._socket = client_socket(self._context, zmq.PUSH, spec.keys)
            self._socket.connect(spec.address)

    def report(
        self, phase: str, detail: str = "", fraction: float = 0.0, address: tuple[str, ...] = ()
    ) -> None:
        """Sends a line; never blocks. ``phase`` is starting | compiling | loading | ready | failed
        | stopped. Each new phase is logged, each new detail too except while compiling.
        """
        logged = phase, "" if phase == "compiling" else detail
        if self._logged != logged and phase != "failed":  # the process logs its error in full
            _log.info("%s", f"{phase}: {detail}" if detail else phase)
            self._logged = logged
        if self._socket is None:
            return
        line = Report(self._role, self._index, self._host, os.getpid(), phase, detail, fraction, address)
        self._socket.send(encode(line), zmq.DONTWAIT)

    def close(self) -> None:
        """Lets the last report leave. Closing twice is harmless."""
        if self._socket is not None and self._context is not None:
            self._socket.close(linger=2000)
            self._context.term()
            self._socket = None

    def __enter__(self) -> Lobby:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
