"""Dispatchers by name."""

from __future__ import annotations

import torch

from lockstep.moe.balance.placement import Placement
from lockstep.moe.dispatch.all_gather import AllGatherExchange
from lockstep.moe.dispatch.all_to_all import AllToAllExchange
from lockstep.moe.dispatch.dispatcher import Dispatcher
from lockstep.moe.dispatch.exchange import ExchangeDispatcher
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.collectives import Collectives

CPU = torch.device("cpu")


def dispatcher_of(kind: str, placement: Placement, collectives: Collectives | None = None) -> Dispatcher:
    """``local``, ``all_gather`` or ``all_to_all``; in a group of one without ``collectives``."""
    if kind == "local":
        return LocalDispatcher(placement, CPU)
    exchange = AllGatherExchange if kind == "all_gather" else AllToAllExchange
    alone = Collectives("alone", 0, 1, None, 1.0, CPU)
    return ExchangeDispatcher(exchange(placement, collectives or alone, CPU), CPU)
