"""The dispatcher that a rank's spec asks for, and the groups of ranks that it needs."""

from __future__ import annotations

import torch

from ...moe.balance.placement import Placement
from ...moe.config import MoEConfig
from ...moe.dispatch.all_gather import AllGatherExchange
from ...moe.dispatch.all_to_all import AllToAllExchange
from ...moe.dispatch.dispatcher import Dispatcher
from ...moe.dispatch.exchange import Exchange, ExchangeDispatcher
from ...moe.dispatch.local import LocalDispatcher
from ...moe.dispatch.nvlink import NvlinkExchange
from ...moe.dispatch.slot_major import SlotMajorExchange
from ...moe.dispatch.symmetric import SymmetricExchange
from ...moe.dispatch.within_capacity import TokenShape
from ...parallel.collectives import Collectives
from ...parallel.deepep import DeepEPGroup, DeepEPLibrary
from ...parallel.microbatches import Turns
from ...parallel.nccl_ep import NcclEpGroup, NcclEpLibrary
from ...parallel.nvlink import FlashInferLibrary, NvlinkGroup
from ...parallel.one_epoch import OneEpochGroup
from ...parallel.symmetric_memory import SymmetricGroup, TorchSymmetricLibrary
from ..protocol.buckets import most_tokens
from ..protocol.specs import RankSpec


def build_dispatcher(
    spec: RankSpec,
    moe: MoEConfig,
    dtype: torch.dtype,
    placement: Placement,
    experts: Collectives,
    turns: Turns,
) -> tuple[Dispatcher, OneEpochGroup | None]:
    """A dispatcher over the ranks of ``experts``, for activations of ``dtype``, and the memory that
    it shares with them, to be built after that group. It gives ``turns`` away. Raises ValueError
    where the ranks or the device cannot have the dispatcher.
    """
    device = torch.device(spec.device)
    if spec.dispatch == "local" and experts.size == 1:
        return LocalDispatcher(placement, device), None
    exchange: Exchange
    eight, nodes = spec.wire == "fp8", _nodes(spec)
    memory: OneEpochGroup | None = None
    store = None if device.type == "cpu" else experts.store
    shape = TokenShape(_capacities(spec), moe.top_k, moe.hidden, dtype, eight)
    place = "experts", experts.index, experts.size
    if spec.dispatch == "all_gather":
        exchange = AllGatherExchange(placement, experts, device, nodes, eight=eight)
    elif spec.dispatch == "all_to_all" and device.type == "cpu":
        exchange = AllToAllExchange(placement, experts, device, nodes)
    elif spec.dispatch == "all_to_all" and store is not None:
        memory = symmetric = SymmetricGroup(*place, store, device, TorchSymmetricLibrary())
        exchange = SymmetricExchange(placement, symmetric, device, shape, nodes)
    elif spec.dispatch == "flashinfer" and store is not None:
        memory = linked = NvlinkGroup(*place, store, device, FlashInferLibrary())
        exchange = NvlinkExchange(placement, linked, device, shape, nodes)
    elif spec.dispatch == "deepep" and store is not None:
        memory = deep = DeepEPGroup(*place, store, device, DeepEPLibrary())
        exchange = SlotMajorExchange(placement, deep, device, shape, nodes)
    elif spec.dispatch == "nccl_ep" and store is not None:
        memory = by_nccl = NcclEpGroup(*place, store, device, NcclEpLibrary())
        exchange = SlotMajorExchange(placement, by_nccl, device, shape, nodes)
    else:
        raise ValueError(
            f"experts.dispatch = {spec.dispatch}, on {device} with {experts.size} ranks: allowed are "
            "all_gather, all_to_all, flashinfer, deepep and nccl_ep (on GPUs with two ranks or more), and "
            "local for one rank"
        )
    return ExchangeDispatcher(exchange, device, give_turn=turns.give), memory


def _capacities(spec: RankSpec) -> tuple[int, ...]:
    """Most tokens of this rank in a step, and in a microbatch."""
    tokens = (spec.capacity, most_tokens(spec.capacity)) if spec.overlap else (spec.capacity,)
    return tuple(-(-most // spec.mesh.tensor) for most in tokens)


def _nodes(spec: RankSpec) -> list[int]:
    """The host of each rank that shares this one's experts."""
    first = spec.mesh.coordinates(spec.rank).stage * spec.mesh.experts
    return [(first + index) // spec.ranks_per_host for index in range(spec.mesh.experts)]
