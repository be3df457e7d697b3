"""Accepts connections on the cluster's port and passes each to the frontend with the fewest.

If processes share a port, the kernel chooses, and spreads few connections unevenly. Of 64
connections opened at once on 4 processes the fullest got 1.25 times its share in the median with
SO_REUSEPORT (1.50 at worst), 1.88 (2.94) with one listening socket for all, and exactly its share
here, for 7 to 38 us more CPU per connection and none per request (2 cores of an AMD EPYC, 15 runs
each). When a frontend dies, connections that it had not taken go to the others.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from ...engine.frontend.connections import ENDED, MAX_PACKET, OPEN, TAKEN
from ...engine.frontend.metrics.shared_counters import shared_bytes
from ...engine.protocol.specs import AcceptorSpec
from ..cluster.cluster import LaunchError
from ..cluster.ports import bound_socket

BACKLOG = 2048
_MAX_OFFERED = 32  # untaken connections of a frontend above which others get new ones
_MAX_STRANGERS = 16
_BURST = 32
_SHORT_OF_DESCRIPTORS = 0.1


@dataclass(eq=False)
class _Channel:
    """A line to a frontend. ``offered``: connections not taken yet, and since when. ``num_open``:
    connections not ended.
    """

    line: socket.socket
    index: int = -1
    ready: bool = False
    num_open: int = 0
    offered: deque[tuple[socket.socket, float]] = field(default_factory=deque)


class Acceptor:
    """Binds at once, so that a taken port is a LaunchError before anything starts; listens from
    ``open`` on.

    One thread does all the work. ``spec``: what frontends need to join.
    """

    def __init__(self, host: str, port: int, num_frontends: int) -> None:
        self._listener = bound_socket(host, port)
        self.port = int(self._listener.getsockname()[1])
        self.spec = AcceptorSpec(address=f"lockstep-{secrets.token_hex(16)}", token=secrets.token_hex(32))
        self._num_frontends = num_frontends
        self._board = os.memfd_create("lockstep-board")
        os.ftruncate(self._board, shared_bytes(num_frontends))
        self._desk = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._desk.bind(b"\0" + self.spec.address.encode())
        self._desk.listen(num_frontends + _MAX_STRANGERS)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._channels: list[_Channel] = []
        self._strangers: deque[_Channel] = deque()
        self._untaken: deque[socket.socket] = deque()  # connections of frontends that have gone
        self._turn = 0
        self._listening = self._closing = False
        self._problem: Exception | None = None
        for part in (self._listener, self._desk, self._woken):
            part.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="acceptor", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Listens. Raises LaunchError when another process has taken the port meanwhile."""
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:
            problem = f"cannot be listened on: {error.strerror}"
            raise LaunchError(f"frontend.port = {self.port}: {problem}") from None
        self._listening = True
        self._wake.send(b"w")

    @property
    def num_ready(self) -> int:
        """Number of frontends that take connections."""
        return sum(channel.ready for channel in list(self._channels))

    def stuck(self, seconds: float) -> list[int]:
        """Frontends that have left a connection untaken for more than ``seconds``."""
        since = time.monotonic() - seconds
        return [
            channel.index
            for channel in list(self._channels)
            if any(at < since for _, at in list(channel.offered)[:1])
        ]

    def close(self) -> None:
        """Refuses connections from now on. Closing twice is harmless."""
        self._closing = True
        if self._thread.is_alive():
            self._wake.send(b"w")
        self._thread.join()
        for part in (self._wake, self._woken):  # owned here, since the thread may end before it is woken
            part.close()

    def check(self) -> None:
        """Raises LaunchError if the thread has failed."""
        if (problem := self._problem) is not None:
            text = f"connections are no longer accepted: {type(problem).__name__}: {problem}"
            raise LaunchError(text) from problem

    # ----------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._problem = error
        finally:
            self._close_all()

    def _serve(self) -> None:
        self._selector.register(self._desk, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        accepting = False
        while not self._closing:
            while self._untaken and self._offer(self._untaken[0]):
                self._untaken.popleft()
            wanted = self._listening and not self._untaken and bool(self._candidates())
            if wanted != accepting:
                accepting = wanted
                if wanted:
                    self._selector.register(self._listener, selectors.EVENT_READ)
                else:
                    self._selector.unregister(self._listener)
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._desk:
                    self._meet()
                elif key.fileobj is self._woken:
                    self._woken.recv(MAX_PACKET)
                else:
                    self._hear(key.data)

    def _close_all(self) -> None:
        for channel in (*self._channels, *self._strangers):
            channel.line.close()
            self._untaken.extend(connection for connection, _ in channel.offered)
        for part in (*self._untaken, self._listener, self._desk):
            part.close()
        self._selector.close()
        os.close(self._board)

    def _candidates(self) -> list[_Channel]:
        return [
            channel for channel in self._channels if channel.ready and len(channel.offered) < _MAX_OFFERED
        ]

    def _accept(self) -> None:
        for _ in range(_BURST):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor left: connections wait in the backlog
                time.sleep(_SHORT_OF_DESCRIPTORS)
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._offer(connection):
                self._untaken.append(connection)
                return

    def _offer(self, connection: socket.socket) -> bool:
        """Passes a connection to the frontend with the fewest, in turn among equals.

        Returns whether one could take it.
        """
        count = self._num_frontends

        def order(channel: _Channel) -> tuple[int, int]:
            return channel.num_open, (channel.index - self._turn) % count

        for channel in sorted(self._candidates(), key=order):
            try:
                socket.send_fds(channel.line, [b"c"], [connection.fileno()])
            except BlockingIOError:
                continue
            except OSError:  # it has gone; ``_hear`` will read the end of the line
                channel.ready = False
                continue
            channel.num_open += 1
            channel.offered.append((connection, time.monotonic()))
            self._turn = (channel.index + 1) % count
            return True
        return False

    # ----------------------------------------------------------------- frontends

    def _meet(self) -> None:
        """Accepts a line from a process whose first packet must hold the token."""
        try:
            stranger = _Channel(self._desk.accept()[0])
        except OSError:
            return
        stranger.line.setblocking(False)
        self._selector.register(stranger.line, selectors.EVENT_READ, stranger)
        self._strangers.append(stranger)
        if len(self._strangers) > _MAX_STRANGERS:
            self._forget(self._strangers[0])

    def _hear(self, channel: _Channel) -> None:
        if channel.line.fileno() < 0:  # forgotten in this turn
            return
        try:
            words = channel.line.recv(MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if not words:
            self._forget(channel)
        elif channel.index < 0:
            self._admit(channel, words)
        else:
            channel.ready = channel.ready or OPEN in words
            channel.num_open -= words.count(ENDED)
            for _ in range(words.count(TAKEN)):
                channel.offered.popleft()[0].close()

    def _admit(self, stranger: _Channel, words: bytes) -> None:
        token, _, index = words.partition(b" ")
        known = (
            hmac.compare_digest(token, self.spec.token.encode())
            and index.isdigit()
            and int(index) < self._num_frontends
        )
        if not known:
            self._forget(stranger)
            return
        self._strangers.remove(stranger)
        stranger.index = int(index)
        for earlier in [channel for channel in self._channels if channel.index == stranger.index]:
            self._forget(earlier)
        self._channels.append(stranger)
        try:
            socket.send_fds(stranger.line, [b"b"], [self._board])
        except OSError:
            self._forget(stranger)

    def _forget(self, channel: _Channel) -> None:
        """Drops a line that has ended; its untaken connections are offered to others."""
        self._selector.unregister(channel.line)
        channel.line.close()
        self._untaken.extend(connection for connection, _ in channel.offered)
        channel.offered.clear()
        if channel in self._channels:
            self._channels.remove(channel)
        else:
            self._strangers.remove(channel)
