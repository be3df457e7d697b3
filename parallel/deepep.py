"""Exchanges of tokens by the low-latency kernels of DeepEP (package ``sgl-deep-ep``): from GPU to
GPU over NVLink within a node and RDMA between nodes, through NVSHMEM.

How the memory is divided follows from the capacity, so ranks meet in ``clean_low_latency_buffer``
before calls with another one. Kernels may also send first and receive later
(``return_recv_hook``); then, of two microbatches, a rank could overwrite what another has not
received yet, so that is off.

In FP8 the kernels quantise tokens themselves: amax of 128 values, 1e-4 at least, makes a scale of
amax / 448, and values are multiplied by 448 / amax, where experts divide by their scale. So a few
values differ in their last bit.

A wait for a rank that is gone traps after 100 s and takes the process's context along. The
library's mask of ranks (``enable_shrink``) would leave out outputs instead, and nobody can join
NVSHMEM later, so it is off, and the process ends with its epoch. Not run on a card yet.

Suffixes: T own tokens, K choices of a token, D hidden, G = D / 128, W ranks, S slots of a rank,
N = W x capacity rows of a slot.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from .deepep_sizes import BufferShape, rounded_capacity
from .slot_major import SlotArrivals, SlotGroup, SlotShape, SlotTokens
from .store_ranks import StoreRanks

Tokens3D = Tensor | tuple[Tensor, Tensor]
"""Tokens of all slots [S, N, D] bf16; or float8_e4m3fn and their scales float32 [S, N, G], of
strides (G x N, 1, N).
"""


class LowLatencyBuffer(Protocol):
    """The memory of all ranks; part of the library's ``Buffer``."""

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Makes flags ready between two barriers of all ranks."""
        ...

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool = True,
    ) -> tuple[Tokens3D, Tensor, Any, Any, Any]:
        """Sends each token x [T, D] bf16 to its slots ``topk_idx`` [T, K], rank x S + slot or -1
        for none; quantises it first if ``use_fp8``. Returns the tokens of own slots; int32 [S],
        how many of each slot's first rows are tokens; the handle for ``low_latency_combine``; an
        event and a hook, which nobody asked for.
        """
        ...

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, *, out: Tensor | None = None
    ) -> tuple[Tensor, Any, Any]:
        """Sends outputs x [S, N, D] bf16 back. Fills ``out`` [T, D] with their sums by
        ``topk_weights`` float32 [T, K], in float32 in the order of k.
        """
        ...


class BufferLibrary(Protocol):
    """Opens the memory."""

    @property
    def ids_dtype(self) -> torch.dtype:
        """The dtype of ``topk_idx``."""
        ...

    def open(self, shape: BufferShape, ranks: ByteArrayRanks) -> LowLatencyBuffer:
        """All ranks call alike, each with its device as the current one."""
        ...


class DeepEPLibrary:
    """``deep_ep``. Raises ValueError where it is not installed or does not fit: it is imported on
    GPUs alone, and looks for the torch and NCCL that it was built for. It looks at cards on PCIe
    by torch's groups, which there are none of here.
    """

    def __init__(self) -> None:
        try:
            self._deep_ep = importlib.import_module("deep_ep")
        except (ImportError, AssertionError) as error:
            raise ValueError(
                f"experts.dispatch = deepep: {error}; install sgl-deep-ep with the torch that it needs, "
                "or use all_to_all"
            ) from error
        name = torch.cuda.get_device_name()
        if "PCIE" in name:
            raise ValueError(f"experts.dispatch = deepep: {name}: needs GPUs with NVLink; use all_to_all")

    @property
    def ids_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._deep_ep.topk_idx_t
        return dtype

    def open(self, shape: BufferShape, ranks: ByteArrayRanks) -> LowLatencyBuffer:
        """Destruction would wait for the other ranks, so it is left to the end of the process."""
        size, library = ranks.Get_size(), self._deep_ep.Buffer
        capacity = rounded_capacity(shape.capacity, size)
        num_bytes = library.get_low_latency_rdma_size_hint(capacity, shape.hidden, size, shape.num_slots)
        opened: LowLatencyBuffer = library(
            None,
            num_rdma_bytes=num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=shape.num_slots // size,
            explicitly_destroy=True,
            comm=ranks,
        )
        return opened


class ByteArrayRanks(StoreRanks):
    """Ranks that hand each other byte arrays, the one type of bytes that the library takes."""

    def allgather(self, data: Any) -> tuple[Any, ...]:
        parts = super().allgather(data)
        return tuple(bytearray(part) if isinstance(part, bytes) else part for part in parts)


class DeepEPGroup(SlotGroup):
    """The memory of ``size`` ranks."""

    means = "DeepEP's memory"
    quantises = True

    def __init__(
        self, name: str, index: int, size: int, store: Store, device: torch.device, library: BufferLibrary
    ) -> None:
        super().__init__(name, index, size, store, device)
        self._library, self.ids_dtype = library, library.ids_dtype

    @property
    def transport(self) -> str:
        return "DeepEP over NVSHMEM" if self.size > 1 else ""

    @property
    def num_bytes(self) -> int:
        return self._buffer_shape.num_bytes(self.size)

    def num_rows(self, capacity: int) -> int:
        return self.size * rounded_capacity(capacity, self.size)

    @property
    def _buffer_shape(self) -> BufferShape:
        return BufferShape(self.shape.num_slots, self.shape.capacity, self.shape.hidden)

    def _open(self, met: Store) -> DeepEPRounds:
        buffer = self._library.open(self._buffer_shape, ByteArrayRanks(met, self.index, self.size))
        return DeepEPRounds(buffer, self.shape, self.size)


class DeepEPRounds:
    """Rounds through a buffer of the library."""

    def __init__(self, buffer: LowLatencyBuffer, shape: SlotShape, size: int) -> None:
        self._buffer, self._shape, self._size = buffer, shape, size

    def dispatch(self, lane: int, tokens: SlotTokens, capacity: int, begins: bool) -> SlotArrivals:
        """The memory is divided by capacity, so ranks meet first if the step ``begins``."""
        shape, rounded = self._shape, rounded_capacity(capacity, self._size)
        if begins:
            self._buffer.clean_low_latency_buffer(rounded, shape.hidden, shape.num_slots)
        arrived, counts_S, known, _, _ = self._buffer.low_latency_dispatch(
            tokens.values, tokens.places_TK, rounded, shape.num_slots, use_fp8=shape.eight
        )
        values, scales = arrived if isinstance(arrived, tuple) else (arrived, None)
        return SlotArrivals(values, scales, counts_S, known)

    def combine(self, lane: int, y_SRD: Tensor, tokens: SlotTokens, known: Any, sums_TD: Tensor) -> None:
        self._buffer.low_latency_combine(y_SRD, tokens.places_TK, tokens.weights_TK, known, out=sums_TD)
