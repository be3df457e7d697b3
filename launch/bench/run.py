"""Runs a benchmark: rounds in which the endpoints are loaded in turns."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from .endpoint import Endpoint, Question
from .figures import Round
from .turn import Turn, TurnProgress
from .workload import OfferedLoad, Workload

_REFRESH = 0.1  # seconds between displays of progress
_WARM_UP_TOKENS = 4
_WARM_UP_REQUESTS = 8  # for loads without a concurrency

ShowTurn = Callable[[TurnProgress], None]
"""Called several times a second with the turn under way."""

TellRound = Callable[[TurnProgress, Round], None]
"""Called with each round that has ended."""


class Bench:
    """Loads one endpoint, or two in turns: the first leads in one round, the second in the next.
    Prompts are never repeated, except for their shared part.

    ``rounds``: those that have ended, by load and place of the endpoint. ``broken``: why it ended
    early, or empty.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        workload: Workload,
        vocab_size: int,
        show: ShowTurn = lambda progress: None,
        tell: TellRound = lambda progress, found: None,
    ) -> None:
        self.rounds: dict[tuple[OfferedLoad, int], list[Round]] = {}
        self.broken = ""
        self._endpoints, self._workload, self._vocab_size = tuple(endpoints), workload, vocab_size
        self._show, self._tell = show, tell
        self._salt = secrets.token_hex(8)  # caches may remember the prompts of an earlier run

    async def run(self, stop: asyncio.Event) -> bool:
        """Until all rounds have ended (True), ``stop`` is set, or an endpoint answers nothing.

        Raises ServerError if the first warm-up is refused: a key, a model or a request is wrong.
        """
        working = asyncio.create_task(self._run_all(), name="benchmark")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.broken = "as asked; the round under way is not counted"
                return False
            working.result()
            return not self.broken
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _run_all(self) -> None:
        for load in self._workload.loads:
            places = range(len(self._endpoints))
            for place in places:
                if not await self._warm_up(load, place):
                    return
            for number in range(self._workload.rounds):
                for place in places if number % 2 == 0 else reversed(places):
                    if not await self._round(load, place, number):
                        return

    async def _warm_up(self, load: OfferedLoad, place: int) -> bool:
        """As many requests at once, with few tokens out; their times are dropped. Returns whether
        to go on.
        """
        endpoint = self._endpoints[place]
        count = load.concurrency or min(load.requests, _WARM_UP_REQUESTS)
        output = min(_WARM_UP_TOKENS, self._workload.output)
        progress = TurnProgress(f"{load}, warm-up, {endpoint.url}", count)
        draw = self._draw(load, self._workload.rounds, 1 + place)
        questions = self._questions(count, output, draw)
        found = await self._shown(Turn(endpoint, questions, [0.0] * count, None, progress))
        for request in found.requests:
            if request.failure is not None and request.failure.error.asked_wrongly:
                if not self.rounds:
                    raise request.failure.error
                self.broken = str(request.failure.error)
        return not self.broken

    async def _round(self, load: OfferedLoad, place: int, number: int) -> bool:
        """Measures one round at one endpoint. Returns whether to go on."""
        endpoint = self._endpoints[place]
        title = f"{load}, round {number + 1} of {self._workload.rounds}, {endpoint.url}"
        progress = TurnProgress(title, load.requests)
        draw = self._draw(load, number, 1 + place)
        questions = self._questions(load.requests, self._workload.output, draw)
        arrivals = load.arrivals(self._draw(load, number, 0))
        found = await self._shown(Turn(endpoint, questions, arrivals, load.concurrency, progress))
        self.rounds.setdefault((load, place), []).append(found)
        self._tell(progress, found)
        if not found.finished:
            self.broken = f"{endpoint.url} answered no request of a round"
        return not self.broken

    async def _shown(self, turn: Turn) -> Round:
        """Runs a turn and shows its progress meanwhile."""
        running = asyncio.create_task(turn.run(), name="turn")
        try:
            while not running.done():
                self._show(turn.progress)
                await asyncio.wait((running,), timeout=_REFRESH)
            return running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _draw(self, load: OfferedLoad, number: int, purpose: int) -> np.random.Generator:
        """Arrivals of a round (0) are the same at every endpoint, prompts (1, 2) are not: both may
        be one server.
        """
        workload = self._workload
        return np.random.default_rng([workload.seed, workload.loads.index(load), number, purpose])

    def _questions(self, count: int, output: int, draw: np.random.Generator) -> list[Question]:
        prompts = self._workload.prompts(count, self._vocab_size, draw)
        return [Question(prompt, output, self._salt) for prompt in prompts]
