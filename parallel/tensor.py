"""Tensor parallelism (arXiv 1909.08053): ranks that hold parts of the same layers, and how their
results come together.

Within such a group every rank has all tokens of a step and a part of every split matrix. A matrix
split by rows yields a part of the outputs; one split by columns yields a summand of all outputs.
Around experts each rank keeps a run of the tokens, so that one rank alone gates each token.

T tokens of the step  O tokens of this rank's run  D hidden
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .collectives import Collectives, Pending

Residual = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``parts`` equal parts of a checkpoint's tensor along ``dim``.

    ``full``: the size of the whole along ``dim`` where the parts do not divide it; the last parts
    are then padded with zeros. ``added_once``: a whole tensor that the first part alone holds, and
    which is zero in the others.
    """

    dim: int = 0
    index: int = 0
    parts: int = 1
    full: int | None = None
    added_once: bool = False

    @property
    def is_whole(self) -> bool:
        return self.parts == 1 and not self.added_once

    def bounds(self, part: int) -> tuple[int, int]:
        """First and last + 1 of the rows or columns here, in the whole; ``part`` is their number,
        padding included.
        """
        full = self.full if self.full is not None else part * self.parts
        return min(self.index * part, full), min((self.index + 1) * part, full)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor whose part here has ``shape``."""
        if self.parts == 1:
            return shape
        full = self.full if self.full is not None else shape[self.dim] * self.parts
        return (*shape[: self.dim], full, *shape[self.dim + 1 :])


class Member(Protocol):
    """A rank's place among those that split a layer."""

    @property
    def index(self) -> int: ...

    @property
    def size(self) -> int: ...


class TensorSplit(Member, Protocol):
    """This rank's place among those that split a layer, and how their results come together."""

    def total(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``."""
        ...

    def columns(self, part: Tensor) -> Tensor:
        """Every rank's columns [R, C] side by side [R, size x C]."""
        ...

    def complete(self, residual: Residual) -> Residual:
        """The residual whose update is a summand here."""
        ...

    def scatter(self, residual: Residual) -> Residual:
        """The rows [O, D] of this rank's run of ``complete(residual)``."""
        ...

    def gather(self, residual: Residual, num_tokens: int) -> Residual:
        """The residual [T, D] from every rank's run."""
        ...

    def run_of(self, num_tokens: int) -> range:
        """The tokens of this rank's run."""
        ...

    def from_first(self, values: Tensor) -> Tensor:
        """The values of the first rank; those of the others are overwritten."""
        ...

    def most(self, values_R: Tensor, ids_R: Tensor) -> Tensor:
        """Each row's id, of the rank whose value float32 is the largest; the first rank's of equal
        ones. NaN is never the largest.
        """
        ...


class Unsplit:
    """A rank that holds its layers whole."""

    index, size = 0, 1

    def total(self, part: Tensor) -> Tensor:
        return part

    def columns(self, part: Tensor) -> Tensor:
        return part

    def complete(self, residual: Residual) -> Residual:
        return residual

    def scatter(self, residual: Residual) -> Residual:
        return residual

    def gather(self, residual: Residual, num_tokens: int) -> Residual:
        return residual

    def run_of(self, num_tokens: int) -> range:
        return range(num_tokens)

    def from_first(self, values: Tensor) -> Tensor:
        return values

    def most(self, values_R: Tensor, ids_R: Tensor) -> Tensor:
        return ids_R


UNSPLIT = Unsplit()


class TensorGroup:
    """A group of ranks that split layers, over their collectives. All of them have the same T, and
    none calls a collective where T is 0.

    ``give_turn`` is called before each wait: meanwhile another microbatch may compute. It is called
    where T is 0, too: turns, and so the order of collectives in groups that have this rank among
    others, do not depend on tokens.
    """

    def __init__(self, collectives: Collectives, give_turn: Callable[[], None] = lambda: None) -> None:
        self.index, self.size = collectives.index, collectives.size
        self._collectives, self._give_turn = collectives, give_turn

    def total(self, part: Tensor) -> Tensor:
        if not len(part):
            return self._without(part)
        return self._wait(self._collectives.all_reduce(part, "the sum of a split layer"))

    def columns(self, part: Tensor) -> Tensor:
        if not len(part):
            return self._without(part.new_empty(0, self.size * part.shape[1]))
        rows = self._wait(self._collectives.all_gather(part, "the columns of a split layer"))
        return rows.view(self.size, *part.shape).transpose(0, 1).flatten(1)

    def complete(self, residual: Residual) -> Residual:
        x_TD, update_TD = residual
        return x_TD, None if update_TD is None else self.total(update_TD)

    def scatter(self, residual: Residual) -> Residual:
        x_TD, update_TD = residual
        run = self.run_of(len(x_TD))
        x_OD = x_TD[run.start : run.stop]
        if update_TD is None:
            return x_OD, None
        if not len(x_TD):
            return x_OD, self._without(update_TD)
        all_TD = padded(update_TD, self.size * self._longest(len(x_TD)))
        update = self._wait(self._collectives.reduce_scatter(all_TD, "this rank's run of the tokens"))
        return x_OD, update[: len(x_OD)]

    def gather(self, residual: Residual, num_tokens: int) -> Residual:
        x_OD, update_OD = residual
        if not num_tokens:
            return self._without(x_OD), update_OD
        sum_OD = x_OD if update_OD is None else x_OD + update_OD
        run_OD = padded(sum_OD, self._longest(num_tokens))
        x_TD = self._wait(self._collectives.all_gather(run_OD, "the runs of all tokens"))
        return x_TD[:num_tokens], None

    def run_of(self, num_tokens: int) -> range:
        longest = self._longest(num_tokens)
        first = min(self.index * longest, num_tokens)
        return range(first, min(first + longest, num_tokens))

    def from_first(self, values: Tensor) -> Tensor:
        if not len(values):
            return values
        return self._collectives.wait(self._collectives.broadcast(values, "what the first rank sampled"))

    def most(self, values_R: Tensor, ids_R: Tensor) -> Tensor:
        own_R2 = torch.stack([values_R.view(torch.int32), ids_R.to(torch.int32)], 1)
        found_RW2 = self.columns(own_R2).view(len(own_R2), self.size, 2)
        values_RW = found_RW2[:, :, 0].contiguous().view(torch.float32)
        first_R = values_RW.masked_fill(values_RW.isnan(), -math.inf).argmax(1)
        return found_RW2[:, :, 1].gather(1, first_R[:, None])[:, 0].to(torch.int64)

    def _wait(self, pending: Pending) -> Tensor:
        self._give_turn()
        return self._collectives.wait(pending)

    def _without(self, nothing: Tensor) -> Tensor:
        self._give_turn()
        return nothing

    def _longest(self, num_tokens: int) -> int:
        return -(-num_tokens // self.size)


def shard_of(split: Member, dim: int, copies: int = 1) -> Shard:
    """This rank's part along ``dim``; ``copies`` neighbouring ranks share each part."""
    return Shard(dim, split.index // copies, split.size // copies)


def padded(rows: Tensor, length: int) -> Tensor:
    """``rows`` [n, D] and as many rows of zeros as make ``length``, contiguous."""
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
