"""A double of the low-latency mode of NCCL EP (nccl-extensions 0.1) over gloo: asserts of a call
what the library and its kernels need, and computes its definition on the host.

Nothing says in which order tokens arrive, so the last comes first; rows without a token hold what
no sum survives.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lockstep.parallel.collectives import Collectives
from lockstep.parallel.nccl_ep import RoundHandle, memory_shape
from lockstep.parallel.slot_major import SlotShape
from lockstep.parallel.store_ranks import StoreRanks


class Recipe(IntEnum):
    NONE = 0
    FWD = 1


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """As the library's dataclasses of a call's tensors."""

    tokens: Tensor | None = None
    scales: Tensor | None = None
    topk_weights: Tensor | None = None
    expert_counters: Tensor | None = None
    quantization_recipe: Recipe = Recipe.NONE


BUNDLES: Any = SimpleNamespace(
    Tensor=lambda tensor: tensor,
    DispatchInputs=Bundle,
    DispatchOutputs=Bundle,
    DispatchConfig=Bundle,
    CombineInputs=Bundle,
    CombineOutputs=Bundle,
    LayoutInfo=Bundle,
    DispatchQuantizationRecipe=Recipe,
)


class NcclEpDouble:
    """The memory of the ranks of ``collectives``. ``any_size``: takes every hidden size and dtype,
    for cases that other exchanges share.
    """

    bundles = BUNDLES

    def __init__(self, collectives: Collectives, any_size: bool = False) -> None:
        self._collectives, self._any_size = collectives, any_size
        self.opened: list[HandleDouble] = []

    def open(self, shape: SlotShape, ranks: StoreRanks, device: torch.device) -> list[RoundHandle]:
        size = ranks.Get_size()
        assert (ranks.Get_rank(), size) == (self._collectives.index, self._collectives.size)
        assert ranks.bcast(b"unique" if ranks.Get_rank() == 0 else None, 0) == b"unique"
        self.opened = [HandleDouble(self._collectives, shape, self._any_size) for _ in range(shape.lanes)]
        return list(self.opened)


class HandleDouble:
    """As ``Handle``, for the rounds of one lane."""

    def __init__(self, collectives: Collectives, shape: SlotShape, any_size: bool = False) -> None:
        assert shape.num_slots % collectives.size == 0 and (any_size or 0 < shape.top_k <= 21)
        self._collectives, self._shape, self._any_size = collectives, shape, any_size
        self._num_slots = shape.num_slots // collectives.size
        self._ids: Tensor | None = None
        self._sources: Tensor | None = None
        self.sent: list[int] = []  # how many ranks each token of the last dispatch went to

    def update(self, topk_idx: Tensor, *, stream: int) -> None:
        assert self._sources is None, "the places of a round that has not been combined"
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        assert topk_idx.dim() == 2 and topk_idx.shape[1] == self._shape.top_k
        assert all(-1 <= place < self._shape.num_slots for place in topk_idx.flatten().tolist())
        self._ids = topk_idx

    def dispatch(
        self, inputs: Bundle, outputs: Bundle, *, layout_info: Bundle, config: Bundle, stream: int
    ) -> None:
        assert inputs.tokens is not None and outputs.tokens is not None
        assert layout_info.expert_counters is not None
        sent = inputs.tokens, inputs.scales, config.quantization_recipe
        self.run_dispatch(*sent, outputs.tokens, outputs.scales, layout_info.expert_counters)

    def combine(self, inputs: Bundle, outputs: Bundle, *, stream: int) -> None:
        assert inputs.tokens is not None and outputs.tokens is not None and outputs.topk_weights is not None
        self.run_combine(inputs.tokens, outputs.tokens, outputs.topk_weights)

    def run_dispatch(
        self,
        values: Tensor,
        scales: Tensor | None,
        recipe: int,
        found: Tensor,
        found_scales: Tensor | None,
        counts: Tensor,
    ) -> None:
        shape, size, index = self._shape, self._collectives.size, self._collectives.index
        ids, most, slots = self._ids, max(1, shape.capacity), self._num_slots
        assert ids is not None and len(values) == len(ids) <= most
        self._check_row(values, found, most)
        assert counts.dtype == torch.int32 and counts.shape == (slots,)
        assert (scales is None) == (found_scales is None) == (recipe == Recipe.NONE)
        assert shape.eight == (recipe == Recipe.FWD)
        if scales is not None and found_scales is not None:
            assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
            assert self._any_size or 4 * scales.shape[1] % 16 == 0
            assert values.shape[1] + 4 * scales.shape[1] <= memory_shape(shape).token_bytes
            self._check_row(scales, found_scales, most)
        ids_WTK = self._gather(ids, most, -1)
        self.sent = [len({place // slots for place in places} - {-1}) for places in ids.tolist()]
        parts = [(values, found), *([] if scales is None else [(scales, found_scales)])]
        arrived = [(self._gather(part, most, 0), room) for part, room in parts]
        self._sources = torch.full((slots, size * most), -1, dtype=torch.int64)
        for _, room in arrived:
            assert room is not None
            room.view(torch.uint8).fill_(255)  # NaN
        for slot in range(slots):
            begin = 0
            for source in reversed(range(size)):
                tokens = (ids_WTK[source] == index * slots + slot).any(1).nonzero().flatten().flip(0)
                rows = slice(begin, begin + len(tokens))
                for part, room in arrived:
                    assert room is not None
                    room[slot, rows].view(torch.uint8).copy_(part[source, tokens].view(torch.uint8))
                self._sources[slot, rows] = source * most + tokens
                begin += len(tokens)
            counts[slot] = begin

    def run_combine(self, y: Tensor, out: Tensor, weights: Tensor) -> None:
        ids, sources, most = self._ids, self._sources, max(1, self._shape.capacity)
        size, index, slots, hidden = (
            self._collectives.size,
            self._collectives.index,
            self._num_slots,
            out.shape[1],
        )
        assert ids is not None and sources is not None, "nothing was dispatched"
        assert y.shape == (slots, size * most, hidden) and y.is_contiguous() and y.dtype == self._shape.dtype
        assert out.dtype == y.dtype and out.is_contiguous() and len(out) == len(ids)
        assert weights.dtype == torch.float32 and weights.is_contiguous() and weights.shape == ids.shape
        assert self._any_size or (hidden % 512 == 0 and y.dtype == torch.bfloat16)
        y_WSND = self._gather(y.flatten(0, 1), slots * size * most, 0).unflatten(1, (slots, size * most))
        sources_WSN = self._gather(sources, slots, 0)
        for token, (places, own) in enumerate(zip(ids.tolist(), weights, strict=True)):
            total = torch.zeros(hidden)
            for place, weight in zip(places, own, strict=True):
                if place >= 0:
                    rank, slot = divmod(place, slots)
                    row = sources_WSN[rank, slot].tolist().index(index * most + token)
                    total += y_WSND[rank, slot, row].float() * weight
            out[token] = total
        self._sources = None

    def _check_row(self, part: Tensor, room: Tensor, most: int) -> None:
        assert part.dim() == 2 and part.is_contiguous() and room.is_contiguous()
        rows = self._num_slots, self._collectives.size * most, part.shape[1]
        assert room.shape == rows and room.dtype == part.dtype
        assert self._any_size or part.shape[1] * part.itemsize % 16 == 0

    def _gather(self, rows: Tensor, most: int, fill: int) -> Tensor:
        """The rows of all ranks, up to ``most`` of each."""
        padded = torch.full((most, rows.shape[1]), fill, dtype=rows.dtype)
        padded[: len(rows)] = rows
        if self._collectives.size == 1:
            return padded[None]
        sent = padded.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else padded
        gathered = self._collectives.wait(self._collectives.all_gather(sent, "rows"))
        return gathered.view(rows.dtype).view(self._collectives.size, most, rows.shape[1])
