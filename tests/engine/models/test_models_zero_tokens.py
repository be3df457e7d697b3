"""A step without tokens still passes every MoE layer: other ranks wait there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.kernels.reference.paged import build_batch
from lockstep.moe.layer import MoELayer
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.models.family_configs import CONFIGS
from support.engine.models.local_model import Stepper, load_local


@pytest.mark.parametrize(
    "config", [qwen3_moe_config(mlp_only_layers=[1]), *(config_of() for config_of in CONFIGS.values())]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_moe_layer_is_called(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_local(write_checkpoint(tmp_path / "m", config), dtype)
    stepper = Stepper(model, dtype)
    called: list[int] = []
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, MoELayer)):
        layer.register_forward_hook(lambda module, inputs, output, number=number: called.append(number))
    batch, positions = build_batch(
        np.empty(0, np.int64), np.empty(0, np.int64), 0, np.zeros((0, 1), np.int32), 8
    )
    with torch.inference_mode():
        hidden = model(torch.empty(0, dtype=torch.int64), positions, batch, stepper.cache)
        assert model.logits(hidden).shape == (0, config["vocab_size"])
    assert called == list(range(len(model.config.moe_layers)))
    assert all(not tensor.any() for layer_cache in stepper.cache for tensor in layer_cache)
