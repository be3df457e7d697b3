"""A double of DeepEP's low-latency mode (sgl-deep-ep 0.1.2) over gloo: asserts of a call what the
library and its kernels need, and computes its definition on the host.

Nothing says in which order tokens arrive, so the last comes first; rows without a token hold what
no sum survives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.reference.fp8 import Quantised
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import ByteArrayRanks, Tokens3D
from lockstep.parallel.deepep_sizes import BufferShape, rounded_capacity

HIDDEN = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
MOST_CHOICES, QUEUE = 16, 1024


class DeepEPDouble:
    """The memory of the ranks of ``collectives``. ``any_size``: takes every hidden size and dtype,
    for cases that other exchanges share.
    """

    ids_dtype = torch.int64

    def __init__(self, collectives: Collectives, any_size: bool = False) -> None:
        self._collectives, self._any_size = collectives, any_size
        self.opened: list[BufferDouble] = []

    def open(self, shape: BufferShape, ranks: ByteArrayRanks) -> BufferDouble:
        size, capacity = ranks.Get_size(), rounded_capacity(shape.capacity, ranks.Get_size())
        assert (ranks.Get_rank(), size) == (self._collectives.index, self._collectives.size)
        told = ranks.allgather(bytearray(b"handle"))
        assert told == (bytearray(b"handle"),) * size and isinstance(told[0], bytearray)
        hint = size_hint(capacity, shape.hidden, size, shape.num_slots)
        assert not self.opened, "a process has NVSHMEM once"
        self.opened.append(BufferDouble(self._collectives, hint, shape.num_slots // size, self._any_size))
        return self.opened[-1]


class BufferDouble:
    """As ``Buffer``. ``num_bytes``: of the memory; ``num_qps``: queues for each rank."""

    def __init__(
        self, collectives: Collectives, num_bytes: int, num_qps: int, any_size: bool = False
    ) -> None:
        size = collectives.size
        assert size < 8 or size % 8 == 0, f"{size} ranks"
        self._collectives, self._any_size = collectives, any_size
        self._num_bytes, self._num_qps = num_bytes, num_qps
        self._layout: tuple[int, int, int] | None = None  # none yet: the memory is zero
        self.calls: list[str] = []
        self.under_way = 0  # dispatches without their combine

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        self._layout = num_max_dispatch_tokens_per_rank, hidden, num_experts
        self.calls.append("clean")

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool = True,
    ) -> tuple[Tokens3D, Tensor, Any, None, None]:
        size, index, most = self._collectives.size, self._collectives.index, num_max_dispatch_tokens_per_rank
        self._check_call("dispatch", most, x.shape[1], num_experts)
        self._check_rows(x, topk_idx, most, num_experts)
        slots, rows = num_experts // size, size * most
        assert self._any_size or not use_fp8 or x.shape[1] % 512 == 0
        x_WTD, ids_WTK = self._gather(x, most, 0), self._gather(topk_idx, most, -1)
        found = torch.full((slots, rows, x.shape[1]), torch.nan, dtype=x.dtype)
        counts = torch.zeros(slots, dtype=torch.int32)
        sources = torch.full((slots, rows), 1 << 30, dtype=torch.int32)
        ranges = torch.zeros(slots, size, dtype=torch.int64)
        for slot in range(slots):
            for source in reversed(range(size)):
                tokens = (ids_WTK[source] == index * slots + slot).any(1).nonzero().flatten().flip(0)
                begin = int(counts[slot])
                found[slot, begin : begin + len(tokens)] = x_WTD[source, tokens]
                sources[slot, begin : begin + len(tokens)] = tokens.to(torch.int32)
                ranges[slot, source] = (begin << 32) | len(tokens)
                counts[slot] += len(tokens)
        self.under_way += 1
        handle = sources, ranges, most, x.shape[1], num_experts
        return _in_fp8(found) if use_fp8 else found, counts, handle, None, None

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, *, out: Tensor | None = None
    ) -> tuple[Tensor, None, None]:
        sources, ranges, most, hidden, num_experts = handle
        size = self._collectives.size
        slots, rows = num_experts // size, size * most
        self._check_call("combine", most, hidden, num_experts)
        assert x.shape == (slots, rows, hidden) and x.is_contiguous()
        assert self._any_size or x.dtype == torch.bfloat16
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape and len(topk_idx) <= most
        assert out is not None and out.is_contiguous() and out.dtype == x.dtype
        assert out.shape == (len(topk_idx), hidden)
        y_WSND = self._gather(x.flatten(0, 1), slots * rows, 0).unflatten(1, (slots, rows))
        sources_WSN = self._gather(sources, slots, 0)
        ranges_WSW = self._gather(ranges, slots, 0)
        for token, (ids, weights) in enumerate(zip(topk_idx.tolist(), topk_weights, strict=True)):
            total = torch.zeros(hidden)
            for place, weight in zip(ids, weights, strict=True):
                if place >= 0:
                    rank, slot = divmod(place, slots)
                    packed = int(ranges_WSW[rank, slot, self._collectives.index])
                    begin, count = packed >> 32, packed & 0xFFFFFFFF
                    run = sources_WSN[rank, slot, begin : begin + count].tolist()
                    total += y_WSND[rank, slot, begin + run.index(token)].float() * weight
            out[token] = total
        self.under_way -= 1
        return out, None, None

    def _check_call(self, name: str, most: int, hidden: int, num_experts: int) -> None:
        """Calls with another division of the memory come after a meeting of all ranks."""
        self._layout = self._layout or (most, hidden, num_experts)
        assert self._layout == (most, hidden, num_experts), (
            f"{self._layout}, then {most, hidden, num_experts}"
        )
        assert size_hint(most, hidden, self._collectives.size, num_experts) <= self._num_bytes
        assert (most + 1) * 2 <= QUEUE and (self._collectives.size * most) % 4 == 0
        assert num_experts // self._collectives.size <= self._num_qps
        self.calls.append(name)

    def _check_rows(self, x: Tensor, topk_idx: Tensor, most: int, num_experts: int) -> None:
        assert x.dim() == topk_idx.dim() == 2 and x.is_contiguous() and topk_idx.is_contiguous()
        assert len(x) == len(topk_idx) <= most and topk_idx.shape[1] <= MOST_CHOICES
        assert topk_idx.dtype == torch.int64 and num_experts % self._collectives.size == 0
        assert all(-1 <= place < num_experts for place in topk_idx.flatten().tolist())
        assert self._any_size or (x.dtype == torch.bfloat16 and x.shape[1] in HIDDEN)

    def _gather(self, rows: Tensor, most: int, fill: int) -> Tensor:
        """The rows of all ranks, up to ``most`` of each."""
        padded = torch.full((most, rows.shape[1]), fill, dtype=rows.dtype)
        padded[: len(rows)] = rows
        if self._collectives.size == 1:
            return padded[None]
        gathered = self._collectives.wait(self._collectives.all_gather(padded, "rows"))
        return gathered.view(self._collectives.size, most, rows.shape[1])


def size_hint(capacity: int, hidden: int, size: int, num_experts: int) -> int:
    """As ``get_low_latency_rdma_size_hint``: what is sent and received, and flags, all twice."""
    there = 16 + max(2 * hidden, hidden + hidden // 128 * 4)
    back = hidden // 128 * 4 + 2 * hidden
    sent = max(capacity * there, num_experts * capacity * back)
    received = num_experts * capacity * max(there, back)
    flags = -(-4 * num_experts // 128) * 128
    total = 2 * (sent + received + flags)
    return (total + 128) // 128 * 128


def _in_fp8(x_SND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8, and their scales column by column, as the kernels compute both."""
    eight = by_kernels(x_SND.flatten(0, 1))
    slots, rows, _ = x_SND.shape
    scales = eight.scales.view(slots, rows, -1)
    return eight.values.view(x_SND.shape), scales.transpose(1, 2).contiguous().transpose(1, 2)


def by_kernels(x_ND: Tensor) -> Quantised:
    """Rows as the kernels quantise them, in float32."""
    groups = torch.nn.functional.pad(x_ND.float(), (0, -x_ND.shape[1] % 128)).unflatten(1, (-1, 128))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    values = (groups * (448.0 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = amax[..., 0] * torch.tensor(1 / 448.0)
    return Quantised(values.flatten(1)[:, : x_ND.shape[1]].contiguous(), scales)
