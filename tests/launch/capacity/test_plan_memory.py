"""The plan's bytes equal those that ranks allocate on a CPU, and independent counts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lockstep
from lockstep.engine.kv.budget import PoolLimits
from lockstep.engine.models.config import load_config
from lockstep.engine.models.shape import read_shape
from lockstep.engine.protocol.specs import Keys, RankSpec
from lockstep.engine.rank import page_pool as kv_pool
from lockstep.engine.rank.device.token_counts import TokenCounts
from lockstep.engine.rank.process import load_executor
from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu_isa import Isa
from lockstep.launch.capacity.memory import memory_of, page_bytes, token_counts_bytes
from lockstep.launch.capacity.plan import CapacityPlan, plan_recipe
from lockstep.launch.capacity.screen import show_plan
from lockstep.launch.capacity.setup import Setup
from lockstep.launch.recipe.file import load_recipe, parse_recipe
from lockstep.launch.recipe.hardware import load_hardware
from lockstep.launch.recipe.recipe import contradictions
from support.engine.models.checkpoints import (
    YARN,
    deepseek_v3_config,
    qwen3_moe_config,
    tensor_shapes,
    write_checkpoint,
)
from support.engine.models.family_configs import (
    deepseek_v2_config,
    deepseek_v32_config,
    glm4_moe_config,
    glm4_moe_lite_config,
    glm_moe_dsa_config,
    gpt_oss_config,
    kimi_k2_config,
    minimax_m2_config,
    mistral4_config,
    mixtral_config,
    qwen2_moe_config,
)
from support.engine.models.fp8_checkpoints import write_pair

# Real proportions in small: an expert outweighs a norm. name -> config.json, dtype, ranks,
# overrides of the recipe.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, int, list[str]]] = {
    "qwen3, one rank": (qwen3_moe_config(), torch.float32, 1, []),
    "qwen3, two ranks, bf16": (qwen3_moe_config(), torch.bfloat16, 2, ["kv_cache.page_size=8"]),
    "qwen3 with bias, tied, some layers dense, four ranks": (
        qwen3_moe_config(attention_bias=True, tie_word_embeddings=True, mlp_only_layers=[1], num_experts=16),
        torch.float32,
        4,
        ["kv_cache.page_size=32"],
    ),
    "deepseek, two ranks": (deepseek_v3_config(), torch.float32, 2, ["model.max_len=1000"]),
    "deepseek without query latent, three ranks, uneven slots": (
        deepseek_v3_config(q_lora_rank=None, n_shared_experts=2, attention_bias=True, hidden_size=96),
        torch.bfloat16,
        3,
        [],
    ),
    "qwen3 over FP8 pages, two ranks": (
        qwen3_moe_config(head_dim=64),
        torch.bfloat16,
        2,
        ["kv_cache.dtype=fp8"],
    ),
    "deepseek over FP8 pages, three ranks": (
        deepseek_v3_config(kv_lora_rank=160),
        torch.float32,
        3,
        ["kv_cache.dtype=fp8"],
    ),
    "deepseek with an indexer, split over two": (
        deepseek_v32_config(index_n_heads=16),
        torch.bfloat16,
        4,
        ["parallel.tensor=2"],
    ),
    "glm with layers that follow an indexer, two stages": (
        glm_moe_dsa_config(num_hidden_layers=4, indexer_types=["full", "full", "shared", "shared"]),
        torch.bfloat16,
        2,
        ["parallel.pipeline=2"],
    ),
    "deepseek with an indexer over FP8 pages": (
        deepseek_v32_config(kv_lora_rank=160),
        torch.float32,
        1,
        ["kv_cache.dtype=fp8"],
    ),
    "deepseek with yarn, bf16 from fp32, eight ranks": (
        deepseek_v3_config(rope_scaling=YARN, n_shared_experts=0, first_k_dense_replace=2),
        torch.float32,
        8,
        ["model.dtype=bf16", "kv_cache.dtype=fp32"],
    ),
    "deepseek-v2 by groups, four ranks": (
        deepseek_v2_config(topk_method="group_limited_greedy", first_k_dense_replace=2),
        torch.bfloat16,
        4,
        [],
    ),
    "deepseek-v2 without query latent": (deepseek_v2_config(q_lora_rank=None), torch.float32, 1, []),
    "kimi, two ranks": (kimi_k2_config(), torch.float32, 2, []),
    "mixtral, four ranks": (mixtral_config(), torch.bfloat16, 4, []),
    "qwen2 with a gated shared expert, some layers dense, two ranks": (
        qwen2_moe_config(decoder_sparse_step=2, num_hidden_layers=4),
        torch.float32,
        2,
        [],
    ),
    "qwen2 without bias": (qwen2_moe_config(qkv_bias=False), torch.float32, 1, []),
    "glm with norms and bias, two ranks": (glm4_moe_config(), torch.float32, 2, []),
    "qwen3 split over two": (
        qwen3_moe_config(attention_bias=True, mlp_only_layers=[1], vocab_size=321),
        torch.bfloat16,
        4,
        ["parallel.tensor=2"],
    ),
    "qwen3 split over four, which share key heads, tied": (
        qwen3_moe_config(tie_word_embeddings=True),
        torch.float32,
        4,
        ["parallel.tensor=4"],
    ),
    "deepseek split over two, FP8 pages": (
        deepseek_v3_config(kv_lora_rank=160, attention_bias=True),
        torch.float32,
        4,
        ["parallel.tensor=2", "kv_cache.dtype=fp8"],
    ),
    "deepseek without query latent split over four": (
        deepseek_v3_config(q_lora_rank=None, n_shared_experts=2),
        torch.bfloat16,
        4,
        ["parallel.tensor=4"],
    ),
    "deepseek, dense blocks over two": (
        deepseek_v3_config(n_shared_experts=2),
        torch.float32,
        4,
        ["parallel.dense=2"],
    ),
    "qwen2 split over two, dense blocks over four": (
        qwen2_moe_config(decoder_sparse_step=2, num_hidden_layers=4),
        torch.bfloat16,
        4,
        ["parallel.tensor=2", "parallel.dense=4"],
    ),
    "deepseek in two stages, split over two, shared experts too": (
        deepseek_v3_config(num_hidden_layers=4),
        torch.float32,
        4,
        ["parallel.pipeline=2", "parallel.tensor=2", "parallel.dense=2"],
    ),
    "deepseek in two stages, the last of which has the head and fewer layers": (
        deepseek_v3_config(num_hidden_layers=5, vocab_size=1000),
        torch.float32,
        2,
        ["parallel.pipeline=2"],
    ),
    "deepseek in three stages, the first without experts, split over two": (
        deepseek_v3_config(num_hidden_layers=4, intermediate_size=512),
        torch.float32,
        6,
        ["parallel.pipeline=3", "parallel.tensor=2"],
    ),
    "qwen3 in two stages that share embedding and head": (
        qwen3_moe_config(num_hidden_layers=4, tie_word_embeddings=True),
        torch.bfloat16,
        4,
        ["parallel.pipeline=2"],
    ),
    "minimax with norms over all heads, two ranks": (minimax_m2_config(), torch.bfloat16, 2, []),
    "glm lite, three ranks": (glm4_moe_lite_config(), torch.bfloat16, 3, []),
    "glm lite split over two": (glm4_moe_lite_config(), torch.float32, 4, ["parallel.tensor=2"]),
    "mistral split over two": (mistral4_config(), torch.bfloat16, 4, ["parallel.tensor=2"]),
    "gpt-oss, three ranks, uneven slots": (gpt_oss_config(), torch.bfloat16, 3, []),
    "gpt-oss split over two, in two stages": (
        gpt_oss_config(num_hidden_layers=4),
        torch.float32,
        4,
        ["parallel.tensor=2", "parallel.pipeline=2"],
    ),
    "glm without norms, three ranks": (
        glm4_moe_config(use_qk_norm=False, n_shared_experts=2),
        torch.bfloat16,
        3,
        [],
    ),
}
KV_MEMORY = 3_000_000
NO_KEYS = Keys(server_public="", public="", secret="")


def planned(path: Path, num_ranks: int, overrides: list[str]) -> CapacityPlan:
    cluster = f"{{device: cpu, ranks_per_node: {num_ranks}}}"
    text = f"model: {{path: {path}}}\ncluster: {cluster}\nkv_cache: {{memory: {KV_MEMORY}}}\n"
    return plan_recipe(parse_recipe(text, overrides), path)


@pytest.fixture(params=["avx512", "amx", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isa:
    """The kind of CPU that weights are packed for; nothing computes with them: any will do."""
    isa: Isa = request.param
    monkeypatch.setattr(cpu_isa, "here", lambda: isa)
    monkeypatch.setattr(cpu_isa, "own", lambda: isa)
    return isa


@pytest.mark.parametrize("max_len", [16383, 16384])
def test_counts_of_tokens_take_what_is_planned(max_len: int) -> None:
    recipe, path = load_recipe("qwen3-30b-a3b-1xh100", [f"model.max_len={max_len}"])
    setup = plan_recipe(recipe, path.parent).setup
    counts = TokenCounts(setup.max_running, max_len, setup.shape.vocab_size, torch.device("meta"))
    assert setup.max_len == max_len
    assert token_counts_bytes(setup, setup.stages()[0]) == counts._counts_S1V.nbytes


def rank_spec(setup: Setup, path: Path, rank: int) -> RankSpec:
    return RankSpec(
        rank=rank,
        mesh=setup.mesh,
        keys=NO_KEYS,
        step_address="",
        bulk_address="",
        store_address="",  # no epoch begins
        store_keys=NO_KEYS,
        model_path=str(path),
        dtype=setup.dtype,
        keep_fp8=setup.expert_weights == "fp8",
        kv_dtype=setup.kv_dtype,
        page_size=setup.page_size,
        kv_memory=setup.kv_memory,
        ranks_per_host=setup.ranks_per_node,
        max_running=setup.max_running,
        max_len=setup.max_len,
        dispatch=setup.dispatch,
        device="cpu",
        threads=1,
    )


@pytest.mark.parametrize("name", CASES)
def test_weights_and_pages_are_what_every_rank_allocates(name: str, isa: Isa, tmp_path: Path) -> None:
    config, dtype, num_ranks, overrides = CASES[name]
    path = write_checkpoint(tmp_path / "model", config, dtype=dtype)
    plan = planned(path, num_ranks, overrides)
    assert plan.setup.isa == isa
    planned_ranks = [
        (held, rank) for held in plan.ranks for rank in range(held.first_rank, held.last_rank + 1)
    ]
    assert [rank for _, rank in planned_ranks] == list(range(num_ranks))
    for held, rank in planned_ranks:
        memory = held.memory
        parts = load_executor(rank_spec(plan.setup, path, rank), lambda fraction: None)._parts
        weights = sum(parameter.nbytes for parameter in parts.model.parameters())
        pool = sum(tensor.nbytes for layer in parts.pool.cache for tensor in layer)
        assert memory.weights.total == pytest.approx(weights, rel=0.03), (
            f"rank {rank}: {memory.weights}, really {weights}"
        )
        assert memory.kv_pool == pytest.approx(pool, rel=0.03)
        assert (memory.num_pages, held.page_bytes) == (parts.pool.num_pages, parts.pool.page_bytes)
        assert (held.layers, held.moe_layers) == (
            len(parts.pool.cache),
            parts.dispatcher.placement.num_layers,
        )
        assert held.slots == parts.dispatcher.placement.num_slots
        experts = sum(
            parameter.nbytes for key, parameter in parts.model.named_parameters() if ".experts." in key
        )
        assert memory.weights.experts + memory.weights.empty_slots == experts


def test_the_profile_names_a_cpu_and_the_recipe_limits_it(tmp_path: Path, isa: Isa) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(), dtype=torch.bfloat16)
    profile = tmp_path / "amx.yaml"
    profile.write_text(
        json.dumps(load_hardware("cpu").model_dump(exclude_none=True) | {"isa": "amx"}), encoding="utf-8"
    )
    for overrides, expected in (
        ([], isa),
        (["cluster.isa=avx2"], "avx2"),
        ([f"cluster.hardware={profile}"], "amx"),
        ([f"cluster.hardware={profile}", "cluster.isa=avx512"], "avx512"),
    ):
        plan = planned(path, 2, overrides)
        assert plan.setup.isa == expected


# Blocks of 128 x 128 in both directions, so that scales are what the plan counts: four bytes per
# block.
FP8_CONFIG = deepseek_v3_config(
    hidden_size=256, moe_intermediate_size=128, intermediate_size=384, q_lora_rank=128
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_checkpoint_in_fp8_is_widened_on_cpus_and_stays_so_on_gpus(device: str, tmp_path: Path) -> None:
    """A GPU rank's memory is allocated here on a CPU, where nothing computes with it."""
    path, _ = write_pair(tmp_path, FP8_CONFIG)
    setup = planned(path, 2, []).setup
    assert (setup.weights, setup.expert_weights) == ("bf16", "bf16")
    if device == "cuda":
        recipe = parse_recipe(
            f"model: {{path: {path}}}\ncluster: {{device: cuda, hardware: h100, ranks_per_node: 2}}\n"
        )
        setup = replace(plan_recipe(recipe, path).setup, kv_memory=KV_MEMORY, dispatch="all_to_all")
        assert (setup.weights, setup.expert_weights, setup.kv_dtype) == ("fp8", "fp8", "fp8")
        wide = parse_recipe(
            f"model: {{path: {path}, dtype: bf16}}\n"
            "cluster: {device: cuda, hardware: h100, ranks_per_node: 2}\n"
        )
        assert plan_recipe(wide, path).setup.expert_weights == "bf16", (
            "a dtype that is asked for is that of all"
        )
    memory = memory_of(setup, setup.stages()[0])
    parts = load_executor(rank_spec(setup, path, 0), lambda fraction: None)._parts
    weights = sum(parameter.nbytes for parameter in parts.model.parameters())
    experts = sum(parameter.nbytes for key, parameter in parts.model.named_parameters() if ".experts." in key)
    assert memory.weights.total == pytest.approx(weights, rel=0.03)
    assert memory.weights.experts == experts
    gates = {key: each for key, each in parts.model.named_parameters() if ".mlp.gate." in key}
    halved = {key for key in gates if device == "cuda" and key.endswith(".weight")}  # in bf16 there
    assert memory.weights.gates == sum(each.nbytes // (1 + (key in halved)) for key, each in gates.items())
    assert (memory.num_pages, page_bytes(setup, setup.stages()[0])) == (
        parts.pool.num_pages,
        parts.pool.page_bytes,
    )


def test_fp8_pages_hold_twice_the_tokens() -> None:
    """In ``launch plan`` the page pool of real models follows the KV format."""
    text = io.StringIO()
    for name, tokens_of_one in (("qwen3-30b-a3b-1xh100", 48 * 2 * 4 * 132), ("deepseek-v2-lite", 27 * 656)):
        recipe, path = load_recipe(name, ["kv_cache.memory=8GiB"], check=contradictions)
        found = plan_recipe(recipe, path.parent)
        pages = (8 << 30) // (64 * tokens_of_one)
        assert (found.setup.kv_dtype, found.kv_tokens_per_rank) == ("fp8", pages * 64), "auto on a GPU"
        show_plan(found, name, Console(file=text, width=200))
        assert re.search(rf"KV tokens +{found.kv_tokens_per_rank:,} +{found.kv_tokens:,}", text.getvalue())
        recipe, path = load_recipe(
            name, ["kv_cache.memory=8GiB", "kv_cache.dtype=bf16"], check=contradictions
        )
        assert 1.7 < found.kv_tokens_per_rank / plan_recipe(recipe, path.parent).kv_tokens_per_rank < 2.0


def test_an_automatic_pool_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config())
    plan = planned(path, 2, ["kv_cache.memory=auto", "scheduler.max_running=4096", "model.max_len=2048"])
    free = (plan.setup.rank_memory - plan.ranks[0].memory.weights.total) * 2
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: free)
    limits = PoolLimits(None, 4096 * 2048)
    page = kv_pool.bytes_per_page(kv_pool.entries_of(load_config(path), range(3), 1, "fp32"), 64, "fp32")
    assert plan.ranks[0].memory.num_pages == pytest.approx(
        kv_pool.fit_pages(page, 64, limits, 2, torch.device("cpu")), rel=0.01
    )
    few = planned(path, 2, ["kv_cache.memory=auto", "scheduler.max_running=2", "model.max_len=100"])
    assert few.ranks[0].memory.num_pages == 4, "no more than can ever run at once"


@pytest.mark.parametrize("name", CASES)
def test_every_value_of_a_checkpoint_is_counted(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", CASES[name][0])
    shape, config = read_shape(path), load_config(path)
    layers = range(config.num_layers)
    entries = layers.stop * shape.kv_bytes("bf16") + shape.num_indexers(layers) * shape.index_key_bytes(
        "bf16"
    )
    assert entries == kv_pool.bytes_per_page(kv_pool.entries_of(config, layers, 1, "bf16"), 1, "bf16")
    numel = sum(torch.Size(sizes).numel() for sizes in tensor_shapes(CASES[name][0]).values())
    extra = 96 * 3 if name.startswith("deepseek without") else 0
    assert shape.total_params == pytest.approx(numel, abs=extra), (
        "every tensor of the checkpoint, counted apart"
    )


# Models without a recipe: their dimensions and the billions of parameters their makers give.
PUBLISHED: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], float]] = {
    "DeepSeek-V2": (
        deepseek_v2_config,
        {
            "vocab_size": 102400,
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
        }
        | {
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 12288,
        }
        | {
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
        },
        235.7,
    ),
    "Qwen1.5-MoE-A2.7B": (
        qwen2_moe_config,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
        | {
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
        },
        14.3,
    ),
    "GLM-4.5-Air": (
        glm4_moe_config,
        {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
        }
        | {
            "head_dim": 128,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "use_qk_norm": False,
        },
        106.9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    config_of, dimensions, billions = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(**dimensions)))
    assert read_shape(tmp_path).total_params / 1e9 == pytest.approx(billions, rel=0.002)


def test_fp8_pages_have_the_published_size() -> None:
    path = Path(lockstep.__file__).parent / "recipes" / "configs"
    assert read_shape(path / "deepseek-v3").kv_bytes("fp8") == 656, (
        "FlashMLA: 512 FP8, 4 scales, 64 rotary in bf16"
    )
    assert read_shape(path / "qwen3-30b-a3b").kv_bytes("fp8") == 2 * 4 * (128 + 4)


def test_slots_beyond_the_experts_are_counted_apart(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config())
    text = f"model: {{path: {path}}}\ncluster: {{device: cpu, ranks_per_node: 3}}\n"
    text += "experts: {redundant: 3}\nkv_cache: {memory: 1MiB}\n"
    weights = plan_recipe(parse_recipe(text, check=lambda recipe: []), path).ranks[0].memory.weights
    slot = 3 * 3 * 64 * 32 * 4  # layers x matrices x hidden x width x bytes
    assert (weights.experts + weights.redundant + weights.empty_slots) == 4 * slot
    assert [
        round(12 * part / (4 * slot)) for part in (weights.experts, weights.redundant, weights.empty_slots)
    ] == [8, 3, 1]


def test_stages_and_tensor_groups_share_the_weights(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", deepseek_v3_config())
    text = (
        f"model: {{path: {path}}}\ncluster: {{device: cpu, ranks_per_node: 4}}\nkv_cache: {{memory: 1MiB}}\n"
    )

    def whole(*overrides: str) -> tuple[CapacityPlan, list[int]]:
        plan = plan_recipe(parse_recipe(text, overrides, check=lambda recipe: []), path)
        return plan, [rank.memory.weights.attention for rank in plan.ranks]

    one, (attention,) = whole()
    piped, parts = whole("parallel.pipeline=2")
    assert len(parts) == 2 and sum(parts) == attention
    assert [(rank.first_rank, rank.last_rank, rank.layers) for rank in piped.ranks] == [(0, 1, 2), (2, 3, 1)]
    _, (split,) = whole("parallel.tensor=2")
    assert attention / 2 < split < attention, "the projections to the latents are whole on each rank"
    assert one.kv_tokens == 4 * one.kv_tokens_per_rank
    gathered, (as_one,) = whole("parallel.dense=4")
    assert (
        as_one == attention
        and gathered.ranks[0].memory.weights.dense * 4 == one.ranks[0].memory.weights.dense
    )
    assert gathered.ranks[0].memory.activations >= one.ranks[0].memory.activations
    assert gathered.to_json()["layout"]["dense"] == 4
