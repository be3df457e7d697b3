"""The executor of a device for real models, on tensors without memory, with Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.engine.models.config import load_config
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.rank.device import executor as device_executor
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.page_pool import KVPool, entries_of
from lockstep.engine.rank.parts import Parts
from lockstep.launch.recipe.file import find_recipe
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.clock import NoClock
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.dense import UNSPLIT_LAYERS
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.stages import whole_model

META = torch.device("meta")
CONFIGS = find_recipe("demo").parent / "configs"
ROWS = 256
MAX_LEN, MAX_TOKENS = 4096, 8192


class NoUpload:
    """Arrays that arrive as tensors without memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Keeps nothing."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(array).to(META) for array in arrays]


def executor_of(name: str, num_layers: int | None = None) -> DeviceExecutor:
    """The executor of the model ``name``, of its first ``num_layers`` layers if given."""
    config = load_config(CONFIGS / name)
    if num_layers is not None:
        moe_layers = tuple(layer for layer in config.moe_layers if layer < num_layers)
        windows = config.windows[:num_layers]
        config = replace(config, num_layers=num_layers, moe_layers=moe_layers, windows=windows)
    alone = Collectives("alone", 0, 1, None, 1.0, META)
    dispatcher = LocalDispatcher(
        contiguous(len(config.moe_layers), config.moe.num_experts, 1), META, NoClock()
    )
    stage = whole_model(config.num_layers, config.moe_layers)
    part = ModelPart(stage, UNSPLIT_LAYERS)
    model = build_model(
        config, dispatcher, torch.bfloat16, META, "triton", keep_fp8=config.kernel_fp8, part=part
    )
    parts = Parts(
        rank=0,
        model=model,
        dispatcher=dispatcher,
        groups=RankGroups(alone),
        splits=UNSPLIT_LAYERS,
        links=PipelineLinks(alone, alone, stage, META),
        turns=Turns(),
        samples=True,
        pool=KVPool(entries_of(config, stage.layers, 1, "fp8"), 1000, 64, "fp8", META),
        device=META,
    )
    with mock.patch.object(device_executor, "Upload", NoUpload):
        return DeviceExecutor(parts, ROWS, MAX_LEN, 1, MAX_TOKENS, None)
