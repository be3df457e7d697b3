"""Random weights: those of one name are the same in every layout and after every reload, and
activations keep their size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.engine.models.config import load_config
from lockstep.engine.models.decoder import Model
from lockstep.engine.models.random_tensors import RandomTensors
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.models.weights import load_experts, load_weights
from lockstep.kernels.reference.four_bit import dequantise
from lockstep.kernels.reference.fp8 import Quantised, widen_blocks
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.moe.experts import read_slot
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.stages import whole_model
from lockstep.parallel.tensor import UNSPLIT, TensorSplit, Unsplit
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config
from support.engine.models.family_configs import gpt_oss_config
from support.engine.models.four_bit_checkpoints import CONFIGS as FOUR_BIT
from support.engine.models.fp8_checkpoints import QUANTISATION
from support.engine.models.local_model import Stepper

EVEN = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "torch_dtype": "bfloat16"}
QWEN3 = qwen3_moe_config(head_dim=64, num_attention_heads=4, num_key_value_heads=4, **EVEN)
DEEPSEEK = deepseek_v3_config(kv_lora_rank=128, q_lora_rank=128, num_attention_heads=16, **EVEN)
GPT_OSS = "mxfp4 of gpt-oss"
WHOLE = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": QWEN3,
    "fp8": DEEPSEEK | {"quantization_config": QUANTISATION | {"weight_block_size": [128, 128]}},
    "fp8 with a scale per matrix": QWEN3 | {"quantization_config": WHOLE},
    **{kind: QWEN3 | {"quantization_config": FOUR_BIT[kind]} for kind in FOUR_BIT if kind != GPT_OSS},
    "wide": qwen3_moe_config(vocab_size=20_000, **EVEN),
    "mxfp4 of gpt-oss": gpt_oss_config(torch_dtype="bfloat16", quantization_config=FOUR_BIT[GPT_OSS]),
}
CPU = torch.device("cpu")


class PartOf(Unsplit):
    """A rank among others that never meet."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size


def load(folder: Path, kind: str, split: TensorSplit = UNSPLIT) -> Model:
    """A model of a folder that holds its description alone, in the formats of a GPU."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    config = load_config(folder)
    placement = contiguous(len(config.moe_layers), config.moe.num_experts, 1)
    dispatcher = LocalDispatcher(placement, CPU)
    dispatcher.begin_step(0, 64)
    part = ModelPart(whole_model(config.num_layers, config.moe_layers), split_as_attention(split))
    model = build_model(
        config, dispatcher, torch.bfloat16, CPU, "reference", keep_fp8=config.kernel_fp8, part=part
    )
    load_weights(
        model, RandomTensors(CPU), lambda layer: placement.experts_of(0, layer), lambda fraction: None
    )
    return model


@pytest.mark.parametrize("kind", ["bf16", "fp8", GPT_OSS])
def test_split_tensors_are_parts_of_the_whole_ones(kind: str, tmp_path: Path) -> None:
    """Also where a part that begins inside a block is widened, and the whole is not."""
    whole = values_of(load(tmp_path, kind))
    for index in range(2):
        model = load(tmp_path, kind, PartOf(index, 2))
        shards = {name: shard for name, shard in model.checkpoint_shards().items() if not shard.is_whole}
        assert len(shards) > 4
        for name, tensor in values_of(model).items():
            expected, shard = whole[name], shards.get(name)
            if shard is not None and not shard.added_once:
                start, end = shard.bounds(tensor.shape[shard.dim])
                expected = expected.narrow(shard.dim, start, end - start)
            assert torch.equal(tensor, expected), name


def values_of(model: Model) -> dict[str, Tensor]:
    values, scales = model.checkpoint_tensors(), model.checkpoint_scales()
    wide = {name: widen_blocks(Quantised(values[name], found)) for name, found in scales.items()}
    return {name: tensor.bfloat16() for name, tensor in (values | wide).items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_expert_is_the_same_in_every_slot_and_load(kind: str, tmp_path: Path) -> None:
    model = load(tmp_path, kind)
    experts = model.experts()[1]
    before = [read_slot(experts, slot) for slot in range(4)]
    load_experts(model, RandomTensors(CPU), {1: {3: 0, 0: 2}})
    after = [read_slot(experts, slot) for slot in range(4)]
    assert torch.equal(after[3], before[0]) and torch.equal(after[0], before[2])
    assert torch.equal(after[1], before[1]) and not torch.equal(before[0], before[2])


@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_keep_their_size(kind: str, tmp_path: Path) -> None:
    logits = torch.cat(
        list(Stepper(load(tmp_path, kind), torch.bfloat16).step({0: list(range(40))}).values())
    )
    assert 0.5 < logits.std() < 2 and not torch.equal(logits[3], logits[4])


def test_matrices_in_4_bits_have_the_variance_of_others(tmp_path: Path) -> None:
    for kind in FOUR_BIT:
        (layer, *_) = load(tmp_path, kind).expert_layers()
        assert layer.four_bit is not None
        for matrix in layer.four_bit:
            values = dequantise(matrix)
            assert 0.7 < values.std() * values.shape[-1] ** 0.5 < 1.4, kind


def test_long_tensors_repeat_no_row(tmp_path: Path) -> None:
    table = load(tmp_path, "wide").checkpoint_tensors()["model.embed_tokens.weight"]
    assert len(torch.unique(table, dim=0)) == len(table)
