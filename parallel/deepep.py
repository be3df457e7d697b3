"""Exchanges of tokens by the low-latency kernels of DeepEP (package ``sgl-deep-ep``): from GPU to
GPU over NVLink within a node and RDMA between nodes, through NVSHMEM.

A call sends and receives; counts and waits stay on the device, so a captured step repeats the
calls. The memory has two halves, which calls take in turn. Each call waits for all ranks, so none
is more than one call ahead, and the half of the call before last is free: microbatches share the
memory. How it is divided follows from the capacity, so ranks meet in ``clean_low_latency_buffer``
before calls with another one. Kernels may also send first and receive later
(``return_recv_hook``); then, of two microbatches, a rank could overwrite what another has not
received yet, so that is off.

A wait for a rank that is gone traps after 100 s and takes the process's context along. The
library's mask of ranks (``enable_shrink``) would leave out outputs instead, and nobody can join
NVSHMEM later, so it is off, and the process ends with its epoch. Not run on a card yet.

Suffixes: T own tokens, K choices of a token, D hidden, G = D / 128, W ranks, S slots of a rank,
N = W x capacity rows of a slot.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from .deepep_sizes import BufferShape, rounded_capacity
from .one_epoch import OneEpochGroup, Started
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
    GPUs alone, and looks for the torch and NCCL that it was built for.
    """

    def __init__(self) -> None:
        try:
            self._deep_ep = importlib.import_module("deep_ep")
        except (ImportError, AssertionError) as error:
            raise ValueError(
                f"experts.dispatch = deepep: {error}; install sgl-deep-ep with the torch that it needs, "
                "or use all_to_all"
            ) from error

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


class DeepEPGroup(OneEpochGroup):
    """The memory of ``size`` ranks for calls that follow one another."""

    means = "DeepEP's memory"

    def __init__(
        self, name: str, index: int, size: int, store: Store, device: torch.device, library: BufferLibrary
    ) -> None:
        super().__init__(name, index, size, store, device)
        self._library = library
        self._shape: BufferShape | None = None
        self._buffer: LowLatencyBuffer | None = None

    @property
    def transport(self) -> str:
        return "DeepEP over NVSHMEM" if self.size > 1 else ""

    @property
    def ids_dtype(self) -> torch.dtype:
        return self._library.ids_dtype

    def reserve(self, shape: BufferShape) -> None:
        """Memory that ``build`` will open: one, as NVSHMEM is a process's once."""
        assert self._shape is None, f"{self._name}: memory of {self._shape} and of {shape}"
        self._shape = shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory."""
        return 0 if self._shape is None else self._shape.num_bytes(self.size)

    @property
    def buffer(self) -> LowLatencyBuffer:
        assert self._buffer is not None, f"{self._name}: not built yet"
        return self._buffer

    def start(self, calls: Callable[[], None]) -> Started:
        """Makes calls for its stream, once the current one has come so far. Tensors that they take
        live until they have ended; those that they return are that stream's.
        """
        return self._start(calls)

    def _meet(self, met: Store) -> None:
        assert self._shape is not None
        self._buffer = self._library.open(self._shape, ByteArrayRanks(met, self.index, self.size))

    def _stand_in(self) -> None:
        assert self._shape is not None
        self._buffer = BufferAlone(self._shape, self.size, self._device)

    def _drop(self) -> None:
        self._buffer = None


class BufferAlone:
    """The memory of a rank by itself: no token comes, in as much memory as among ``size`` ranks."""

    def __init__(self, shape: BufferShape, size: int, device: torch.device) -> None:
        self._size = size
        self._room = torch.zeros(shape.num_bytes(size), dtype=torch.uint8, device=device)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """There are no flags."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool = True,
    ) -> tuple[Tokens3D, Tensor, Any, Any, Any]:
        slots, rows, hidden = (
            num_experts // self._size,
            self._size * num_max_dispatch_tokens_per_rank,
            x.shape[1],
        )
        counts = torch.zeros(slots, dtype=torch.int32, device=x.device)
        tokens = x.new_empty(slots, rows, hidden, dtype=torch.float8_e4m3fn if use_fp8 else x.dtype)
        if not use_fp8:
            return tokens, counts, None, None, None
        scales = torch.empty(slots, hidden // 128, rows, device=x.device).transpose(1, 2)
        return (tokens, scales), counts, None, None, None

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, *, out: Tensor | None = None
    ) -> tuple[Tensor, Any, Any]:
        assert out is not None
        return out.zero_(), None, None
