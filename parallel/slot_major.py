"""Exchanges of tokens that arrive slot by slot: the memory of a group, and its rounds, by a library
of a device.

A round is a dispatch and its combine. Counts and waits stay on the device, so a captured step
repeats the calls. The memories of these libraries have two halves, which calls take in turn. Each
call sends and receives, and waits for all ranks, so none is more than one call ahead, and the half
of the call before last is free: microbatches share a memory.

Suffixes: T own tokens, K choices of a token, D hidden, G = D / 128, W ranks, S slots of a rank, R
rows of a slot that a step may fill, N rows of a slot in memory, at least R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from .one_epoch import OneEpochGroup, Started


@dataclass(frozen=True)
class SlotShape:
    """Sizes of rounds. ``num_slots``: of all ranks, W x S. ``capacity``: most tokens of a rank in a
    step, in ``lanes`` rounds at once. ``eight``: they travel to experts in FP8 and return in
    ``dtype``.
    """

    num_slots: int
    top_k: int
    capacity: int
    lanes: int
    hidden: int
    dtype: torch.dtype
    eight: bool = False


@dataclass(frozen=True)
class SlotTokens:
    """Tokens of this rank, contiguous: values [T, D] in the model's dtype, or float8_e4m3fn and
    their scales float32 [T, G]; places_TK of choices, rank x S + slot or -1 for none; weights_TK
    float32.
    """

    values: Tensor
    scales: Tensor | None
    places_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class SlotArrivals:
    """Tokens for the slots of this rank: values [S, N, D] contiguous; scales [S, N, G] or None; of
    each slot the first int32 counts_S rows. ``known``: what the combine needs of the dispatch.
    """

    values: Tensor
    scales: Tensor | None
    counts_S: Tensor
    known: Any = None


class SlotRounds(Protocol):
    """The memory of all ranks. They make the same calls in the same order."""

    def dispatch(self, lane: int, tokens: SlotTokens, capacity: int, begins: bool) -> SlotArrivals:
        """Sends tokens to the slots of their choices. ``capacity`` of the step, equal on all ranks,
        of which this is the first call if it ``begins``.
        """
        ...

    def combine(self, lane: int, y_SRD: Tensor, tokens: SlotTokens, known: Any, sums_TD: Tensor) -> None:
        """Sends outputs of arrived tokens back, each row's where the token was. Fills sums_TD with
        the sums of a token's outputs by weight, in float32 in the order of k.
        """
        ...


class SlotGroup(OneEpochGroup):
    """The memory of ``size`` ranks for rounds.

    A library fills ``ids_dtype`` (of places), ``quantises`` (itself, in FP8: it takes tokens in the
    model's dtype), ``num_rows``, ``num_bytes`` and ``_open``.
    """

    ids_dtype = torch.int64
    quantises = False

    def __init__(self, name: str, index: int, size: int, store: Store, device: torch.device) -> None:
        super().__init__(name, index, size, store, device)
        self._shape: SlotShape | None = None
        self._rounds: SlotRounds | None = None

    def reserve(self, shape: SlotShape) -> None:
        """Memory that ``build`` will open."""
        assert self._shape is None, f"{self._name}: memory of {self._shape} and of {shape}"
        self._shape = shape

    @property
    def shape(self) -> SlotShape:
        assert self._shape is not None, f"{self._name}: no memory is reserved"
        return self._shape

    @property
    def rounds(self) -> SlotRounds:
        assert self._rounds is not None, f"{self._name}: not built yet"
        return self._rounds

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory."""
        raise NotImplementedError

    def num_rows(self, capacity: int) -> int:
        """R in a step of ``capacity``."""
        raise NotImplementedError

    def start(self, calls: Callable[[], None]) -> Started:
        """Makes calls for its stream, once the current one has come so far. Tensors that they take
        live until they have ended; those that they return are that stream's.
        """
        return self._start(calls)

    def _meet(self, met: Store) -> None:
        self._rounds = self._open(met)

    def _stand_in(self) -> None:
        self._rounds = SlotRoundsAlone(self, self._device)

    def _drop(self) -> None:
        self._rounds = None

    def _open(self, met: Store) -> SlotRounds:
        """Opens memory with the other ranks, who meet at ``met``."""
        raise NotImplementedError


class SlotRoundsAlone:
    """Rounds of a rank by itself: no token comes, in as much memory as among all ranks."""

    def __init__(self, group: SlotGroup, device: torch.device) -> None:
        self._group = group
        self._room = torch.zeros(group.num_bytes, dtype=torch.uint8, device=device)

    def dispatch(self, lane: int, tokens: SlotTokens, capacity: int, begins: bool) -> SlotArrivals:
        shape, rows = self._group.shape, self._group.num_rows(capacity)
        slots = shape.num_slots // self._group.size
        values = tokens.values.new_empty(
            slots, rows, shape.hidden, dtype=torch.float8_e4m3fn if shape.eight else shape.dtype
        )
        scales = torch.empty(slots, rows, shape.hidden // 128, device=values.device) if shape.eight else None
        return SlotArrivals(values, scales, torch.zeros(slots, dtype=torch.int32, device=values.device))

    def combine(self, lane: int, y_SRD: Tensor, tokens: SlotTokens, known: Any, sums_TD: Tensor) -> None:
        sums_TD.zero_()
