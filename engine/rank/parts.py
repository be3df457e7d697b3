"""The parts that a rank executes its plans with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...moe.dispatch.dispatcher import Dispatcher
from ...parallel.dense import LayerSplits
from ...parallel.microbatches import Turns
from ...parallel.pipeline import PipelineLinks
from ...parallel.rank_groups import RankGroups
from ..models.decoder import Model
from .expert_slots import ExpertSlots
from .grammars import Grammars
from .page_pool import KVPool


def _quiet(text: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Parts:
    """Parts of an executor. The model's weights are loaded; ``begin_epoch`` builds the groups.

    ``splits``: how the model's layers are. ``links``: to the other stages. ``turns``: those that
    the dispatcher gives away. ``samples``: whether this rank draws the tokens of its tensor group;
    the others take them over. ``expert_bytes`` are the weights of one expert of one layer.
    ``slots`` None: this rank has all experts. ``grammars`` None: no request may have one, or
    another rank samples. ``tell`` is called with what is computed or captured ahead of plans, and
    with an empty text once plans are executed again.
    """

    rank: int
    model: Model
    dispatcher: Dispatcher
    groups: RankGroups
    splits: LayerSplits
    links: PipelineLinks
    turns: Turns
    samples: bool
    pool: KVPool
    device: torch.device
    expert_bytes: int = 0
    slots: ExpertSlots | None = None
    grammars: Grammars | None = None
    tell: Callable[[str], None] = _quiet
