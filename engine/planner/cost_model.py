"""The cost model: predicted seconds of a rank's section, fitted to what the ranks report.

seconds = fixed + token x (tokens) + kv x (KV tokens read) + context x (prefill tokens x context).
The planner balances and bounds steps by it, so it has to be right in proportion, not to the
microsecond.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64

_FORGET = 0.98
_REFIT_EVERY = 16
_PULL = 0.01  # weight of the previous coefficients, in sections: keeps terms that no section determines
_LEAST = 0.01  # lower bound of a coefficient, as a share of its default: one fitted to zero can recover
_FIRST_TOKENS = 256  # 4 s where a token takes 15 ms, as with 0.4 B parameters on one slow core
_LEAST_TOKENS = 16
_GROWTH = 4  # a section may have this multiple of the tokens of a measured one


@dataclass(frozen=True)
class Cost:
    """Coefficients in seconds. The defaults, a small model on a CPU, serve until the first fit."""

    fixed: float = 2e-3
    token: float = 5e-5
    kv: float = 1e-8
    context: float = 1e-8


class CostModel:
    """Least squares over the slowest section of each step, with exponential forgetting and
    non-negative coefficients.

    Sections that are alike (a full chunk of prompt in each step, or the same rows decoding for
    minutes) determine a sum of terms, not each term. The rest keeps its previous proportions: a fit
    that called it all ``fixed`` would find every rank equally quick and send a burst to one.

    ``early``: the first fit follows the first section, and ``trusted`` bounds a section's tokens by
    those that were measured: a machine much slower than the default must not be given a step of
    minutes before that is known.
    """

    def __init__(self, *, early: bool = False) -> None:
        self.cost = Cost()
        self.trusted = _FIRST_TOKENS if early else None
        self._refit_after = 1 if early else _REFIT_EVERY
        self._normal = np.zeros((4, 4))
        self._right = np.zeros(4)
        self._fresh: list[tuple[float, float, float, float, float]] = []

    def observe(self, tokens: float, kv: float, context: float, seconds: float) -> None:
        """Adds one measured section: its features and its seconds without waiting."""
        self._fresh.append((1.0, tokens, kv, context, max(seconds, 1e-6)))
        if self.trusted is not None:
            self.trusted = max(self.trusted, _GROWTH * int(tokens))
        if len(self._fresh) >= self._refit_after:
            self._refit_after = min(2 * self._refit_after, _REFIT_EVERY)
            self._accumulate(np.array(self._fresh))
            self._fresh.clear()
            self._refit()

    def distrust(self, tokens: int) -> None:
        """Lowers the bound on a section's tokens: one of ``tokens`` may have been too long."""
        if self.trusted is not None:
            self.trusted = min(self.trusted, max(_LEAST_TOKENS, tokens // 2))

    def slowest(self, rows: Int64, kv: Int64) -> float:
        """Predicted seconds of the slowest section that decodes ``rows`` [D]."""
        return float((self.cost.fixed + self.cost.token * rows + self.cost.kv * kv).max())

    def seconds(self, tokens: float, kv: float = 0.0, context: float = 0.0) -> float:
        """Predicted seconds of a section."""
        cost = self.cost
        return cost.fixed + cost.token * tokens + cost.kv * kv + cost.context * context

    def prefill_tokens_within(self, seconds: float, decode_tokens: int, kv: float, context: float) -> int:
        """Prefill tokens at ``context`` tokens of context that fit a section of ``seconds`` beside
        its decode rows.
        """
        left = seconds - self.seconds(decode_tokens, kv)
        return int(max(0.0, left) / max(self.cost.token + self.cost.context * context, 1e-12))

    def queue_seconds(
        self, backlog: NDArray[np.float64], rows: Int64, kv: Int64, horizon: int
    ) -> NDArray[np.float64]:
        """Predicted seconds [D] a new request waits for and shares: prompt backlog plus ``horizon``
        decode steps.
        """
        seconds: NDArray[np.float64] = self.cost.token * backlog + horizon * (
            self.cost.token * rows + self.cost.kv * kv
        )
        return seconds

    def _accumulate(self, sections: NDArray[np.float64]) -> None:
        """Adds sections [n, (1, tokens, kv, context, seconds)]; later ones weigh more."""
        features, seconds = sections[:, :4], sections[:, 4]
        kept = _FORGET ** np.arange(len(sections) - 1, -1, -1)
        # Errors are relative: a decode step of a millisecond matters as much as a long prefill.
        weighted = features * (kept / seconds**2)[:, None]
        self._normal = _FORGET ** len(sections) * self._normal + weighted.T @ features
        self._right = _FORGET ** len(sections) * self._right + weighted.T @ seconds

    def _refit(self) -> None:
        """Fits in multiples of the previous coefficients; terms that turn negative are dropped."""
        anchor = np.maximum(self._scaled(self.cost), _LEAST * self._scaled(Cost()))
        # The pull is towards 1: as before.
        matrix = self._normal * np.outer(anchor, anchor) + _PULL * np.eye(4)
        right = self._right * anchor + _PULL
        active = np.ones(4, np.bool_)
        while True:
            solution = np.zeros(4)
            chosen = np.flatnonzero(active)
            solution[chosen] = np.linalg.solve(matrix[np.ix_(chosen, chosen)], right[chosen])
            if (solution >= 0).all():
                break
            active &= solution > 0
        self.cost = Cost(*(solution * anchor).tolist())

    def _scaled(self, cost: Cost) -> NDArray[np.float64]:
        """``cost`` times the factor that fits the sections best."""
        each = np.array(astuple(cost))
        scaled: NDArray[np.float64] = each * (each @ self._right / (each @ self._normal @ each))
        return scaled
