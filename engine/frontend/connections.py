"""Takes the frontend's connections from the launcher, which accepts them and passes descriptors.

The line to the launcher is a packet socket in the abstract namespace (Linux). The frontend sends
its name, receives the memory of the shared counters, and sends ``OPEN`` when it can serve. From
then on it receives a packet with a descriptor for each connection, answers ``TAKEN`` to each, and
sends ``ENDED`` when one has closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from ..protocol.specs import AcceptorSpec
from .metrics.shared_counters import SharedCounters

OPEN, TAKEN, ENDED = b"o", b"t", b"e"
HELLO_SECONDS = 10.0
MAX_PACKET = 4096
_AGAIN_SECONDS = 0.05
_log = logging.getLogger("lockstep.frontend")

MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]  # called with what to call at the end


def connect(spec: AcceptorSpec, index: int) -> tuple[socket.socket, SharedCounters]:
    """The line to the launcher, and the counters whose memory came over it. Raises TimeoutError if
    the launcher does not answer, ConnectionError if it is not there.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(HELLO_SECONDS)
    try:
        line.connect(b"\0" + spec.address.encode())
        line.send(f"{spec.token} {index}".encode())
        _, [descriptor], _, _ = socket.recv_fds(line, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        line.close()
        text = f"the launcher did not pass the memory of the counters within {HELLO_SECONDS:g} s"
        raise TimeoutError(text) from None
    except (OSError, ValueError) as error:
        line.close()
        raise ConnectionError(f"the launcher's acceptor cannot be reached: {error}") from error
    line.setblocking(False)
    return line, SharedCounters(descriptor, index)


class Intake:
    """Takes connections from ``line`` on the running loop, and sends OPEN at once. ``make`` makes
    the protocol of a connection.
    """

    def __init__(self, line: socket.socket, make: MakeProtocol) -> None:
        self._line = line
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._starting: set[asyncio.Task[None]] = set()
        self._unsaid = b""
        self._loop.add_reader(line.fileno(), self._take)
        self._say(OPEN)

    def close(self) -> None:
        """Takes no more connections and closes the line; the launcher offers untaken connections to
        other frontends. Open ones stay. Closing twice is harmless.
        """
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._line.fileno())
            self._line.close()

    def _take(self) -> None:
        while not self._closed:
            try:
                packet, descriptors, flags, _ = socket.recv_fds(
                    self._line, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                _log.error("the line to the launcher's acceptor broke: %s", error)
                self.close()
                return
            if not packet:  # the launcher accepts no more connections, or has died
                self.close()
                return
            self._say(TAKEN)
            if flags & socket.MSG_CTRUNC or not descriptors:
                _log.error("a connection was lost: this process has no descriptor left for it")
                self._say(ENDED)
            for descriptor in descriptors:
                task = self._loop.create_task(self._start(socket.socket(fileno=descriptor)))
                self._starting.add(task)
                task.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: self._make(self._ended), connection)
        except OSError:  # the client has gone already
            connection.close()
            self._ended()

    def _ended(self) -> None:
        self._say(ENDED)

    def _say(self, word: bytes) -> None:
        """Sends ``word`` at the end of the loop's turn, together with the others of that turn."""
        if not self._closed:
            if not self._unsaid:
                self._loop.call_soon(self._send)
            self._unsaid += word

    def _send(self) -> None:
        if self._closed:
            return
        words = self._unsaid[:MAX_PACKET]
        try:
            self._line.send(words)
        except BlockingIOError:
            self._loop.call_later(_AGAIN_SECONDS, self._send)
            return
        except OSError:  # ``_take`` sees the end of the line
            self._unsaid = b""
            return
        self._unsaid = self._unsaid[len(words) :]
        if self._unsaid:
            self._loop.call_soon(self._send)
