"""From a description to a model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.table import Column, column_for, ops_of
from ...moe.dispatch import Dispatcher
from .config import Family, ModelConfig
from .decoder import Model, Placing
from .deepseek_v3 import build_deepseek_v3
from .qwen3_moe import build_qwen3_moe

_BUILDERS: dict[Family, Callable[[ModelConfig, Dispatcher, Placing], Model]] = {
    "qwen3_moe": build_qwen3_moe,
    "deepseek_v3": build_deepseek_v3,
}


def build_model(
    config: ModelConfig, dispatcher: Dispatcher, dtype: torch.dtype, device: torch.device, column: Column | None = None
) -> Model:
    """The model of ``config``, its weights uninitialised; ``dispatcher`` decides which experts get a slot. ``column`` of the op
    table: by default the one that serves on the device."""
    return _BUILDERS[config.family](config, dispatcher, Placing(dtype, device, ops_of(column or column_for(device))))
