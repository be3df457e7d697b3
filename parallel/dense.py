"""Splits of dense feed-forward blocks: dense layers and shared experts.

They may be split over more ranks than attention, which then have different tokens. Such a rank
keeps the run of tokens that attention leaves it, as it does around experts. The runs of the group
are gathered, padded to the bound of the step; every rank computes its part of the block for all of
them; and the sums are scattered back. Ranks without tokens take part.

T tokens of the step  O tokens of this rank's run  N padded tokens of the group  D hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .collectives import Collectives
from .tensor import UNSPLIT, Member, Residual, TensorSplit, padded

Block = Callable[[Tensor], Tensor]


class DenseSplit(Member, Protocol):
    """This rank's place among those that split dense blocks. ``gathers``: a block reads other
    ranks' tokens too, which arrive as they enter it.
    """

    gathers: bool

    def begin_step(self, capacity: int) -> None:
        """Announces a step, or both microbatches: the bound on T over all ranks."""
        ...

    def enter(self, residual: Residual) -> Residual:
        """The residual, complete, of the tokens whose update this rank will have."""
        ...

    def sum_of(self, block: Block, x_OD: Tensor) -> Tensor:
        """The sum [O, D] of what ``block``, a part here, yields on every rank."""
        ...

    def leave(self, residual: Residual, num_tokens: int) -> Residual:
        """The residual [T, D] of all tokens, from those of ``enter``."""
        ...


class AsAttention:
    """Blocks are split over the ranks that split attention: all of them have the same tokens."""

    gathers = False

    def __init__(self, tensor: TensorSplit) -> None:
        self.index, self.size = tensor.index, tensor.size
        self.enter, self._total = tensor.complete, tensor.total

    def begin_step(self, capacity: int) -> None:
        """Nothing is padded."""

    def sum_of(self, block: Block, x_OD: Tensor) -> Tensor:
        return self._total(block(x_OD))

    def leave(self, residual: Residual, num_tokens: int) -> Residual:
        return residual


class DenseGroup:
    """Blocks are split over the ranks of ``collectives``: whole groups of ``tensor``, which splits
    attention. ``give_turn`` is called before each wait: meanwhile another microbatch may compute.
    """

    gathers = True

    def __init__(
        self, collectives: Collectives, tensor: TensorSplit, give_turn: Callable[[], None] = lambda: None
    ) -> None:
        self.index, self.size = collectives.index, collectives.size
        self._collectives, self._give_turn = collectives, give_turn
        self._runs = tensor.size
        self.enter, self.leave = tensor.scatter, tensor.gather
        self._longest = 0

    def begin_step(self, capacity: int) -> None:
        self._longest = -(-capacity // self._runs)

    def sum_of(self, block: Block, x_OD: Tensor) -> Tensor:
        num_tokens, collectives = len(x_OD), self._collectives
        assert num_tokens <= self._longest, f"{num_tokens} tokens, at most {self._longest}"
        gathering = collectives.all_gather(padded(x_OD, self._longest), "the tokens of a dense block")
        self._give_turn()
        y_ND = block(collectives.wait(gathering))
        summing = collectives.reduce_scatter(y_ND.contiguous(), "the sums of a dense block")
        self._give_turn()
        return collectives.wait(summing)[:num_tokens]


@dataclass(frozen=True)
class LayerSplits:
    """How the layers of a rank are split: attention and the vocabulary by ``tensor``."""

    tensor: TensorSplit
    dense: DenseSplit
    shared: DenseSplit

    def begin_step(self, capacity: int) -> None:
        """As ``DenseSplit.begin_step``."""
        self.dense.begin_step(capacity)
        self.shared.begin_step(capacity)


def split_as_attention(tensor: TensorSplit) -> LayerSplits:
    """Dense layers are split as attention is; every rank has shared experts whole."""
    return LayerSplits(tensor, AsAttention(tensor), AsAttention(UNSPLIT))


def split_over(group: Collectives, tensor: TensorSplit, give_turn: Callable[[], None]) -> LayerSplits:
    """Dense layers and shared experts are split over ``group``, ``give_turn`` as of
    ``DenseGroup``.
    """
    wide = DenseGroup(group, tensor, give_turn)
    return LayerSplits(tensor, AsAttention(tensor) if group.size == tensor.size else wide, wide)


UNSPLIT_LAYERS = split_as_attention(UNSPLIT)
