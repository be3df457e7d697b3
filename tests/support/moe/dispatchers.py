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
from lockstep.parallel.microbatches import Turns

CPU = torch.device("cpu")


def dispatcher_of(
    kind: str, placement: Placement, collectives: Collectives | None = None, turns: Turns | None = None
) -> Dispatcher:
    """``local``, ``all_gather`` or ``all_to_all``; in a group of one without ``collectives``. It
    gives ``turns`` away.
    """
    if kind == "local":
        return LocalDispatcher(placement, CPU)
    exchange = AllGatherExchange if kind == "all_gather" else AllToAllExchange
    alone = Collectives("alone", 0, 1, None, 1.0, CPU)
    give_turn = (turns or Turns()).give
    return ExchangeDispatcher(exchange(placement, collectives or alone, CPU), CPU, give_turn=give_turn)
