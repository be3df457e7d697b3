"""Exchanges of tokens by the low-latency kernels of NCCL EP (package ``nccl-extensions``): over
NVLink and, between NVLink domains, over RDMA that GPUs begin themselves (NCCL's GIN).

A token travels once to each rank of its choices, and is laid into their slots there; its outputs
come back one by one. Every row of a slot is reserved for the largest step. Tokens in FP8 travel as
they are, with their scales. Each round under way has a handle of its own, which holds the places of
its tokens. Kernels are compiled at the first call of each kind, in the first steps of an epoch.

A wait for a rank that is gone traps after 100 s and takes the process's context along; the mask of
ranks (``enable_mask``) would leave out outputs instead, and is off. Windows of memory close with
all ranks alone. So the process ends with its epoch. Not run on a card yet.

Suffixes: as in ``slot_major.py``; here N = W x the largest capacity.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from .nccl_ep_sizes import MemoryShape
from .slot_major import SlotArrivals, SlotGroup, SlotShape, SlotTokens
from .store_ranks import StoreRanks


class RoundHandle(Protocol):
    """The routes of one round at a time; the library's ``Handle``."""

    def update(self, topk_idx: Any, *, stream: int) -> None:
        """Takes the places of the next dispatch, int64 [T, K] or -1 for none; no copy."""
        ...

    def dispatch(self, inputs: Any, outputs: Any, *, layout_info: Any, config: Any, stream: int) -> None: ...

    def combine(self, inputs: Any, outputs: Any, *, stream: int) -> None: ...


class RoundBundles(Protocol):
    """The library's descriptors of tensors and of their parts in a call: ``nccl.ep``."""

    Tensor: Callable[[Tensor], Any]
    DispatchInputs: Callable[..., Any]
    DispatchOutputs: Callable[..., Any]
    DispatchConfig: Callable[..., Any]
    CombineInputs: Callable[..., Any]
    CombineOutputs: Callable[..., Any]
    LayoutInfo: Callable[..., Any]
    DispatchQuantizationRecipe: Any


class NcclEpLibrary:
    """``nccl.ep`` and ``nccl.core``. Raises ValueError where they are not installed."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        try:
            self._core = importlib.import_module("nccl.core")
            self._ep = importlib.import_module("nccl.ep")
        except ImportError as error:
            raise ValueError(
                f"experts.dispatch = nccl_ep: {error}; install nccl-extensions, or use all_to_all"
            ) from error

    @property
    def bundles(self) -> RoundBundles:
        bundles: RoundBundles = self._ep
        return bundles

    def open(self, shape: SlotShape, ranks: StoreRanks, device: torch.device) -> list[RoundHandle]:
        """A handle for every lane, over a communicator of its own. All ranks call alike, each with
        its device as the current one.
        """
        size = ranks.Get_size()
        index = ranks.Get_rank()
        core = self._core
        ep = self._ep
        own = core.get_unique_id().as_bytes if index == 0 else None
        unique = core.UniqueId.from_bytes(ranks.bcast(own, 0))
        communicator = core.Communicator.init(size, index, unique)
        config = ep.GroupConfig(
            algorithm=ep.Algorithm.LOW_LATENCY,
            num_experts=shape.num_slots,
            max_dispatch_tokens_per_rank=max(1, shape.capacity),
            max_token_bytes=memory_shape(shape).token_bytes,
        )
        group = ep.Group.create(communicator, config)
        self._kept += communicator, group
        nowhere = torch.full((1, shape.top_k), -1, dtype=torch.int64, device=device)
        return [
            group.create_handle(ep.Layout.EXPERT_MAJOR, ep.Tensor(nowhere), stream=stream_of(device))
            for _ in range(shape.lanes)
        ]


class HandleLibrary(Protocol):
    """Opens handles for rounds."""

    @property
    def bundles(self) -> RoundBundles: ...

    def open(self, shape: SlotShape, ranks: StoreRanks, device: torch.device) -> list[RoundHandle]: ...


class NcclEpGroup(SlotGroup):
    """The memory of ``size`` ranks."""

    means = "NCCL EP's memory"

    def __init__(
        self, name: str, index: int, size: int, store: Store, device: torch.device, library: HandleLibrary
    ) -> None:
        super().__init__(name, index, size, store, device)
        self._library = library

    @property
    def transport(self) -> str:
        return "NCCL EP" if self.size > 1 else ""

    @property
    def num_bytes(self) -> int:
        return memory_shape(self.shape).num_bytes(self.size)

    def num_rows(self, capacity: int) -> int:
        return self.size * max(1, capacity)

    def _open(self, met: Store) -> NcclEpRounds:
        handles = self._library.open(self.shape, StoreRanks(met, self.index, self.size), self._device)
        return NcclEpRounds(handles, self._library.bundles, self.shape, self.size)


class NcclEpRounds:
    """Rounds through handles of the library, by lane."""

    def __init__(
        self, handles: list[RoundHandle], bundles: RoundBundles, shape: SlotShape, size: int
    ) -> None:
        self._handles, self._ep, self._shape = handles, bundles, shape
        self._num_slots, self._num_rows = shape.num_slots // size, size * max(1, shape.capacity)

    def dispatch(self, lane: int, tokens: SlotTokens, capacity: int, begins: bool) -> SlotArrivals:
        """Rows are those of the largest step."""
        ep, handle, stream = self._ep, self._handles[lane], stream_of(tokens.values.device)
        values, scales = self._room(tokens.values), None
        counts_S = torch.empty(self._num_slots, dtype=torch.int32, device=values.device)
        if tokens.scales is not None:
            scales = self._room(tokens.scales)
        recipes = ep.DispatchQuantizationRecipe
        handle.update(ep.Tensor(tokens.places_TK), stream=stream)
        handle.dispatch(
            ep.DispatchInputs(tokens=ep.Tensor(tokens.values), scales=self._described(tokens.scales)),
            ep.DispatchOutputs(tokens=ep.Tensor(values), scales=self._described(scales)),
            layout_info=ep.LayoutInfo(expert_counters=ep.Tensor(counts_S)),
            config=ep.DispatchConfig(
                quantization_recipe=recipes.NONE if tokens.scales is None else recipes.FWD
            ),
            stream=stream,
        )
        return SlotArrivals(values, scales, counts_S)

    def combine(self, lane: int, y_SRD: Tensor, tokens: SlotTokens, known: Any, sums_TD: Tensor) -> None:
        """Outputs of a smaller step are laid into rows of the largest one."""
        ep, y_SND = self._ep, y_SRD
        if y_SRD.shape[1] < self._num_rows:
            y_SND = self._room(y_SRD.flatten(0, 1))
            y_SND[:, : y_SRD.shape[1]] = y_SRD
        self._handles[lane].combine(
            ep.CombineInputs(tokens=ep.Tensor(y_SND)),
            ep.CombineOutputs(tokens=ep.Tensor(sums_TD), topk_weights=ep.Tensor(tokens.weights_TK)),
            stream=stream_of(y_SND.device),
        )

    def _room(self, rows: Tensor) -> Tensor:
        """Rows like these for all slots."""
        return rows.new_empty(self._num_slots, self._num_rows, rows.shape[1])

    def _described(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else self._ep.Tensor(tensor)


def memory_shape(shape: SlotShape) -> MemoryShape:
    """The memory for rounds of ``shape``."""
    return MemoryShape(shape.num_slots, shape.top_k, max(1, shape.capacity), shape.hidden)


def stream_of(device: torch.device) -> int:
    """The address of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
