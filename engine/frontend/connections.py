"""Where a frontend gets its connections: the launcher accepts them and passes their descriptors.

One packet socket in the abstract namespace (Linux). The frontend says who it is, gets the shared
board, says ``OPEN`` when it can serve, and from then on a packet with a descriptor per connection;
it answers ``TAKEN`` to each and says ``ENDED`` when one has closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..protocol.specs import AcceptorSpec
from .api.errors import error_body
from .metrics.shared_counters import Board

OPEN, TAKEN, ENDED = b"o", b"t", b"e"
HELLO_SECONDS = 10.0
MAX_PACKET = 4096
_AGAIN_SECONDS = 0.05
_log = logging.getLogger("lockstep.frontend")

MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]


class Connection(HttpToolsProtocol):
    """uvicorn's, and it says when it has ended; what is not HTTP it answers in the shape of all
    errors.
    """

    def __init__(self, *args: object, on_end: Callable[[], None], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._on_end = on_end

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_end()

    def send_400_response(self, msg: str) -> None:
        body = error_body(400, msg)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class Intake:
    """The frontend's end. Raises TimeoutError where the launcher does not answer, ConnectionError
    where it is not there.
    """

    def __init__(self, spec: AcceptorSpec, index: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(HELLO_SECONDS)
        try:
            self._socket.connect(b"\0" + spec.address.encode())
            self._socket.send(f"{spec.token} {index}".encode())
            _, [descriptor], _, _ = socket.recv_fds(self._socket, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            self._socket.close()
            raise TimeoutError(f"the launcher did not pass the board within {HELLO_SECONDS:g} s") from None
        except (OSError, ValueError) as error:
            self._socket.close()
            raise ConnectionError(f"the launcher's acceptor cannot be reached: {error}") from error
        self._socket.setblocking(False)
        self.board = Board(descriptor, index)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make: MakeProtocol | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._unsaid = b""

    def open(self, make: MakeProtocol) -> None:
        """On the running loop: takes connections from now on; ``make`` gets what its protocol has
        to call at the end of one.
        """
        self._loop, self._make = asyncio.get_running_loop(), make
        self._loop.add_reader(self._socket.fileno(), self._take)
        self._say(OPEN)

    def close(self) -> None:
        """Takes no more; the launcher offers elsewhere what was not taken. Connections that were
        stay. Closing twice is harmless.
        """
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()

    def _take(self) -> None:
        while self._loop is not None:
            try:
                packet, descriptors, flags, _ = socket.recv_fds(
                    self._socket, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                packet, flags, descriptors = b"", 0, []
                _log.error("the line to the launcher's acceptor broke: %s", error)
            if not packet:  # the launcher takes no more connections; it also says Stop, or has died
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
        assert self._make is not None
        make, loop = self._make, asyncio.get_running_loop()
        connection.setblocking(False)
        try:
            await loop.connect_accepted_socket(lambda: make(self._ended), connection)
        except OSError:  # the client has gone already
            connection.close()
            self._ended()

    def _ended(self) -> None:
        self._say(ENDED)

    def _say(self, word: bytes) -> None:
        """Words of one turn of the loop leave together."""
        if self._loop is not None:
            if not self._unsaid:
                self._loop.call_soon(self._send)
            self._unsaid += word

    def _send(self) -> None:
        if self._loop is None:
            return
        words = self._unsaid[:MAX_PACKET]
        try:
            self._socket.send(words)
        except BlockingIOError:
            self._loop.call_later(_AGAIN_SECONDS, self._send)
            return
        except OSError:  # ``_take`` meets the end of the line
            self._unsaid = b""
            return
        self._unsaid = self._unsaid[len(words) :]
        if self._unsaid:
            self._loop.call_soon(self._send)
