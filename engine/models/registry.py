"""Builds a model from its description."""

from __future__ import annotations

import torch

from ...kernels.table import Column, column_for, ops_of
from ...moe.dispatch.dispatcher import Dispatcher
from ...parallel.linear import Backend
from .config import MlaConfig, ModelConfig
from .decoder import Model
from .grouped_attention import GroupedAttention
from .latent_attention import LatentAttention


def build_model(
    config: ModelConfig,
    dispatcher: Dispatcher,
    dtype: torch.dtype,
    device: torch.device,
    column: Column | None = None,
    fp8_experts: bool = False,
) -> Model:
    """The model of ``config``, its weights uninitialised. The dispatcher's placement decides which
    experts have a slot. ``column``: of the op table, by default the one that serves on the device.
    ``fp8_experts``: experts stay in the FP8 of their checkpoint.
    """
    attention = LatentAttention if isinstance(config.attention, MlaConfig) else GroupedAttention
    backend = Backend(dtype, device, ops_of(column or column_for(device)))
    return Model(config, dispatcher, backend, attention, fp8_experts)
