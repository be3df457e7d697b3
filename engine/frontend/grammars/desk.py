"""The grammar desk of a frontend: decides which grammars are followed, before anything is queued.

Answers are kept, so a grammar that was checked costs nothing. Others are checked in a process each,
which ``keeper.py`` starts and which ends at the limits of time and memory. One place is reserved
for quick checks, so that simple grammars are checked soon, whatever others send.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from ..api.errors import ApiError
from .claim import Claim
from .keeper import LENGTH, KeeperSpec
from .keeper_line import KeeperLine

MAX_GRAMMAR_BYTES = 256 * 1024
PLACES = 4
MAX_JOBS = 64
QUICK_SECONDS = 0.1
QUEUE_SECONDS = 10.0
RETRY_SECONDS = 5.0
MAX_ANSWERS = 4096
_MEMORY_ENDS = (signal.SIGABRT, signal.SIGKILL)
_log = logging.getLogger("lockstep.frontend")


@dataclass(slots=True)
class _Job:
    """The check of some claims, and the number of requests that wait for it."""

    task: asyncio.Task[None]
    began: float = field(default_factory=time.monotonic)
    waiting: int = 0


class GrammarDesk:
    """Checks grammars. Belongs to one event loop."""

    def __init__(self, spec: KeeperSpec) -> None:
        self._spec = spec
        self._line = KeeperLine(spec)
        self._places = asyncio.Semaphore(PLACES)
        self._num_slow = 0
        self._num_waiting = 0
        self._jobs: dict[tuple[bytes, ...], _Job] = {}
        self._answers: OrderedDict[bytes, str] = OrderedDict()

    @property
    def wall_seconds(self) -> float:
        """The longest that a check may take on a busy machine."""
        return 10 + 10 * self._spec.seconds

    @property
    def keeper_pid(self) -> int | None:
        return self._line.pid

    @property
    def trouble(self) -> str | None:
        """Why no grammar is checked at present, or None."""
        if self._line.trouble is not None:
            return self._line.trouble
        oldest = min((job.began for job in self._jobs.values()), default=time.monotonic())
        seconds = time.monotonic() - oldest
        if seconds > 2 * (QUEUE_SECONDS + self.wall_seconds):
            return f"Grammars cannot be checked: one has waited for {seconds:.0f} s"
        return None

    def start(self) -> None:
        self._line.start()

    def close(self) -> None:
        for job in self._jobs.values():
            job.task.cancel()
        self._line.close()

    def settled(self, claims: Sequence[Claim]) -> bool:
        """Whether all claims are known to be followed. Raises ApiError 400 for one that is not."""
        return not self._unknown(claims)

    async def check(self, claims: Sequence[Claim]) -> None:
        """Returns when all claims can be followed. Raises ApiError: 400 for one that cannot, 503
        where there is no time for a check.
        """
        unknown = self._unknown(claims)
        if not unknown:
            return
        key = tuple(claim.digest for claim in unknown)
        job = self._jobs.get(key)
        if job is None:
            if len(self._jobs) >= MAX_JOBS:
                raise _busy(f"{MAX_JOBS} requests wait for it")
            job = self._jobs[key] = _Job(asyncio.get_running_loop().create_task(self._run(unknown)))
            job.task.add_done_callback(lambda task: self._on_done(key, task))
        job.waiting += 1
        try:
            await asyncio.shield(job.task)
        finally:
            job.waiting -= 1
            if not job.waiting:
                job.task.cancel()
        if self._unknown(claims):
            raise ApiError(500, "A grammar was checked without an answer")

    def _on_done(self, key: tuple[bytes, ...], task: asyncio.Task[None]) -> None:
        del self._jobs[key]
        if not task.cancelled():
            task.exception()  # its requests have it, unless they have all gone

    def _unknown(self, claims: Iterable[Claim]) -> list[Claim]:
        """Claims without an answer. Raises ApiError 400 for the first that has a fault."""
        unknown: dict[bytes, Claim] = {}
        for claim in claims:
            size = len(claim.grammar)
            if size > MAX_GRAMMAR_BYTES:
                text = f"its grammar has {size} bytes, at most {MAX_GRAMMAR_BYTES} are allowed"
                raise claim.refused(text)
            digest = claim.digest
            fault = self._answers.get(digest)
            if fault is None:
                unknown[digest] = claim
            else:
                self._answers.move_to_end(digest)
                if fault:
                    raise claim.refused(fault)
        return list(unknown.values())

    # ----------------------------------------------------------------- one check

    async def _run(self, claims: Sequence[Claim]) -> None:
        self._num_waiting += 1
        try:
            await asyncio.wait_for(self._places.acquire(), QUEUE_SECONDS)
        except TimeoutError:
            raise _busy(f"there was no place for {QUEUE_SECONDS:g} s") from None
        finally:
            self._num_waiting -= 1
        try:
            line = await self._line.open()
            asking = asyncio.get_running_loop().create_task(self._ask(line, claims))
            try:
                await self._wait(asking)
            finally:
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
        finally:
            self._places.release()

    async def _wait(self, asking: asyncio.Task[None]) -> None:
        """Waits for a check. A slow one is abandoned if all other places have slow ones and another
        check waits.
        """
        until = time.monotonic() + self.wall_seconds
        slow = False
        try:
            while not (await asyncio.wait({asking}, timeout=QUICK_SECONDS))[0]:
                if time.monotonic() > until:
                    raise _busy(f"this one was not finished after {self.wall_seconds:g} s")
                if not slow and self._num_slow < PLACES - 1:
                    slow = True
                    self._num_slow += 1
                elif not slow and self._num_waiting:
                    raise _busy("others that take long are being checked")
        finally:
            self._num_slow -= slow
        asking.result()

    async def _ask(self, line: socket.socket, claims: Sequence[Claim]) -> None:
        """Lets a child of the keeper check claims, and keeps its answers. Closing the socket ends
        the child.
        """
        reader, writer = await asyncio.open_connection(sock=line)
        try:
            body = msgspec.msgpack.encode([claim.grammar for claim in claims])
            writer.write(LENGTH.pack(len(body)) + body)
            for claim in claims:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                fault = msgspec.msgpack.decode(await reader.readexactly(size), type=str | int)
                if isinstance(fault, int):
                    fault = self._cut(claim, fault)
                self._keep(claim, fault)
                if fault:
                    return
        except (OSError, asyncio.IncompleteReadError):
            raise _busy("the process that does it has died") from None
        finally:
            writer.close()

    def _cut(self, claim: Claim, ended_by: int) -> str:
        """The fault of a claim whose child was ended by a signal."""
        if ended_by == signal.SIGPROF:
            fault = f"checking it takes more than {self._spec.seconds:g} s (frontend.grammar_seconds)"
        elif ended_by in _MEMORY_ENDS:
            fault = f"checking it takes more than {self._spec.memory} bytes (frontend.grammar_memory)"
        elif ended_by:
            fault = "checking it ends in a crash"
        else:
            raise ApiError(500, f"{claim.param}: its grammar could not be checked")
        _log.warning("%s: %s", claim.param, fault)
        return fault

    def _keep(self, claim: Claim, fault: str) -> None:
        self._answers[claim.digest] = fault
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)


def _busy(why: str) -> ApiError:
    text = f"Grammars of structured output cannot be checked now: {why}"
    return ApiError(503, text, retry_after=RETRY_SECONDS)
