"""``launch plan``: text, JSON, floors, and every reason why a set-up does not fit."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore

from lockstep.engine.models.config import load_config
from lockstep.kernels.cpu_isa import Isa
from lockstep.launch.capacity.anchors import (
    EXCHANGE_TOKENS,
    EXCHANGES,
    PUBLISHED,
    deepseek,
    floor_beside,
    markdown,
)
from lockstep.launch.capacity.floors import (
    decode_work,
    dense_seconds,
    distinct,
    floor_of,
    prefill_work,
    traffic,
)
from lockstep.launch.capacity.memory import dispatch_buffers, shared_memory
from lockstep.launch.capacity.plan import CapacityPlan, make_plan, plan_recipe
from lockstep.launch.capacity.screen import show_plan
from lockstep.launch.recipe.file import find_recipe, load_recipe, parse_recipe
from lockstep.launch.recipe.hardware import Hardware, hardware_names, load_hardware
from lockstep.launch.recipe.recipe import RecipeError, contradictions
from lockstep.launch.recipe.resolve import check_model
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.config import MoEConfig
from lockstep.moe.dispatch.nvlink import NvlinkExchange
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.symmetric import SymmetricExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import DeepEPGroup
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.nccl_ep import NcclEpGroup
from lockstep.parallel.nvlink import NvlinkGroup
from lockstep.parallel.symmetric_memory import SymmetricGroup
from support.parallel.deepep_double import DeepEPDouble
from support.parallel.nccl_ep_double import NcclEpDouble
from support.parallel.nvlink_double import NvlinkDouble
from support.parallel.symmetric_double import AbsentLibrary

ROOT = find_recipe("demo").parent.parent


def plan_of(name: str, *overrides: str, context: int = 4096) -> CapacityPlan:
    recipe, path = load_recipe(name, overrides, contradictions)
    return plan_recipe(recipe, path.parent, context)


def command(folder: Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [str(Path(sys.executable).parent / "launch")] if code is None else [sys.executable, "-c", code]
    words = [*start, "plan", *arguments]
    wide = os.environ | {"COLUMNS": "120"}
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=wide
    )


# --------------------------------------------------------------------------- the command


def test_a_person_reads_a_table(tmp_path: Path) -> None:
    result = command(tmp_path, "--recipe", "demo")
    assert result.returncode == 0, result.stderr
    for words in (
        "attention",
        "experts (16 slots a layer)",
        "KV pool",
        "headroom",
        "longest context",
        "binds",
        "output token",
        "fits",
    ):
        assert words in result.stdout


def test_a_narrow_terminal_costs_no_figure() -> None:
    recipe, path = load_recipe("deepseek-h200", check=contradictions)
    texts = []
    for columns in (60, 200):
        paper = io.StringIO()
        show_plan(plan_recipe(recipe, path.parent), "deepseek-h200", Console(file=paper, width=columns))
        texts.append(paper.getvalue())
    assert "\u2026" not in texts[0]
    assert set(texts[1].split()) - set(texts[0].split()) <= {
        text for text in texts[1].split() if "\u2500" in text
    }


def test_a_program_reads_json(tmp_path: Path) -> None:
    result = command(tmp_path, "--recipe", "deepseek-gb200", "--json")
    plan = json.loads(result.stdout)
    assert (result.returncode, plan["fits"], plan["launches"]) == (0, True, True)
    assert plan["layout"] == {"world": 72, "pipeline": 1, "data": 72, "tensor": 1, "dense": 1}
    (ranks,) = plan["ranks"]
    held = ranks["memory"]
    assert held["weights"]["total"] == sum(size for name, size in held["weights"].items() if name != "total")
    parts = ("kv_pool", "activations", "dispatch", "captured", "moves", "reserve", "headroom")
    assert held["weights"]["total"] + sum(held[part] for part in parts) == plan["hardware"]["memory"]
    assert plan["kv_tokens"] == 72 * plan["kv_tokens_per_rank"]
    assert plan["decode"]["floor"]["binds"] in ("compute", "memory", "network")
    assert plan["decode"]["traffic"]["dispatch_bytes"] > 0
    assert plan["seconds_per_token"] == plan["decode"]["floor"]["seconds"]


def test_what_does_not_fit_is_1(tmp_path: Path) -> None:
    result = command(tmp_path, "--recipe", "mixtral-8x7b", "cluster.ranks_per_node=1")
    assert result.returncode == 1
    assert "does not fit: weights: 87" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nothing"], "not a packaged recipe"),
        (["--recipe", "demo", "cluster.hardware=h10"], "did you mean h100?"),
        (
            ["--recipe", "demo", "cluster.hardware=h100"],
            "cluster.device = cpu: cluster.hardware = h100 is cuda",
        ),
        (["--recipe", "demo", "model.max_len=5000"], "4096 positions"),
        (["--recipe", "demo", "parallel.tensor=3"], "does not divide"),
        (["--recipe", "demo", "model.path=."], "config.json"),
        (
            ["--recipe", "qwen3-30b-a3b-8xh100", "cluster.ranks_per_node=64", "cluster.nodes=4"],
            "more ranks than the 128 experts",
        ),
        (["--recipe", "demo", "--context", "0"], "--context"),
    ],
)
def test_a_bad_recipe_is_2_and_one_message(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = command(tmp_path, *arguments)
    assert result.returncode == 2, result.stdout
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_gpu_recipe_without_a_profile_says_what_to_add(tmp_path: Path) -> None:
    model = ROOT / "recipes" / "configs" / "qwen3-30b-a3b"
    with pytest.raises(RecipeError, match=r"cluster\.hardware: missing.*h100"):
        plan_recipe(parse_recipe(f"model: {{path: {model}}}\ncluster: {{device: cuda}}"), tmp_path)


def test_it_runs_where_torch_is_not_installed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from lockstep.launch.cli import main; main()"
    result = command(tmp_path, "--recipe", "deepseek-h200", code=code)
    assert result.returncode == 0, result.stderr
    broken = command(
        tmp_path, code="import sys; sys.modules['torch'] = None; import lockstep.engine.rank.page_pool"
    )
    assert broken.returncode == 1, "the check can fail"


def test_model_dimensions_come_from_the_model_where_it_is() -> None:
    demo = ROOT / "recipes" / "demo" / "model"
    assert plan_of("qwen3-30b-a3b-1xh100").setup.shape.family == "qwen3_moe"
    found = plan_of("qwen3-30b-a3b-1xh100", f"model.path={demo}", "model.max_len=auto")
    assert found.setup.shape.family == "deepseek_v3"


# --------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        (
            "qwen3-30b-a3b-8xh100",
            ["cluster.ranks_per_node=16"],
            "cluster.ranks_per_node = 16: a node of this hardware has 8 devices",
        ),
        (
            "qwen3-235b-2x8",
            ["parallel.tensor=16"],
            "parallel.tensor = 16: a tensor group stays on one node, which has 8 ranks",
        ),
        (
            "qwen3-235b-2x8",
            ["parallel.dense=16"],
            "parallel.dense = 16: a dense group stays on one node, which has 8 ranks",
        ),
        (
            "qwen3-30b-a3b-1xh100",
            ["kv_cache.memory=512MiB"],
            "model.max_len is 32768, but the KV cache of a rank holds 10560 tokens",
        ),
        ("qwen3-30b-a3b-1xh100", ["kv_cache.memory=1MiB"], "holds no page of 3244032 bytes (64 tokens)"),
        (
            "kimi-k2-h200",
            ["model.dtype=bf16"],
            "weights: 140.0 GiB on a rank that has 140.4 GiB; use cluster.nodes = 3, or",
        ),
        (
            "qwen3-235b-2x8",
            ["scheduler.max_batch_tokens=65536"],
            "holds no page of 6352896 bytes (64 tokens); use scheduler.max_batch_tokens = 16384",
        ),
        (
            "qwen3-235b-2x8",
            ["scheduler.max_batch_tokens=8192", "kv_cache.memory=20GiB"],
            "dispatch buffers 13.4 GiB at scheduler.max_batch_tokens = 8192 exceed",
        ),
        ("qwen3-235b-2x8", ["kv_cache.memory=40GiB"], "; use kv_cache.memory = "),
    ],
)
def test_every_reason_is_named_with_what_to_change(recipe: str, overrides: list[str], words: str) -> None:
    found = plan_of(recipe, *overrides)
    assert not found.fits
    assert any(words in reason for reason in found.misfits), found.misfits


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("kimi-k2-h200", ["model.dtype=bf16"]),
        ("qwen3-235b-2x8", ["scheduler.max_batch_tokens=65536"]),
        ("qwen3-235b-2x8", ["scheduler.max_batch_tokens=8192", "kv_cache.memory=20GiB"]),
        ("qwen3-235b-2x8", ["kv_cache.memory=40GiB"]),
        ("qwen3-30b-a3b-1xh100", ["kv_cache.memory=512MiB"]),
    ],
)
def test_each_advice_that_is_given_helps(recipe: str, overrides: list[str]) -> None:
    (reason,) = plan_of(recipe, *overrides).misfits
    advice = re.findall(r"(?:use|or) ([a-z_.]+ = \w+(?: and [a-z_.]+ = \w+)?)", reason)
    advice += ["model.max_len = " + tokens for tokens in re.findall(r"lower model.max_len to (\d+)", reason)]
    assert advice
    for change in advice:
        together = [part.replace(" ", "") for part in change.split(" and ")]
        assert plan_of(recipe, *overrides, *together).fits, change


def test_more_ranks_cannot_help_where_each_holds_too_much() -> None:
    tiny = replace(deepseek("h100", 32, prefill=False), hardware=hardware(memory=1 << 30))
    recipe, _ = load_recipe("deepseek-h200", check=contradictions)
    assert "more ranks do not help" in make_plan(tiny, recipe, 4096, ()).misfits[0]


# --------------------------------------------------------------------------- capacity


@pytest.mark.parametrize(
    ("overrides", "spare"),
    [
        (["cluster.ranks_per_node=4"], 0),
        (["cluster.ranks_per_node=4", "experts.redundant=8"], 0),  # 10 slots each, 30 on three ranks
        (["cluster.ranks_per_node=4", "experts.redundant=12"], 1),
        (["cluster.ranks_per_node=4", "experts.redundant=32"], 2),
        (["cluster.ranks_per_node=4", "experts.redundant=96"], 3),
        (["cluster.ranks_per_node=4", "experts.redundant=32", "parallel.tensor=2"], 1),
        (["cluster.ranks_per_node=4", "experts.redundant=96", "parallel.tensor=4"], 0),
        (["cluster.ranks_per_node=4", "experts.redundant=32", "cluster.survivors=wait"], 0),
        (["cluster.ranks_per_node=4", "experts.redundant=32", "parallel.dense=2"], 0),
    ],
)
def test_the_data_indices_that_others_outlive_follow_from_slots(overrides: list[str], spare: int) -> None:
    assert plan_of("demo", *overrides).setup.spare_data == spare


def test_experts_on_the_move_have_room() -> None:
    """DeepSeek-V3's 4 slots a layer travel together: four such moves wait, one is sent."""
    expert = 3 * 7168 * 2048 + 3 * 16 * 56 * 4
    [rank] = plan_of("deepseek-gb200").ranks
    assert rank.memory.moves == 5 * 4 * expert
    [rank] = plan_of("deepseek-gb200", "experts.balance=off").ranks
    assert rank.memory.moves == 0


def test_batch_and_context_are_those_of_the_pages() -> None:
    found = plan_of("qwen3-30b-a3b-1xh100", "kv_cache.memory=6GiB", context=1100)
    pages = (6 << 30) // (64 * 50688)
    assert found.kv_tokens_per_rank == pages * 64
    assert found.largest_batch_per_rank == pages // 18 == 110, "a request takes whole pages"
    assert found.longest_context == 32768
    assert plan_of("qwen3-30b-a3b-1xh100", "scheduler.max_running=7").largest_batch == 7


@pytest.mark.parametrize("dispatch", ["all_to_all", "flashinfer", "deepep", "nccl_ep"])
@pytest.mark.parametrize(("overlap", "wire_item"), [(False, 2), (True, 2), (True, 1 + 4 / 128)])
def test_shared_memory_is_what_a_rank_reserves(overlap: bool, wire_item: float, dispatch: str) -> None:
    base = deepseek("h200", 32, prefill=False)
    setup = replace(base, dispatch=dispatch, overlap=overlap, wire_item=wire_item, capacity=1000, redundant=0)
    moe, device = setup.shape.moe, torch.device("cpu")
    capacities = (1024, 641) if overlap else (1024,)
    place = "experts", 0, 32, HashStore(), torch.device("meta")
    placement = contiguous(1, moe.num_experts, 32)
    shape = TokenShape(capacities, moe.top_k, setup.shape.hidden, torch.bfloat16, eight=wire_item < 2)
    group: SymmetricGroup | NvlinkGroup | DeepEPGroup | NcclEpGroup
    if dispatch == "deepep":
        group = deep = DeepEPGroup(*place, DeepEPDouble(Collectives("experts", *place[1:4], 1.0, device)))
        SlotMajorExchange(placement, deep, device, shape)
    elif dispatch == "nccl_ep":
        group = by_nccl = NcclEpGroup(*place, NcclEpDouble(Collectives("experts", *place[1:4], 1.0, device)))
        SlotMajorExchange(placement, by_nccl, device, shape)
    elif dispatch == "flashinfer":
        group = linked = NvlinkGroup(*place, NvlinkDouble(Collectives("experts", *place[1:4], 1.0, device)))
        NvlinkExchange(placement, linked, device, shape)
    else:
        group = symmetric = SymmetricGroup(*place, AbsentLibrary())
        SymmetricExchange(placement, symmetric, device, shape)
    assert group.num_bytes == pytest.approx(shared_memory(setup), rel=0.1), "rows are aligned"


def test_tokens_of_fp8_experts_travel_in_fp8() -> None:
    """Outputs return as they did. Other experts would compute other answers."""
    eight, full = plan_of("deepseek-h200"), plan_of("deepseek-h200", "experts.wire=full")
    assert (eight.setup.wire, full.setup.wire) == ("fp8", "full")
    row, narrow = 2 * 7168 + 32, 7168 + 4 * 56 + 32
    assert eight.decode.traffic.dispatch_bytes / full.decode.traffic.dispatch_bytes == pytest.approx(
        narrow / row
    )
    assert eight.decode.traffic.combine_bytes == full.decode.traffic.combine_bytes
    assert eight.decode.floor.network < full.decode.floor.network
    assert eight.kv_tokens > full.kv_tokens, "buffers are smaller"
    for recipe, change in (("qwen3-235b-2x8", ""), ("deepseek-h200", "model.dtype=bf16")):
        assert plan_of(recipe, *filter(None, [change])).setup.wire == "full"
        with pytest.raises(RecipeError, match=r"experts\.wire = fp8: the experts of this model are not"):
            plan_of(recipe, "experts.wire=fp8", *filter(None, [change]))


INFER, MLA = "kernels.attention=flashinfer", "kernels.attention=flashmla"
FLASH_4, FULL = "kernels.prompt_attention=flash_attn_4", "kv_cache.dtype=bf16"


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        ("qwen3-235b-2x8", [INFER], "kv_cache.dtype = auto: it reads pages in bf16"),
        ("qwen3-235b-2x8", [INFER, FULL, "model.dtype=fp32"], "model.dtype = fp32: it computes in"),
        ("qwen3-235b-2x8", [INFER, FULL, "kv_cache.page_size=8"], "page_size = 8: allowed are 16,"),
        ("deepseek-gb200", [INFER, FULL, "kv_cache.page_size=128"], "= 128: allowed are 32, 64"),
        ("glm-5-8xh200", [INFER, FULL], "an indexer chooses the positions of decode rows"),
        ("demo", [INFER], "is for ranks on GPUs, and these are on CPUs; allowed are auto and own"),
        ("deepseek-h200", [MLA], "kv_cache.dtype = fp8: it reads pages in bf16"),
        ("deepseek-h200", [MLA, FULL, "kv_cache.page_size=32"], "kv_cache.page_size = 32: allowed are 64"),
        ("deepseek-h200", [MLA, FULL, "model.dtype=fp32"], "model.dtype = fp32: it computes in"),
        ("glm-5-8xh200", [MLA, FULL], "kv_cache.dtype = bf16: it reads the positions that an indexer"),
        ("deepseek-v3.2-h200", [MLA, "parallel.tensor=4"], "parallel.tensor = 4: 32 heads of 128 on a rank"),
        ("qwen3-235b-2x8", [MLA], "this model has keys for its heads"),
        ("mistral-small-4-2xh200", [MLA], r"latents of 256 \+ 64 dims: allowed are 512 \+ 64"),
        ("demo", [MLA], "is for ranks on GPUs, and these are on CPUs; allowed are auto and own"),
        ("qwen3-235b-2x8", [FLASH_4], "kv_cache.dtype = auto: it reads pages in bf16"),
        ("qwen3-235b-2x8", [FLASH_4, FULL, "model.dtype=fp32"], "model.dtype = fp32: it computes in"),
        ("deepseek-h200", [FLASH_4, FULL], "prompts of this model are attended as latents"),
        ("demo", [FLASH_4], "is for ranks on GPUs, and these are on CPUs; allowed are auto and own"),
    ],
)
def test_a_library_that_would_attend_nothing_is_refused(recipe: str, changes: list[str], line: str) -> None:
    key = changes[0].replace("=", " = ")
    with pytest.raises(RecipeError, match=rf"{key}: .*{line}"):
        plan_of(recipe, *changes)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("qwen3-235b-2x8", [INFER, FULL, FLASH_4]),
        ("deepseek-gb200", [INFER, FULL]),
        ("deepseek-h200", [MLA, FULL]),
        ("deepseek-v3.2-h200", [MLA]),
        ("glm-5-8xh200", [MLA]),
    ],
)
def test_a_library_with_work_to_do_is_taken(recipe: str, changes: list[str]) -> None:
    plan_of(recipe, *changes)


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        ("deepseek-gb200", ["cluster.nodes=72", "experts.redundant=0"], "288 ranks: allowed are 256"),
        ("qwen3-30b-a3b-1xh100", [], "a stage has one rank, which exchanges no tokens; use auto"),
        ("demo", [], "is for ranks on GPUs, and these are on CPUs; allowed are auto, all_gather and"),
    ],
)
def test_an_exchange_over_nvlink_that_cannot_be_is_refused(
    recipe: str, changes: list[str], line: str
) -> None:
    with pytest.raises(RecipeError, match=f"experts.dispatch = flashinfer: .*{line}"):
        plan_of(recipe, "experts.dispatch=flashinfer", *changes)


def test_an_exchange_over_nvlink_is_planned() -> None:
    """Fewer rows than all_to_all has: none are kept to be sent; every loss is waited for."""
    linked = plan_of("deepseek-gb200", "experts.dispatch=flashinfer")
    other = plan_of("deepseek-gb200")
    assert (linked.setup.dispatch, linked.setup.spare_data) == ("flashinfer", 0)
    less, more = linked.ranks[0].memory.dispatch, other.ranks[0].memory.dispatch
    assert 0.8 * more < less < more
    config = load_config(find_recipe("demo").parent / "configs" / "deepseek-v3")
    odd = replace(config, moe=replace(config.moe, top_k=5))
    recipe, _ = load_recipe("deepseek-gb200", ["experts.dispatch=flashinfer"], contradictions)
    assert check_model(recipe, odd) == [
        "experts.dispatch = flashinfer: 5 experts of a token: allowed are 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, "
        "18, 22; use all_to_all"
    ]


FEW = "scheduler.max_batch_tokens=384"


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        (
            "deepseek-h200",
            [],
            "max_batch_tokens = 1024: a rank may have 511 tokens in a step; use at most 384,",
        ),
        ("deepseek-h200", [FEW, "model.dtype=fp32"], "model.dtype = fp32: it carries bf16; use bf16, or"),
        (
            "deepseek-h200",
            [FEW, "cluster.ranks_per_node=5"],
            "20 ranks: allowed are fewer than 8, or multiples",
        ),
        ("qwen3-30b-a3b-1xh100", [FEW], "a stage has one rank, which exchanges no tokens; use auto"),
        ("demo", [], "is for ranks on GPUs, and these are on CPUs; allowed are auto, all_gather and"),
    ],
)
def test_an_exchange_by_deepep_that_cannot_be_is_refused(recipe: str, changes: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=f"experts.dispatch = deepep: .*{line}"):
        plan_of(recipe, "experts.dispatch=deepep", *changes)


def test_an_exchange_by_deepep_is_planned() -> None:
    """Memory for every token of a rank in every slot; a token travels once for each expert."""
    deep = plan_of("deepseek-h200", "experts.dispatch=deepep", FEW)
    other = plan_of("deepseek-h200", FEW)
    assert (deep.setup.dispatch, deep.setup.spare_data) == ("deepep", 0)
    less, more = other.ranks[0].memory.dispatch, deep.ranks[0].memory.dispatch
    slots = 32 * deep.setup.num_slots
    memory, received = 4 * slots * 384 * (2 * 7168 + 224), slots * 384 * (3 * 7168 + 224 + 16)
    assert more == pytest.approx(memory + received, rel=1e-2) and more > less
    sent, back = deep.decode.traffic.dispatch_bytes, deep.decode.traffic.combine_bytes
    assert back / sent == pytest.approx(2 * 7168 / (7168 + 224 + 16), rel=1e-3), "as often there and back"
    assert back > other.decode.traffic.combine_bytes
    config = load_config(find_recipe("demo").parent / "configs" / "deepseek-v3")
    odd = replace(config, moe=replace(config.moe, top_k=17, hidden=7000))
    recipe, _ = load_recipe("deepseek-h200", ["experts.dispatch=deepep", FEW], contradictions)
    assert check_model(recipe, odd) == [
        "experts.dispatch = deepep: a hidden size of 7000: allowed are 2048, 2560, 3072, 3584, 4096, 5120, "
        "6144, 7168, 8192; use all_to_all",
        "experts.dispatch = deepep: 17 experts of a token: allowed are 16; use all_to_all",
    ]


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        ("deepseek-gb200", [], "72 ranks: allowed are 64; use all_to_all"),
        ("deepseek-h200", ["model.dtype=fp32"], "model.dtype = fp32: it carries bf16; use bf16, or"),
        ("qwen3-30b-a3b-1xh100", [], "a stage has one rank, which exchanges no tokens; use auto"),
        ("demo", [], "is for ranks on GPUs, and these are on CPUs; allowed are auto, all_gather and"),
    ],
)
def test_an_exchange_by_nccl_ep_that_cannot_be_is_refused(recipe: str, changes: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=f"experts.dispatch = nccl_ep: .*{line}"):
        plan_of(recipe, "experts.dispatch=nccl_ep", *changes)


def test_an_exchange_by_nccl_ep_is_planned() -> None:
    """A token travels once to a rank, as by all_to_all; outputs one by one, as by deepep."""
    found = plan_of("deepseek-h200", "experts.dispatch=nccl_ep", FEW)
    deep, other = plan_of("deepseek-h200", "experts.dispatch=deepep", FEW), plan_of("deepseek-h200", FEW)
    assert (found.setup.dispatch, found.setup.spare_data) == ("nccl_ep", 0)
    assert found.decode.traffic.dispatch_bytes == other.decode.traffic.dispatch_bytes
    assert found.decode.traffic.combine_bytes == deep.decode.traffic.combine_bytes
    assert found.ranks[0].memory.dispatch < deep.ranks[0].memory.dispatch
    config = load_config(find_recipe("demo").parent / "configs" / "deepseek-v3")
    odd = replace(config, moe=replace(config.moe, top_k=22, hidden=7000))
    recipe, _ = load_recipe("deepseek-h200", ["experts.dispatch=nccl_ep"], contradictions)
    assert check_model(recipe, odd) == [
        "experts.dispatch = nccl_ep: a hidden size of 7000: allowed are multiples of 512; use all_to_all",
        "experts.dispatch = nccl_ep: 22 experts of a token: allowed are 21; use all_to_all",
    ]


def test_dispatch_buffers_follow_the_dispatcher() -> None:
    base = deepseek("h200", 32, prefill=False)
    shape = base.shape
    few = replace(base, capacity=15, wire_item=2, dispatch="all_gather", overlap=False)  # a bucket of 16
    row, output = 2 * 7168 + 32, 2 * 7168
    assert shape.moe.top_k == 8
    assert dispatch_buffers(few) == 16 * (row + 32) * 33 + 32 * 16 * 8 * output + 33 * 16 * output
    gathered = replace(few, hardware=load_hardware("cpu"))
    assert dispatch_buffers(gathered) == 16 * row * 33 + 32 * 16 * 8 * output + 128 * output
    sent = replace(few, dispatch="all_to_all")
    rows = 32 * 16 + 16 * 8 + 1  # received, sent, and one for choices that share a row
    back = 32 * 16 * 8 * output + 128 * output
    assert dispatch_buffers(sent) == rows * (2 * 7168 + 64 + output) + back
    halves = 32 * 11 + 11 * 8 + 1  # of the second microbatch: 16 / 2 + 16 / 8 + 1
    overlapped = replace(sent, overlap=True)
    assert dispatch_buffers(overlapped) == (rows + halves) * (2 * 7168 + 64 + output) + back
    on_cpus = replace(sent, hardware=load_hardware("cpu"))
    assert dispatch_buffers(on_cpus) == 16 * row * 40 + back
    assert dispatch_buffers(replace(few, mesh=Mesh(data=1))) == 128 * output


# --------------------------------------------------------------------------- floors


def hardware(**changes: float) -> Hardware:
    return load_hardware("h100").model_copy(update=changes)


@pytest.mark.parametrize(
    ("isa", "rate"), [("avx2", 0.18e12), ("avx512", 0.18e12), ("avx512_bf16", 1.75e12), ("amx", 1.75e12)]
)
def test_products_in_bf16_take_the_float32_rate_where_a_cpu_widens(isa: Isa, rate: float) -> None:
    setup = plan_of("demo.yaml", "cluster.device=cpu", "cluster.hardware=cpu").setup
    one = replace(setup, isa=isa, hardware=load_hardware("cpu"))
    assert one.operations("bf16") == rate and one.operations("fp32") == 0.18e12


def test_floors_scale_with_what_they_are_made_of() -> None:
    setup = deepseek("h100", 32, prefill=False)
    base = floor_of(setup, decode_work(64, 2048))
    faster = floor_of(replace(setup, hardware=hardware(memory_tb_s=6.7)), decode_work(64, 2048))
    assert faster.memory == pytest.approx(base.memory / 2) and faster.compute == base.compute
    slow_wire = floor_of(replace(setup, hardware=hardware(far_gb_s=25)), decode_work(64, 2048))
    assert slow_wire.network == pytest.approx(2 * base.network)
    assert slow_wire.binds == "network" and slow_wire.seconds == slow_wire.network
    assert slow_wire.serial == slow_wire.network + max(slow_wire.compute, slow_wire.memory)


def test_prefill_computes_two_operations_per_active_parameter() -> None:
    """DeepSeek-V3 has 37 G active parameters, of which 0.9 G are looked up and 0.9 G compute
    sampled rows only.
    """
    setup = deepseek("h100", 1, prefill=True)
    seconds = floor_of(setup, prefill_work(8192, 8192)).compute
    attention = 61 * 2 * 128 * (192 + 128) * 8192 / 2 / 989.5e12
    assert (seconds / 8192 - attention) * 1979e12 / 2 == pytest.approx(37e9 - 1.85e9, rel=0.02)


def test_decode_reads_every_expert_of_a_wide_batch_and_few_of_a_single_request() -> None:
    """One request on one GPU: 8 of 256 experts of each layer and all else once, in FP8 but for the
    expansion of the latents, which is 1.02 G values in bf16.
    """
    setup = deepseek("h100", 1, prefill=False)
    one = floor_of(setup, decode_work(1, 1)).memory * 3.35e12
    active = 58 * 8 * 44.04e6
    assert one == pytest.approx(active + 11.4e9 + 1.02e9 + 3.75e9 + 0.43e9 + 1.85e9, rel=0.02)
    many = floor_of(setup, decode_work(2048, 1)).memory * 3.35e12
    assert many > 58 * 256 * 44e6


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_token_meets_as_many_ranks_as_a_count_says(ranks: int) -> None:
    moe = MoEConfig(hidden=8, expert_width=8, num_experts=64, top_k=4)
    per = 64 // ranks
    expected = ranks * (1 - math.comb(64 - per, 4) / math.comb(64, 4))
    assert distinct(moe, ranks) == pytest.approx(expected)
    grouped = replace(moe, num_groups=8, top_groups=2)
    assert distinct(grouped, ranks) < distinct(moe, ranks) + 1e-9
    assert distinct(grouped, 8) == pytest.approx(2), (
        "an expert group on each rank: the chosen groups are the ranks"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.dense=3", "cluster.ranks_per_node=3"],
            "dense = 3: does not divide the width 512 of dense",
        ),
        (["parallel.dense=32", "cluster.ranks_per_node=32"], "= 32: does not divide the width 48 of shared"),
        (["parallel.dense=4", "parallel.tensor=8", "cluster.ranks_per_node=8"], "dense = 4: not a multiple"),
    ],
)
def test_dense_groups_that_cannot_be_are_refused_with_both_numbers(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        plan_of("demo", *overrides)


def test_dense_groups_send_each_block_s_tokens_there_and_their_sums_back() -> None:
    """3 dense layers, 58 with shared experts. Weights are read by parts, operations are as many."""
    alone = deepseek("h100", 32, prefill=False)
    wide, work = replace(alone, mesh=Mesh(data=32, dense=8)), decode_work(64, 2048)
    own = 64 * 7168 * 2
    each = 2 * (7 * own / (1e9 * alone.hardware.near_gb_s) + 1e-6 * alone.hardware.latency_us)
    before, after = floor_of(alone, work), floor_of(wide, work)
    assert after.network - before.network == pytest.approx(61 * each)
    assert after.compute == before.compute and after.memory < before.memory
    with_attention = replace(alone, mesh=Mesh(data=4, tensor=8, dense=8))
    assert dense_seconds(with_attention, 64) == pytest.approx(each / 8, rel=0.1)
    assert dense_seconds(replace(alone, mesh=Mesh(data=4, tensor=8)), 64) == 0.0


def test_traffic_by_dispatcher() -> None:
    setup = deepseek("h100", 16, prefill=False)
    sent = traffic(setup, 100)
    assert traffic(replace(setup, mesh=Mesh(data=1)), 100).dispatch_bytes == 0
    assert sent.combine_bytes == int(100 * 8 * 15 / 16 * 2 * 7168), "every pair comes back, 1 of 16 from here"
    summed = traffic(replace(setup, dispatch="all_to_all"), 100)
    assert summed.dispatch_bytes == sent.dispatch_bytes
    ranks = distinct(setup.shape.moe, 16)
    assert summed.combine_bytes == int(100 * ranks * 15 / 16 * 2 * 7168), "a sum from each"
    everywhere = traffic(replace(setup, dispatch="all_gather"), 100)
    assert everywhere.dispatch_bytes > sent.dispatch_bytes
    assert everywhere.combine_bytes == 100 * 8 * 2 * 7168, "a sum for 7 ranks, and one for the other node"
    cpu = replace(setup, hardware=load_hardware("cpu"), wire="full")
    one, each = (traffic(replace(cpu, dispatch=way), 100) for way in ("all_to_all", "all_gather"))
    assert one.combine_bytes == sent.combine_bytes and each.combine_bytes == 8 * everywhere.combine_bytes
    passed_on = traffic(replace(setup, dispatch="two_level"), 100)
    assert passed_on.combine_seconds < sent.combine_seconds


# --------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    "figure", PUBLISHED, ids=lambda figure: f"{figure.system} {figure.hardware} {figure.ranks}"
)
def test_no_published_figure_beats_its_floor_and_none_is_far_away(figure: object) -> None:
    assert isinstance(figure, type(PUBLISHED[0]))
    ratio = figure.rate / figure.tokens * floor_beside(figure).seconds
    assert 0.2 < ratio < 1
    assert len(figure.reason) > 20


@pytest.mark.parametrize("measured", EXCHANGES, ids=lambda measured: str(measured.ranks))
def test_exchanges_over_the_wire_are_near_their_floor(measured: object) -> None:
    assert isinstance(measured, type(EXCHANGES[0]))
    floor = traffic(deepseek("h800", measured.ranks, prefill=False), EXCHANGE_TOKENS)
    dispatch, combine = (
        1e6 * floor.dispatch_seconds / measured.dispatch_us,
        1e6 * floor.combine_seconds / measured.combine_us,
    )
    lowest = 0.6 if measured.ranks >= 32 else 0.2
    assert lowest < dispatch < 1 and lowest < combine < 1


def test_the_kept_table_is_current() -> None:
    assert (ROOT / "benchmarks" / "plan_anchors.md").read_text(encoding="utf-8") == markdown(), (
        "run make plan-anchors"
    )


# --------------------------------------------------------------------------- hardware


@pytest.mark.parametrize("name", hardware_names())
def test_profiles_load_and_name_their_sources(name: str) -> None:
    profile = load_hardware(name)
    assert profile.operations("fp8") >= profile.operations("bf16") > profile.operations("fp32")
    text = (ROOT / "recipes" / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "[1]" in text.split("device:")[0], "sources stand at the top"


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((ROOT / "recipes" / "hardware" / "h100.yaml").read_text().replace("81559MiB", "40GiB"))
    assert load_hardware(str(own)).memory == 40 << 30
    own.write_text("device: tpu\n")
    with pytest.raises(
        RecipeError, match=r"mine.yaml: not a hardware profile\n(.*\n)*.*memory: Field required"
    ):
        load_hardware(str(own))
