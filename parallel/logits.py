"""Logits of which every rank of a tensor group has a part.

Few numbers of each part travel: its best tokens, its sum of exponentials. Ids travel as the bits of
float32.

R rows  P tokens of this part  V vocabulary  W ranks  K best tokens of a part, or of all
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensor import TensorSplit


class SplitLogits:
    """``own_RP`` float32 are those of the tokens from ``first`` on; -inf beyond the vocabulary,
    which has ``size`` tokens. All ranks make the same calls.
    """

    def __init__(self, own_RP: Tensor, first: int, size: int, split: TensorSplit) -> None:
        self.own_RP, self.first, self.size = own_RP, first, size
        self._split = split

    def rows(self, rows_S: Tensor) -> SplitLogits:
        """Those of some rows, in order."""
        if len(rows_S) == len(self.own_RP):
            return self
        return SplitLogits(self.own_RP[rows_S], self.first, self.size, self._split)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Float32 [R, V], the parts side by side. They travel in ``dtype``, that of the model."""
        return self._split.columns(self.own_RP.to(dtype))[:, : self.size].float()

    def best(self, own_ids_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids [R, W, K] of each part's ``own_ids_RK``, places in ``own_RP``."""
        values_RK = self.own_RP.gather(1, own_ids_RK)
        found_RWX = self.of_all(torch.cat([values_RK, _bits(own_ids_RK + self.first)], 1))
        values_RWK, ids_RWK = found_RWX.chunk(2, 2)
        return values_RWK, _ids(ids_RWK)

    def logprobs(
        self, tokens_R: Tensor, own_ids_RK: Tensor, own_R1: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of ``tokens_R``, then ids [R, num_top] and log-probabilities of the
        best, best first and of equal ones the lower. ``own_ids_RK``: the best of this part, in that
        order; ``own_R1``: the logarithm of its sum of exponentials.
        """
        values_RK, count = self.own_RP.gather(1, own_ids_RK), own_ids_RK.shape[1]
        facts = [own_R1, self._of_tokens(tokens_R)[:, None], values_RK]
        found_RWX = self.of_all(torch.cat([*facts, _bits(own_ids_RK + self.first)], 1))
        total_R1 = found_RWX[:, :, 0].logsumexp(1, keepdim=True)
        chosen_R = found_RWX[:, :, 1].amax(1)
        values_RN = found_RWX[:, :, 2 : 2 + count].flatten(1)
        order_RK = values_RN.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
        ids_RN = _ids(found_RWX[:, :, 2 + count :]).flatten(1)
        return (
            chosen_R - total_R1[:, 0],
            ids_RN.gather(1, order_RK),
            values_RN.gather(1, order_RK) - total_R1,
        )

    def num_above(self, tokens_R: Tensor) -> Tensor:
        """The number of tokens with a larger logit than those of ``tokens_R``, int64 [R]."""
        value_R1 = self.of_all(self._of_tokens(tokens_R)[:, None])[:, :, 0].amax(1, keepdim=True)
        return self._split.total((self.own_RP > value_R1).sum(1))

    def shares(self, temperature_R1: Tensor) -> Tensor:
        """The share of each part in the distribution at a temperature, float64 [R, W]."""
        most_R1 = self.own_RP.amax(1, keepdim=True)
        weights_RP = (
            (self.own_RP - most_R1.clamp_min(torch.finfo(torch.float32).min)) / temperature_R1
        ).exp()
        found_RWX = self.of_all(
            torch.cat([most_R1.double(), weights_RP.sum(1, keepdim=True, dtype=torch.float64)], 1)
        )
        most_RW, total_RW = found_RWX.unbind(2)
        scale_RW = ((most_RW - most_RW.amax(1, keepdim=True)) / temperature_R1).exp()
        return total_RW * scale_RW / (total_RW * scale_RW).sum(1, keepdim=True)

    def of_owner(self, tokens_R: Tensor, owner_R: Tensor) -> Tensor:
        """The tokens of the rank ``owner_R`` of each row, int64 [R]."""
        return self.of_all(tokens_R[:, None])[:, :, 0].gather(1, owner_R[:, None])[:, 0]

    def _of_tokens(self, tokens_R: Tensor) -> Tensor:
        """Logits of tokens [R], -inf for those of other parts."""
        places_R = tokens_R - self.first
        here_R = (places_R >= 0) & (places_R < self.own_RP.shape[1])
        values_R = self.own_RP.gather(1, torch.where(here_R, places_R, 0)[:, None])[:, 0]
        return values_R.masked_fill(~here_R, -torch.inf)

    def of_all(self, own_RX: Tensor) -> Tensor:
        """Every rank's columns [R, W, X]."""
        return self._split.columns(own_RX).view(len(own_RX), self._split.size, own_RX.shape[1])


def _bits(ids: Tensor) -> Tensor:
    return ids.to(torch.int32).view(torch.float32)


def _ids(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.int32).to(torch.int64)
