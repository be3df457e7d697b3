"""The plan's bytes against what ranks really allocate on a CPU, and against counts made apart from it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from lockstep.engine import kv_pool
from lockstep.engine.models.config import load_config
from lockstep.engine.rank import load_executor
from lockstep.engine.specs import Keys, Layout, RankSpec
from lockstep.launch import plan_memory
from lockstep.launch.plan import Plan, plan_recipe
from lockstep.launch.plan_model import read_shape
from lockstep.launch.recipe_file import parse_recipe
from support.checkpoints import YARN, deepseek_v3_config, qwen3_moe_config, tensor_shapes, write_checkpoint

# Real proportions in small: an expert outweighs a norm. name -> config.json, dtype, ranks, overrides of the recipe.
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
    "deepseek with yarn, bf16 from fp32, eight ranks": (
        deepseek_v3_config(rope_scaling=YARN, n_shared_experts=0, first_k_dense_replace=2),
        torch.float32,
        8,
        ["model.dtype=bf16", "kv_cache.dtype=fp32"],
    ),
}
KV_MEMORY = 3_000_000


@pytest.fixture(scope="module")
def store() -> Iterator[TCPStore]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def planned(path: Path, num_ranks: int, overrides: list[str]) -> Plan:
    text = f"model: {{path: {path}}}\ncluster: {{device: cpu, ranks_per_node: {num_ranks}}}\nkv_cache: {{memory: {KV_MEMORY}}}\n"
    return plan_recipe(parse_recipe(text, overrides), path)


def rank_spec(plan: Plan, path: Path, rank: int, port: int) -> RankSpec:
    setup = plan.setup
    return RankSpec(
        rank=rank,
        layout=Layout(data=setup.layout.data),
        keys=Keys(server_public="", public="", secret=""),
        step_address="",
        bulk_address="",
        store_host="127.0.0.1",
        store_port=port,
        model_path=str(path),
        dtype=setup.dtype,
        kv_dtype=setup.kv_dtype,
        page_size=setup.page_size,
        kv_memory=setup.kv_memory,
        ranks_per_host=setup.ranks_per_node,
        max_running=setup.max_running,
        max_batch_tokens=setup.capacity,
        max_len=setup.max_len,
        dispatch=setup.dispatch,
        device="cpu",
        threads=1,
    )


@pytest.mark.parametrize("name", CASES)
def test_weights_and_pages_are_what_every_rank_allocates(name: str, tmp_path: Path, store: TCPStore) -> None:
    config, dtype, num_ranks, overrides = CASES[name]
    path = write_checkpoint(tmp_path / "model", config, dtype=dtype)
    plan = planned(path, num_ranks, overrides)
    memory = plan.ranks[0].memory
    assert (plan.ranks[0].first_rank, plan.ranks[0].last_rank) == (0, num_ranks - 1)
    for rank in range(num_ranks):
        parts = load_executor(rank_spec(plan, path, rank, store.port), lambda fraction: None)._parts
        weights = sum(parameter.nbytes for parameter in parts.model.parameters())
        pool = sum(tensor.nbytes for layer in parts.pool.cache for tensor in layer)
        assert memory.weights.total == pytest.approx(weights, rel=0.03), f"rank {rank}: {memory.weights}, really {weights}"
        assert memory.kv_pool == pytest.approx(pool, rel=0.03)
        assert (memory.num_pages, plan.ranks[0].page_bytes) == (parts.pool.num_pages, parts.pool.page_bytes)
        assert plan.ranks[0].slots == parts.dispatcher.placement.num_slots
        experts = sum(parameter.nbytes for key, parameter in parts.model.named_parameters() if ".experts." in key)
        assert memory.weights.experts + memory.weights.empty_slots == experts


def test_an_automatic_pool_is_the_shares_of_the_rank() -> None:
    for name in ("CPU_SHARE", "GPU_SHARE", "GPU_RESERVE_BYTES"):
        assert getattr(plan_memory, name) == getattr(kv_pool, name)


def test_an_automatic_pool_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config())
    plan = planned(path, 2, ["kv_cache.memory=auto", "scheduler.max_running=4096", "model.max_len=2048"])
    free = (plan.setup.rank_memory - plan.ranks[0].memory.weights.total) * 2
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: free)
    limits = kv_pool.PoolLimits(None, 4096 * 2048, 2)
    page = kv_pool.bytes_per_page(load_config(path), 64, torch.float32)
    assert plan.ranks[0].memory.num_pages == pytest.approx(kv_pool.fit_pages(page, 64, limits, torch.device("cpu")), rel=0.01)
    few = planned(path, 2, ["kv_cache.memory=auto", "scheduler.max_running=2", "model.max_len=100"])
    assert few.ranks[0].memory.num_pages == 4, "no more than can ever run at once"


@pytest.mark.parametrize("name", CASES)
def test_dimensions_are_those_the_engine_reads(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", CASES[name][0])
    shape, config = read_shape(path), load_config(path)
    same = ("family", "vocab_size", "hidden", "num_layers", "max_position", "tie_embeddings", "dense_width", "dtype", "moe_layers")
    assert {field: getattr(shape, field) for field in same} == {field: getattr(config, field) for field in same}
    assert shape.kv_bytes("bf16") * config.num_layers == config.kv_bytes_per_token(2)
    numel = sum(torch.Size(sizes).numel() for sizes in tensor_shapes(CASES[name][0]).values())
    extra = 96 * 3 if name.startswith("deepseek without") else 0
    assert shape.total_params == pytest.approx(numel, abs=extra), "every tensor of the checkpoint, counted apart"


def test_fp8_pages_have_the_published_size() -> None:
    path = Path(plan_memory.__file__).parent.parent / "recipes" / "configs"
    assert read_shape(path / "deepseek-v3").kv_bytes("fp8") == 656, "FlashMLA: 512 FP8, 4 scales, 64 rotary in bf16"
    assert read_shape(path / "qwen3-30b-a3b").kv_bytes("fp8") == 2 * 4 * (128 + 4)


def test_slots_beyond_the_experts_are_counted_apart(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config())
    text = f"model: {{path: {path}}}\ncluster: {{device: cpu, ranks_per_node: 3}}\nexperts: {{redundant: 3}}\nkv_cache: {{memory: 1MiB}}\n"
    weights = plan_recipe(parse_recipe(text, check=lambda recipe: []), path).ranks[0].memory.weights
    slot = 3 * 3 * 64 * 32 * 4  # layers x matrices x hidden x width x bytes
    assert (weights.experts + weights.redundant + weights.empty_slots) == 4 * slot
    assert [round(12 * part / (4 * slot)) for part in (weights.experts, weights.redundant, weights.empty_slots)] == [8, 3, 1]


def test_stages_and_tensor_groups_share_the_weights(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", deepseek_v3_config())
    text = f"model: {{path: {path}}}\ncluster: {{device: cpu, ranks_per_node: 4}}\nkv_cache: {{memory: 1MiB}}\n"

    def whole(*overrides: str) -> tuple[Plan, list[int]]:
        plan = plan_recipe(parse_recipe(text, overrides, check=lambda recipe: []), path)
        return plan, [rank.memory.weights.attention for rank in plan.ranks]

    one, (attention,) = whole()
    piped, parts = whole("parallel.pipeline=2")
    assert len(parts) == 2 and sum(parts) == attention
    assert [(rank.first_rank, rank.last_rank, rank.layers) for rank in piped.ranks] == [(0, 1, 2), (2, 3, 1)]
    _, (halved,) = whole("parallel.tensor=2")
    assert halved < 0.6 * attention
    assert one.kv_tokens == 4 * one.kv_tokens_per_rank
