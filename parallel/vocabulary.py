"""The two layers as wide as the vocabulary, split by rows over a tensor group: the embedding and
the output head.

T tokens  R sampled rows  D hidden  V vocabulary  P rows of this part, padding included
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Backend, Linear, LinearOps, Matrix
from .tensor import Shard, TensorSplit


def vocabulary_shard(split: TensorSplit, vocab_size: int) -> tuple[int, Shard]:
    """P, and the part of the vocabulary of this rank."""
    rows = -(-vocab_size // split.size)
    return rows, Shard(0, split.index, split.size, None if split.size == 1 else vocab_size)


def _without_padding(logits_RP: Tensor, width: int) -> Tensor:
    """Logits of a part, float32; those beyond its ``width`` tokens are those of no token."""
    logits_RP = logits_RP.float()
    if width < logits_RP.shape[1]:
        logits_RP[:, width:] = -math.inf
    return logits_RP


class Embedding(Matrix):
    """Vectors [P, D] of this part of the vocabulary."""

    def __init__(self, vocab_size: int, hidden: int, backend: Backend[LinearOps]) -> None:
        rows, shard = vocabulary_shard(backend.tensor, vocab_size)
        super().__init__(hidden, rows, backend, shard)
        self._split, self._vocab_size = backend.tensor, vocab_size
        self.first, self._last = shard.bounds(rows)
        # Plain attributes for a step: finding a module's parameter takes 0.5 us.
        self.embed: Callable[[Tensor], Tensor] = functools.partial(F.embedding, weight=self.weight)
        self.head: Callable[[Tensor], Tensor] = functools.partial(F.linear, weight=self.weight)
        if backend.tensor.size > 1:
            self.weight.zero_()
            self.embed, self.head = self._embed_part, self._head_part

    def _embed_part(self, tokens_T: Tensor) -> Tensor:
        """[T, D]: each token's vector comes from the rank that has it, zeros from the others."""
        here_T = (tokens_T >= self.first) & (tokens_T < self._last)
        x_TD = F.embedding(torch.where(here_T, tokens_T - self.first, 0), self.weight)
        return self._split.total(torch.where(here_T[:, None], x_TD, 0))

    def own_logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 [R, P] of this part alone, whose first token is ``first``."""
        return _without_padding(F.linear(hidden_RD, self.weight), self._last - self.first)

    def _head_part(self, hidden_RD: Tensor) -> Tensor:
        return self._split.columns(F.linear(hidden_RD, self.weight))[:, : self._vocab_size]


class OutputHead(Linear):
    """Logits [R, V] from this part's P columns of them."""

    def __init__(self, hidden: int, vocab_size: int, backend: Backend[LinearOps]) -> None:
        rows, shard = vocabulary_shard(backend.tensor, vocab_size)
        # No checkpoint in FP8 has a head in FP8.
        super().__init__(hidden, rows, dataclasses.replace(backend, fp8_block=None), shard=shard)
        self._split, self._vocab_size = backend.tensor, vocab_size
        self.first, self._last = shard.bounds(rows)
        self.head: Callable[[Tensor], Tensor] = self.forward
        if backend.tensor.size > 1:
            self.weight.zero_()
            self.head = self._head_part

    def own_logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 [R, P] of this part alone, whose first token is ``first``."""
        return _without_padding(self.forward(hidden_RD), self._last - self.first)

    def _head_part(self, hidden_RD: Tensor) -> Tensor:
        return self._split.columns(self.forward(hidden_RD))[:, : self._vocab_size]
