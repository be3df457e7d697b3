"""Dispatchers by name."""

from __future__ import annotations

import torch

from lockstep.kernels.table import Column
from lockstep.moe.balance.placement import Placement
from lockstep.moe.dispatch.all_gather import AllGatherExchange
from lockstep.moe.dispatch.all_to_all import AllToAllExchange
from lockstep.moe.dispatch.dispatcher import Dispatcher
from lockstep.moe.dispatch.exchange import Exchange, ExchangeDispatcher
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.moe.dispatch.nvlink import NvlinkExchange
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.symmetric import SymmetricExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import DeepEPGroup
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.nccl_ep import NcclEpGroup
from lockstep.parallel.nvlink import NvlinkGroup
from lockstep.parallel.one_epoch import OneEpochGroup
from lockstep.parallel.symmetric_memory import SymmetricGroup

from ..parallel.deepep_double import DeepEPDouble
from ..parallel.nccl_ep_double import NcclEpDouble
from ..parallel.nvlink_double import NvlinkDouble
from ..parallel.symmetric_double import SymmetricDouble

CPU = torch.device("cpu")


def dispatcher_of(
    kind: str,
    placement: Placement,
    collectives: Collectives | None = None,
    turns: Turns | None = None,
    device: torch.device = CPU,
    column: Column = "cpu",
) -> Dispatcher:
    """``local``, ``all_gather``, ``summing`` (all_gather as on GPUs) or ``all_to_all``; in a group
    of one without ``collectives``. It gives ``turns`` away. ``device``: of a local one. ``column``:
    that computes the experts.
    """
    if kind == "local":
        return LocalDispatcher(placement, device)
    group = collectives or Collectives("alone", 0, 1, None, 1.0, CPU)
    give_turn = (turns or Turns()).give
    if kind == "summing":
        summing = AllGatherExchange(placement, group, CPU, exact=False)
        return ExchangeDispatcher(summing, CPU, give_turn=give_turn)
    exchange: Exchange
    if kind == "all_gather":
        exchange = AllGatherExchange(placement, group, CPU, column=column)
    else:
        exchange = AllToAllExchange(placement, group, CPU)
    return ExchangeDispatcher(exchange, CPU, give_turn=give_turn)


def dispatcher_within_capacity(
    kind: str,
    placement: Placement,
    collectives: Collectives,
    shape: TokenShape,
    turns: Turns | None = None,
) -> ExchangeDispatcher:
    """``symmetric`` (all_to_all on GPUs), ``flashinfer``, ``deepep`` or ``nccl_ep``, over a double
    of its library among the ranks of ``collectives``. It gives ``turns`` away.
    """
    place = "experts", collectives.index, collectives.size
    store = collectives.store or torch.distributed.HashStore()
    group: OneEpochGroup
    exchange: Exchange
    if kind == "symmetric":
        group = symmetric = SymmetricGroup(*place, store, CPU, SymmetricDouble(collectives))
        exchange = SymmetricExchange(placement, symmetric, CPU, shape)
    elif kind == "deepep":
        group = deep = DeepEPGroup(*place, store, CPU, DeepEPDouble(collectives, any_size=True))
        exchange = SlotMajorExchange(placement, deep, CPU, shape)
    elif kind == "nccl_ep":
        group = by_nccl = NcclEpGroup(*place, store, CPU, NcclEpDouble(collectives, any_size=True))
        exchange = SlotMajorExchange(placement, by_nccl, CPU, shape)
    else:
        group = linked = NvlinkGroup(*place, store, CPU, NvlinkDouble(collectives))
        exchange = NvlinkExchange(placement, linked, CPU, shape)
    group.build(-(-store.add("memories", 1) // collectives.size))  # ranks make them one after another
    return ExchangeDispatcher(exchange, CPU, give_turn=(turns or Turns()).give)
