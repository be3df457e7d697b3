"""Exchanges of tokens over NVLink by FlashInfer (package ``flashinfer-python``, from 0.7.4 on):
``NVLinkOneSidedAlltoAll`` of ``flashinfer.moe_ep``, among GPUs of one node or of a rack that is one
NVLink domain.

A round is a dispatch and its combine. In both, ranks read and write each other's memory; counts
and waits stay on the device, so a captured step repeats the calls. Two ways more that the library
has for small steps, by counted writes (CFT) and by vectors that carry their own arrival (Lamport,
up to 64 ranks), are off: they take more memory, and nobody has measured here that they pay.

A wait for a rank that is gone traps after 300 s and takes the process's context along; the
library's mask of ranks cannot be captured. So the process ends with its epoch. Not run on a card
yet.

Suffixes: T own tokens, K choices of a token, D hidden, G = ceil(D / 128), W ranks, S slots of a
rank, N = W x capacity of the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from .one_epoch import OneEpochGroup, Started
from .store_ranks import StoreRanks


@dataclass(frozen=True)
class RoundShape:
    """Sizes of the rounds of one memory. ``num_slots``: of all ranks, W x S. ``capacity``: most
    tokens of a rank. ``eight``: they travel to experts in FP8 and return in ``dtype``.
    """

    num_slots: int
    top_k: int
    capacity: int
    hidden: int
    dtype: torch.dtype
    eight: bool = False

    def num_bytes(self, size: int) -> int:
        """Bytes of a rank's memory among ``size`` ranks, flags and alignment aside: tokens with
        slots and weights, and outputs.
        """
        sent = self.hidden * self.dtype.itemsize
        if self.eight:
            sent = self.hidden + 4 * -(-self.hidden // 128)
        return size * self.capacity * (sent + 8 * self.top_k + self.hidden * max(2, self.dtype.itemsize))


class Arrived(Protocol):
    """The tokens of all ranks for this one's slots; views that stay until the combine.

    hidden_states [N, D], in FP8 as bytes; topk_ids int32 [N, K] of all its choices, or -1 in rows
    without a token; topk_weights float32 [N, K]; hidden_states_scale float32 [N, G] in FP8.
    """

    @property
    def hidden_states(self) -> Tensor: ...

    @property
    def topk_ids(self) -> Tensor: ...

    @property
    def topk_weights(self) -> Tensor | None: ...

    @property
    def hidden_states_scale(self) -> Tensor | None: ...


class Rounds(Protocol):
    """One memory of all ranks, in which rounds follow one another; part of the library's
    ``MoEEpCommunication``.
    """

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        runtime_max_tokens_per_rank: int | None = None,
    ) -> Arrived:
        """Sends each token once to every rank that has one of its slots ``topk_ids`` (int32 [T, K],
        rank x S + slot, or -1 for none). ``runtime_max_tokens_per_rank``: the capacity of the step,
        equal on all ranks.
        """
        ...

    def get_combine_input_buffer(self, dtype: torch.dtype) -> Tensor:
        """Room [N, D] for the sums that ``combine`` takes."""
        ...

    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
        """Fills ``output`` [T, D] with the sum, in float32, of what the ranks have for a token."""
        ...


class RoundsLibrary(Protocol):
    """Opens memories for rounds."""

    def open(self, shape: RoundShape, ranks: StoreRanks, device: torch.device) -> Rounds:
        """All ranks call alike."""
        ...


class FlashInferLibrary:
    """``flashinfer.moe_ep``. Raises ValueError where it is not installed."""

    def __init__(self) -> None:
        try:
            self._moe_ep = importlib.import_module("flashinfer.moe_ep")
            self._formats = importlib.import_module("flashinfer.fused_moe").QuantFormat
        except ImportError as error:
            raise ValueError(
                f"experts.dispatch = flashinfer: {error}; install flashinfer-python 0.7.4, or use all_to_all"
            ) from error

    def open(self, shape: RoundShape, ranks: StoreRanks, device: torch.device) -> Rounds:
        bootstrap = self._moe_ep.BootstrapConfig(
            world_size=ranks.Get_size(), rank=ranks.Get_rank(), device=device.index
        )
        params = self._moe_ep.MoEEpCommParams(
            num_experts=shape.num_slots,
            top_k=shape.top_k,
            max_tokens_per_rank=shape.capacity,
            hidden_size=shape.hidden,
            dtype=shape.dtype,
            dispatch_format=self._formats.DeepSeekFp8 if shape.eight else None,
            invalid_expert_id=-1,
        )
        way = self._moe_ep.NVLinkOneSidedConfig(comm_backend=ranks, cft=False, lamport=False)
        opened: Rounds = self._moe_ep.create_communication(bootstrap, params, way)
        return opened


class NvlinkGroup(OneEpochGroup):
    """Memories of ``size`` ranks for rounds of tokens, each for one round at a time."""

    means = "memory over NVLink"

    def __init__(
        self, name: str, index: int, size: int, store: Store, device: torch.device, library: RoundsLibrary
    ) -> None:
        super().__init__(name, index, size, store, device)
        self._library = library
        self._shapes: list[RoundShape] = []
        self._rounds: list[Rounds] = []

    @property
    def transport(self) -> str:
        return "FlashInfer over NVLink" if self.size > 1 else ""

    def reserve(self, shape: RoundShape) -> int:
        """The number of a memory that ``build`` will open. The library shares one among equal
        shapes, so they differ.
        """
        assert not self._rounds, f"{self._name}: memory is reserved before it is built"
        assert shape not in self._shapes, f"{self._name}: two memories of {shape}"
        self._shapes.append(shape)
        return len(self._shapes) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all memories reserved so far."""
        return sum(shape.num_bytes(self.size) for shape in self._shapes)

    def __getitem__(self, number: int) -> Rounds:
        return self._rounds[number]

    def start(self, half: Callable[[], None]) -> Started:
        """Calls ``half`` of a round for its stream, once the current one has come so far. Tensors
        that it takes live until it has ended.
        """
        return self._start(half)

    def room_for_outputs(self, number: int, dtype: torch.dtype) -> Tensor:
        """Rows [N, D] of a memory, from which outputs leave; of the last dispatch."""
        with self._guarded("asked for room for outputs"):
            return self._rounds[number].get_combine_input_buffer(dtype)

    def _meet(self, met: Store) -> None:
        ranks = StoreRanks(met, self.index, self.size)
        self._rounds = [self._library.open(shape, ranks, self._device) for shape in self._shapes]

    def _stand_in(self) -> None:
        self._rounds = [RoundsAlone(shape, self.size, self._device) for shape in self._shapes]

    def _drop(self) -> None:
        self._rounds = []


@dataclass(frozen=True)
class ArrivedAlone:
    """``Arrived`` in a rehearsal."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    hidden_states_scale: Tensor | None


class RoundsAlone:
    """Rounds of a rank by itself: no token comes, in as much memory as among ``size`` ranks."""

    def __init__(self, shape: RoundShape, size: int, device: torch.device) -> None:
        rows, hidden = size * shape.capacity, shape.hidden
        self._size, self._num_rows = size, 0

        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self._tokens = zeros(hidden, torch.uint8 if shape.eight else shape.dtype)
        self._scales = zeros(-(-hidden // 128), torch.float32) if shape.eight else None
        self._ids = zeros(shape.top_k, torch.int32) - 1
        self._weights = zeros(shape.top_k, torch.float32)
        self._sums = zeros(hidden, shape.dtype)

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        runtime_max_tokens_per_rank: int | None = None,
    ) -> Arrived:
        assert runtime_max_tokens_per_rank is not None
        rows = self._num_rows = self._size * runtime_max_tokens_per_rank
        scales = None if self._scales is None else self._scales[:rows]
        return ArrivedAlone(self._tokens[:rows], self._ids[:rows], self._weights[:rows], scales)

    def get_combine_input_buffer(self, dtype: torch.dtype) -> Tensor:
        return self._sums[: self._num_rows]

    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
        assert output is not None
        return output.zero_()
