"""The frontend's line to its grammar keeper: starts the process, starts it again after its death,
and opens checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time

import msgspec

from ..api.errors import ApiError
from .keeper import READY, KeeperSpec

START_SECONDS = 60.0
AGAIN_SECONDS = 5.0
END_SECONDS = 2.0
_MODULE = f"{__package__}.keeper"
_log = logging.getLogger("lockstep.frontend")


class KeeperLine:
    """Owns the keeper process. Belongs to one event loop."""

    def __init__(self, spec: KeeperSpec) -> None:
        self._spec = spec
        self._running: _Running | None = None
        self._starting: asyncio.Task[_Running] | None = None
        self._failed: tuple[float, str] | None = None

    @property
    def trouble(self) -> str | None:
        """Why no keeper could be started, or None."""
        return None if self._failed is None else self._failed[1]

    @property
    def pid(self) -> int | None:
        return None if self._running is None else self._running.process.pid

    def start(self) -> None:
        """Begins to start the keeper, so that the first check need not wait for it."""
        if self._running is None and self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(_start(self._spec))
            self._starting.add_done_callback(self._on_started)

    async def open(self) -> socket.socket:
        """A socket for one check. Raises ApiError 503 where no keeper can be started."""
        for _ in range(2):  # the first may have died since the last check
            running = await self._ready()
            mine, theirs = socket.socketpair()
            mine.setblocking(False)
            try:
                with theirs:
                    socket.send_fds(running.control, [b"c"], [theirs.fileno()])
                return mine
            except BlockingIOError:
                mine.close()
                break
            except OSError:
                mine.close()
                if running is self._running:
                    self._running = None
                    _log.error("the grammar keeper has died (%s): starting another", running.end())
        raise ApiError(503, "Grammars cannot be checked at the moment", retry_after=1)

    def close(self) -> None:
        """Ends the keeper and what it checks."""
        if self._starting is not None:
            self._starting.cancel()
        if self._running is not None:
            self._running.end()
            self._running = None

    async def _ready(self) -> _Running:
        if self._running is not None:
            return self._running
        if self._failed is not None and time.monotonic() - self._failed[0] < AGAIN_SECONDS:
            raise ApiError(503, self._failed[1], retry_after=AGAIN_SECONDS)
        self.start()
        assert self._starting is not None
        try:
            return await asyncio.shield(self._starting)
        except (OSError, TimeoutError) as error:
            raise ApiError(503, _cannot(error), retry_after=AGAIN_SECONDS) from None

    def _on_started(self, starting: asyncio.Task[_Running]) -> None:
        self._starting = None
        if starting.cancelled():
            return
        error = starting.exception()
        if error is None:
            self._running, self._failed = starting.result(), None
        else:
            self._failed = time.monotonic(), _cannot(error)
            _log.error("%s", self._failed[1])


class _Running:
    """A keeper process and the control socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control

    def end(self) -> str:
        """Ends the process, which ends its children; returns how it ended."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"exit code {self.process.wait(END_SECONDS)}"
        self.process.kill()
        return f"killed, exit code {self.process.wait()}"


async def _start(spec: KeeperSpec) -> _Running:
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    with theirs:
        number = str(theirs.fileno())
        command = [sys.executable, "-m", _MODULE, number, msgspec.json.encode(spec).decode()]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    try:
        reading = asyncio.get_running_loop().sock_recv(mine, len(READY))
        if await asyncio.wait_for(reading, START_SECONDS) != READY:
            raise OSError(f"exit code {process.wait(END_SECONDS)}")
    except BaseException:
        mine.close()
        process.kill()
        process.wait()
        raise
    return _Running(process, mine)


def _cannot(error: BaseException) -> str:
    cause = f"not ready after {START_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
    return f"Grammars cannot be checked: the grammar keeper did not start: {cause}"
