"""Token masks of a step, computed beside its forward pass.

The limits of a matcher keep a mask short. Should one take long all the same, its row is given up,
which ends that request with an error; the rows of others get theirs and the step goes on. It does
without torch. Suffixes: S rows with a grammar, W words of 32 tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64
from ..protocol.turns import Turns

_LOG = logging.getLogger(__name__)

MASK_CPU_SECONDS = 0.5
"""Most CPU time for one mask. The longest within the limits took 0.15 s."""

MASK_SECONDS = 10.0
"""Most time for one mask where other processes keep the CPU."""

LOOK_SECONDS = 0.05

Bits = NDArray[np.int32]


class Masked(Protocol):
    """A row with a mask. An ``error`` ends its request; then any token will do."""

    slot: int
    error: str

    def fill(self, bits_W: Bits) -> None: ...


class Filler:
    """The thread that computes masks. Where it does not come back, another takes its place; the end
    of the process waits for neither.
    """

    def __init__(self) -> None:
        self._work = _start()

    def fill(self, rows: Sequence[Masked], bits_SW: Bits) -> _Filling:
        filling = _Filling(rows, bits_SW)
        self._work.put(filling)
        return filling

    def abandon(self) -> None:
        """Leaves the thread with its endless work."""
        self.close()
        self._work = _start()

    def close(self) -> None:
        self._work.put(None)


def _start() -> SimpleQueue[_Filling | None]:
    work: SimpleQueue[_Filling | None] = SimpleQueue()
    threading.Thread(target=_serve, args=(work,), name="masks", daemon=True).start()
    return work


def _serve(work: SimpleQueue[_Filling | None]) -> None:
    while (filling := work.get()) is not None:
        try:
            filling.run()
            filling.finished.set_result(None)
        except BaseException as error:
            filling.finished.set_exception(error)


class _Filling:
    """Rows whose masks one thread computes, in order. ``at`` is the row it has come to."""

    def __init__(self, rows: Sequence[Masked], bits_SW: Bits) -> None:
        self.rows = rows
        self.bits_SW = bits_SW
        self.finished: Future[None] = Future()
        self.at = 0
        self._thread = 0
        self._began: tuple[float, float, float] | None = None
        self.stood_still = 0.0  # seconds in which nothing ran, the whole process stood still

    def run(self) -> None:
        self._thread = threading.get_ident()
        for number, (row, bits_W) in enumerate(zip(self.rows, self.bits_SW, strict=True)):
            self._began = time.thread_time(), time.monotonic(), self.stood_still
            self.at = number
            row.fill(bits_W)
        self._began = None

    @property
    def too_long(self) -> bool:
        """Whether the row at hand has had more time than a mask may take."""
        began = self._began
        if began is None:
            return False
        cpu = time.clock_gettime(time.pthread_getcpuclockid(self._thread)) - began[0]
        wall = time.monotonic() - began[1] - (self.stood_still - began[2])
        return cpu > MASK_CPU_SECONDS or wall > MASK_SECONDS


class Masks:
    """Masks that are being computed: the tokens that each slot with a grammar may sample."""

    def __init__(self, filler: Filler, rows: Sequence[Masked], bits_SW: Bits) -> None:
        self._filler = filler
        self._index = {row.slot: index for index, row in enumerate(rows)}
        self._bits_SW = bits_SW
        self._filling = filler.fill(rows, bits_SW)

    def take(self, slots: Int64) -> tuple[Int64, Bits]:
        """Waits for the masks. Returns the indices [S] of the rows with ``slots`` that have one,
        and the masks [S, W], a bit per token.
        """
        given_up: list[int] = []
        while not self._wait():
            row = self._filling.rows[self._filling.at]
            row.error = "computing which tokens may follow took too long"
            _LOG.error("slot %d: its mask takes too long; a thread is lost to it", row.slot)
            given_up.append(self._index[row.slot])
            self._filler.abandon()
            rest = slice(self._filling.at + 1, None)
            self._filling = self._filler.fill(self._filling.rows[rest], self._filling.bits_SW[rest])
        found = [(row, self._index[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._index]
        bits_SW = self._bits_SW[[index for _, index in found]]
        bits_SW[[number for number, (_, index) in enumerate(found) if index in given_up]] = -1
        return np.array([row for row, _ in found], np.int64), bits_SW

    def _wait(self) -> bool:
        """Waits until all masks are there. False when one takes too long."""
        turns = Turns(time.monotonic())
        while True:
            try:
                self._filling.finished.result(LOOK_SECONDS)
                return True
            except TimeoutError:
                self._filling.stood_still += turns.take(time.monotonic())
                if self._filling.too_long:
                    return False
