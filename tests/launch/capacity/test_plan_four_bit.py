"""`launch plan` for checkpoints with experts in 4 bits: the bytes of the plan are those that ranks
allocate and move.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.engine.protocol.specs import Keys, RankSpec
from lockstep.engine.rank.process import load_executor
from lockstep.launch.capacity.plan import plan_recipe
from lockstep.launch.recipe.file import parse_recipe
from lockstep.moe.experts import read_slot
from support.engine.models.checkpoints import deepseek_v3_config
from support.engine.models.family_configs import gpt_oss_config
from support.engine.models.four_bit_checkpoints import CONFIGS, write_pair
from support.engine.models.local_model import load_local

CONFIG = deepseek_v3_config(hidden_size=96, moe_intermediate_size=64)
# Bytes per value of a matrix: codes, scales and, per expert and not per value, factors.
PER_VALUE = {"int4": 0.5 + 2 / 32, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
NO_KEYS = Keys(server_public="", public="", secret="")


def recipe_of(path: Path, extra: str = "") -> str:
    return (
        f"model: {{path: {path}{extra}}}\ncluster: {{device: cpu, ranks_per_node: 2}}\n"
        "kv_cache: {memory: 8MiB}\n"
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plan_counts_the_bytes_that_ranks_allocate(kind: str, tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path, CONFIG, kind)
    plan = plan_recipe(parse_recipe(recipe_of(path)), path)
    setup, weights = plan.setup, plan.ranks[0].memory.weights
    name = kind.split()[0]
    assert (setup.weights, setup.expert_weights, setup.expert_dtype) == ("bf16", name, "bf16")
    spec = RankSpec(
        rank=1,
        mesh=setup.mesh,
        keys=NO_KEYS,
        step_address="",
        bulk_address="",
        store_address="",
        store_keys=NO_KEYS,
        model_path=str(path),
        dtype=setup.dtype,
        keep_fp8=False,
        kv_dtype=setup.kv_dtype,
        page_size=setup.page_size,
        kv_memory=setup.kv_memory,
        ranks_per_host=2,
        max_running=setup.max_running,
        max_len=setup.max_len,
        dispatch=setup.dispatch,
        device="cpu",
        threads=1,
    )
    parts = load_executor(spec, lambda fraction: None)._parts
    held = sum(parameter.nbytes for key, parameter in parts.model.named_parameters() if ".experts." in key)
    assert weights.experts + weights.redundant + weights.empty_slots == held
    factors = 12 if name == "nvfp4" else 0
    assert setup.expert_bytes == 3 * 96 * 64 * PER_VALUE[name] + factors
    assert parts.expert_bytes == setup.expert_bytes == len(read_slot(parts.model.experts()[0], 0))


def test_biases_of_experts_in_4_bits_are_counted(tmp_path: Path) -> None:
    config = gpt_oss_config(hidden_size=96, intermediate_size=64)
    path, _ = write_pair(tmp_path, config, "mxfp4 of gpt-oss")
    setup = plan_recipe(parse_recipe(recipe_of(path)), path).setup
    assert setup.expert_bytes == 3 * 96 * 64 * PER_VALUE["mxfp4"] + 2 * (2 * 64 + 96)
    model = load_local(path, torch.bfloat16, "reference")
    assert setup.expert_bytes == len(read_slot(model.experts()[0], 0))


def test_experts_stay_in_4_bits_whatever_the_dtype(tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path, CONFIG, "int4")
    setup = plan_recipe(parse_recipe(recipe_of(path, ", dtype: fp32")), path).setup
    assert (setup.weights, setup.expert_weights, setup.expert_dtype) == ("fp32", "int4", "fp32")


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_gpus_hold_experts_in_4_bits_and_compute_in_bf16(kind: str, tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path, CONFIG, kind)
    cluster = "cluster: {device: cuda, hardware: h200, ranks_per_node: 2}\n"
    recipe = parse_recipe(f"model: {{path: {path}}}\n{cluster}kv_cache: {{dtype: bf16}}\n")
    setup = plan_recipe(recipe, path).setup
    assert (setup.weights, setup.expert_weights, setup.expert_dtype) == ("bf16", kind, "bf16")
    assert setup.expert_bytes == 3 * 96 * 64 * PER_VALUE[kind] + (12 if kind == "nvfp4" else 0)
