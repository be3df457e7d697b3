"""Chooses the tokens of a step where the ranks of a tensor group have parts of the logits.

Few numbers of a row travel where they decide:
- greedy: the best token of each part;
- top-k: the best tokens of each part hold all that are kept, so a row is drawn by the same rule
  among those alone, in the order of the vocabulary;
- all tokens: the shares of the parts say which of them holds the draw; it draws among its own.
A draw differs from one rank's only if it falls within the rounding of a sum.

Whole logits travel for top-p or min-p without top-k: the tokens that are kept follow from sums over
all. So they do for rows whose logits are edited, and where tokens of a part tie with the last one
kept and may lie beyond those it sent.

R rows that sample, S of them, N tokens of all parts, W ranks, D hidden, V vocabulary, K best tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.reference.sampling import MIN_TEMPERATURE
from ...parallel.logits import SplitLogits
from ..protocol.arrays import Int64
from ..protocol.results import RowLogprobs
from .draws import Draws
from .masks import Masks
from .parts import Parts
from .slot_sampling import RowSettings, SlotSettings
from .token_logprobs import logprob_lines

MOST_KEPT = 256
"""The largest top-k for which candidates travel: 2 kB of each part."""

_Rules = Callable[[Tensor, RowSettings, Int64, Masks | None], Int64]
"""Tokens [R] by whole logits and the settings of rows, at positions, under masks."""


@dataclass(frozen=True)
class _Ways:
    """The rows [S] of each way to choose."""

    greedy: Int64
    kept: Int64
    shared: Int64
    whole: Int64


class SplitChoice:
    """Chooses as ``TokenChoice`` does. All ranks of the group make the same calls, and the first
    decides; ``rules`` choose by whole logits.
    """

    def __init__(self, parts: Parts, settings: SlotSettings, rules: _Rules) -> None:
        self._parts, self._settings, self._rules = parts, settings, rules

    def choose(
        self, hidden_RD: Tensor, slots: Int64, positions: Int64, numbers: Int64, masks: Masks | None
    ) -> tuple[Int64, tuple[RowLogprobs, ...]]:
        model = self._parts.model
        logits = model.own_logits(hidden_RD)
        if self._settings.plain(slots).all():
            return model.most_likely(logits).cpu().numpy(), ()
        settings = self._settings.rows(slots)
        tokens = self._tokens(logits, settings, positions, masks)
        asked = settings.asked
        if not len(asked):
            return tokens, ()
        width = min(int(settings.num_logprobs.max()), logits.size)
        top = split_logprobs(self._parts, logits.rows(self._there(asked)), self._there(tokens[asked]), width)
        return tokens, logprob_lines(top, numbers[asked], settings.num_logprobs[asked])

    def _tokens(
        self, logits: SplitLogits, settings: RowSettings, positions: Int64, masks: Masks | None
    ) -> Int64:
        ways = self._ways(settings)
        tokens = np.zeros(len(positions), np.int64)
        draws = Draws(settings.params, settings.seed, positions)
        whole = ways.whole
        if len(ways.kept):
            tokens[ways.kept], decided = self._among_the_best(
                logits.rows(self._there(ways.kept)), draws.rows(ways.kept)
            )
            whole = np.sort(np.concatenate([whole, ways.kept[~decided]]))
        if len(ways.shared):
            tokens[ways.shared] = self._by_shares(
                logits.rows(self._there(ways.shared)), draws.rows(ways.shared)
            )
        if len(whole):
            logits_SV = logits.rows(self._there(whole)).whole(self._parts.model.dtype)
            if self._parts.samples:
                rows = self._settings.rows(settings.slots[whole])
                tokens[whole] = self._rules(logits_SV, rows, positions[whole], masks)
        tokens = self._parts.splits.tensor.from_first(self._there(tokens)).cpu().numpy()
        if len(ways.greedy):
            rows_S = self._there(ways.greedy)
            tokens[ways.greedy] = self._parts.model.most_likely(logits.rows(rows_S)).cpu().numpy()
        return tokens

    def _ways(self, settings: RowSettings) -> _Ways:
        free, params = self._settings.free(settings.slots), settings.params
        greedy = params.temperature_R < MIN_TEMPERATURE
        kept = ~greedy & (params.top_k_R > 0) & (params.top_k_R <= MOST_KEPT)
        shared = ~greedy & (params.top_k_R == 0) & (params.top_p_R >= 1) & (params.min_p_R <= 0)
        return _Ways(
            greedy=np.flatnonzero(free & greedy),
            kept=np.flatnonzero(free & kept),
            shared=np.flatnonzero(free & shared),
            whole=np.flatnonzero(~(free & (greedy | kept | shared))),
        )

    def _among_the_best(self, logits: SplitLogits, draws: Draws) -> tuple[Int64, NDArray[np.bool_]]:
        """Tokens [S] by the best of each part, and whether those decide."""
        top_k_S1 = self._there(draws.params.top_k_R)[:, None]
        count = min(int(draws.params.top_k_R.max()) + 1, logits.own_RP.shape[1])
        values_SWK, ids_SWK = logits.best(_best(self._parts, logits, count)[0])
        values_SN = values_SWK.flatten(1)
        ids_SN = ids_SWK.flatten(1)
        sorted_SN = values_SN.sort(1, descending=True).values
        last_kept_S1 = sorted_SN.gather(1, top_k_S1.clamp_max(values_SN.shape[1]) - 1)
        # Beyond what a part sent is nothing that is kept, if the last it sent is not.
        decided_S = (values_SWK[:, :, -1] < last_kept_S1).all(1)
        if count == logits.own_RP.shape[1]:
            decided_S = ~values_SN.isnan().any(1)
        order_SN = ids_SN.argsort(1)
        chosen_S = draws.among(values_SN.gather(1, order_SN), self._parts.model.ops)
        tokens_S1 = ids_SN.gather(1, order_SN.gather(1, chosen_S[:, None]))
        return tokens_S1[:, 0].cpu().numpy(), decided_S.cpu().numpy()

    def _by_shares(self, logits: SplitLogits, draws: Draws) -> Int64:
        """Tokens [S] of rows that keep all tokens: each part draws as if the draw fell into it."""
        own = slice(self._parts.splits.tensor.index, self._parts.splits.tensor.index + 1)
        shares_SW = logits.shares(self._there(draws.params.temperature_R)[:, None])
        ends_SW = shares_SW.cumsum(1)
        drawn_S1 = self._there(draws.uniform_R)[:, None]
        # The last part with a share, where rounding puts the number past all.
        last_S = (shares_SW > 0).long().cumsum(1).argmax(1)
        owner_S = torch.minimum(torch.searchsorted(ends_SW, drawn_S1, right=True)[:, 0], last_S)
        within_S = ((drawn_S1 - ends_SW[:, own] + shares_SW[:, own]) / shares_SW[:, own])[:, 0]
        within = within_S.nan_to_num(0.0).clamp(0.0, 1.0).cpu().numpy()
        own_SP, empty_S1 = logits.own_RP, shares_SW[:, own] == 0
        if empty_S1.any():  # nothing to draw from, and no draw falls into it
            own_SP = own_SP.masked_fill(empty_S1, 0.0)
        tokens_S = self._parts.model.ops.sample(own_SP, draws.params, within) + logits.first
        found: Int64 = logits.of_owner(tokens_S, owner_S).cpu().numpy()
        return found

    def _there(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._parts.device)


def split_logprobs(
    parts: Parts, logits: SplitLogits, tokens_S: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``logprobs``, of logits in parts."""
    ids_SK, values_SK = _best(parts, logits, min(max(1, num_top), logits.own_RP.shape[1]))
    own_S1 = logits.own_RP.gather(1, ids_SK[:, :1]) - values_SK[:, :1]
    own_S1 = own_S1.nan_to_num(-torch.inf)  # a part without a token
    return logits.logprobs(tokens_S, ids_SK, own_S1, num_top)


def _best(parts: Parts, logits: SplitLogits, count: int) -> tuple[Tensor, Tensor]:
    """The best tokens [R, K] of this part, best first, and their log-probabilities in it."""
    nothing_R = torch.zeros(len(logits.own_RP), dtype=torch.int64, device=logits.own_RP.device)
    _, ids_RK, values_RK = parts.model.ops.logprobs(logits.own_RP, nothing_R, count)
    return ids_RK, values_RK
