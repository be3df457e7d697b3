"""Decides which steps are computed as two microbatches, so that one computes while tokens of the
other travel.

``auto`` measures for each dispatch capacity, and decides anew now and then: halves of a step read
the same weights twice, and that can take longer than the waits that they hide.

Times are noisy: on shared cores those of equal steps differ by a third. So short runs with and
without overlap are compared as pairs, and a pair only says which was quicker. The choice falls when
one side leads by enough pairs, a sequential test of their signs (Wald 1945); in doubt there is no
overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ..protocol.results import StepResult
from .flight import Flight

_SAMPLES = 12
"""Steps measured before a trial, to learn whether waits are long enough to hide."""

_RUN = 3
"""Consecutive steps with or without overlap in a comparison; the median of three tolerates one slow
step.
"""

_LEAD = 6
"""Lead, in pairs of runs, at which a side is chosen. If the slower side wins a third of the pairs,
it is chosen once in 65 times; if 40 %, once in 12.
"""

_MOST_PAIRS = 40
"""Pairs after which a comparison ends without a winner."""

_HOLD = 1000
"""Steps of a capacity for which a decision holds."""

_LEAST_WAIT = 0.05
"""Share of a step spent waiting for tokens below which overlap is not tried."""

_GAIN = 0.98
"""Time with overlap / time without; overlap pays below this ratio."""


@dataclass
class OverlapTrial:
    """The choice for one capacity. ``waits`` is the share of a step that the slowest rank waits for
    tokens, ``ratio``: time with overlap / time without; None: not measured.
    """

    microbatches: int = 1
    waits: float | None = None
    ratio: float | None = None
    _held: int = 0  # steps that the choice still lasts
    _trying: bool = False
    _tried: int = 0
    _shares: list[float] = field(default_factory=list)
    _pair: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})  # times by microbatches
    _ratios: list[float] = field(default_factory=list)  # one per pair

    @property
    def decided(self) -> bool:
        """Whether the choice was measured and still lasts."""
        return self._held > 0

    def next(self) -> int:
        """Microbatches of the next step."""
        if self._held:
            self._held -= 1
            return self.microbatches
        if not self._trying:
            return 1
        pair, place = divmod(self._tried, 2 * _RUN)
        self._tried += 1
        return 2 if (place < _RUN) == (pair % 2 == 0) else 1  # so a drift affects both

    def measured(self, microbatches: int, time: float, share: float) -> None:
        """Takes in the time of a step, as a multiple of its predicted seconds."""
        if self._held or (microbatches == 2 and not self._trying):
            return  # planned before the comparison began
        if not self._trying:
            self._shares.append(share)
            if len(self._shares) >= _SAMPLES:
                self._weigh()
            return
        self._pair[microbatches].append(time)
        if min(map(len, self._pair.values())) >= _RUN:
            self._ratios.append(median(self._pair[2]) / median(self._pair[1]))
            self._pair = {1: [], 2: []}
            self._compare()

    def _weigh(self) -> None:
        """Starts a comparison if waits are long enough to hide."""
        self.waits = median(self._shares)
        self._shares.clear()
        self._trying = self.waits >= _LEAST_WAIT
        if not self._trying:
            self._decide(1)

    def _compare(self) -> None:
        """Decides once one side leads by enough pairs."""
        lead = sum(1 if ratio < _GAIN else -1 for ratio in self._ratios)
        if abs(lead) >= _LEAD or len(self._ratios) >= _MOST_PAIRS:
            self.ratio = median(self._ratios)
            self._decide(2 if lead >= _LEAD else 1)

    def _decide(self, microbatches: int) -> None:
        self.microbatches, self._held = microbatches, _HOLD
        self._trying, self._tried = False, 0
        self._pair, self._ratios = {1: [], 2: []}, []


class Overlap:
    """The rule of a group. ``mode`` is off | on | auto; a stage of one rank, ``exchanges`` false,
    has nothing to overlap with. ``choices`` are those of ``auto``, by capacity.
    """

    def __init__(self, mode: str, *, exchanges: bool) -> None:
        self.mode = mode if exchanges else "off"
        self.choices: dict[int, OverlapTrial] = {}

    def microbatches(self, capacity: int) -> int:
        """Microbatches of the next step. One token cannot be split."""
        if self.mode == "off" or capacity < 2:
            return 1
        if self.mode == "on":
            return 2
        return self.choices.setdefault(capacity, OverlapTrial()).next()

    def observe(self, flight: Flight, results: Sequence[StepResult], predicted: float) -> None:
        """Takes in results of a step whose slowest section was predicted to take so many seconds.
        Ranks of a stage take equally long. The one that waits least is the slowest; its waits are
        the exchange's.
        """
        trial = self.choices.get(flight.capacity)
        if trial is None or trial.decided:
            return
        for result in results:
            seconds = result.seconds - result.stalled
            flight.seconds = max(flight.seconds, seconds)
            share = (result.waited - result.stalled) / seconds if seconds > 0 else 0.0
            flight.waits = min(flight.waits, share)
        flight.unheard -= len(results)
        if flight.unheard == 0 and flight.seconds > 0 and predicted > 0:
            trial.measured(flight.microbatches, flight.seconds / predicted, flight.waits)
