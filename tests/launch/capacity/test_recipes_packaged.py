"""Packaged recipes: each loads, is consistent, plans without weights, and says where it has run."""

from __future__ import annotations

import re

import pytest
import yaml

from lockstep.engine.models.shape import read_shape
from lockstep.launch.capacity.plan import plan_recipe
from lockstep.launch.recipe.file import find_recipe, load_recipe, parse_recipe
from lockstep.launch.recipe.hardware import load_hardware
from lockstep.launch.recipe.keys import key_paths
from lockstep.launch.recipe.recipe import RecipeError, contradictions

FOLDER = find_recipe("demo").parent
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
LARGE = sorted(set(RECIPES) - {name for name in RECIPES if name.startswith("demo")})
# Published totals, in 10^9: arXiv 2412.19437, 2507.20534, 2505.09388, 2405.04434, 2401.04088; each
# without prediction modules.
PARAMETERS = {"deepseek-v3": 671.0, "kimi-k2": 1026, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1}
PARAMETERS |= {"deepseek-v2-lite": 15.7, "mixtral-8x7b": 46.7, "minimax-m2": 229.0, "glm-4.7-flash": 30.0}
PARAMETERS["gpt-oss-120b"] = 116.8  # arXiv 2508.10925, table 1
# The model cards of Hy3 and Mistral-Small-4-119B-2603, the latter without its vision tower.
PARAMETERS["deepseek-v3.2"] = 671.9  # DeepSeek-V3's, and 14 million of an indexer in each of 61 layers
PARAMETERS |= {"glm-5": 744, "glm-5.2": 743.4}  # arXiv 2602.15763; without 57 indexers of 10 million
PARAMETERS |= {"kimi-k2.5": 1026, "hy3": 295.0, "mistral-small-4": 119.0}
PARAMETERS["mistral-large-3"] = 673.0  # its model card: without the vision encoder


def test_all_are_there() -> None:
    expected = {
        "deepseek-gb200",
        "deepseek-h200",
        "deepseek-v3.2-h200",
        "kimi-k2-h200",
        "qwen3-30b-a3b-1xh100",
        "qwen3-30b-a3b-8xh100",
        "qwen3-235b-2x8",
        "minimax-m2-8xh200",
        "glm-4.7-flash-1xh200",
        "gpt-oss-120b",
        "kimi-k2.5-h200",
        "hy3-8xh200",
        "glm-5-8xh200",
        "glm-5.2-h200",
        "mistral-small-4-2xh200",
        "mistral-large-3-8xh200",
    }
    assert expected | {"deepseek-v2-lite", "mixtral-8x7b", "demo", "demo-two-hosts"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_what_it_has_run_on(name: str) -> None:
    assert load_recipe(name, check=contradictions)[0].verified


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_and_plans_without_weights(name: str) -> None:
    recipe, path = load_recipe(name, check=contradictions)
    found = plan_recipe(recipe, path.parent)
    assert found.fits, found.misfits
    assert found.largest_batch_per_rank >= 1
    assert found.ranks[-1].last_rank == recipe.world - 1


@pytest.mark.parametrize("name", LARGE)
def test_it_says_what_it_has_run_on_and_comments_every_key_once(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    recipe, _ = load_recipe(name, check=contradictions)
    assert recipe.verified is not None
    assert recipe.cluster.hardware is not None and load_hardware(recipe.cluster.hardware)
    assert text.startswith("# "), "a first line for the reader"
    for line in text.splitlines():
        if re.match(r"\s+\w+:", line) or (re.match(r"\w+: \S", line) and not line.startswith("verified:")):
            assert "  # " in line or " # " in line, f"no comment: {line}"
    used = {
        f"{section}.{key}"
        for section, keys in yaml.safe_load(text).items()
        if isinstance(keys, dict)
        for key in keys
    }
    assert used <= set(key_paths())


@pytest.mark.parametrize("name", RECIPES)
def test_none_is_refused(name: str) -> None:
    recipe, path = load_recipe(name)
    assert plan_recipe(recipe, path.parent).unsupported == ()


def test_the_rack_may_exchange_by_flashinfer_too() -> None:
    recipe, path = load_recipe("deepseek-gb200", ["experts.dispatch=flashinfer"])
    found = plan_recipe(recipe, path.parent)
    assert found.fits and found.unsupported == ()


@pytest.mark.parametrize("name", PARAMETERS)
def test_dimensions_give_the_published_number_of_parameters(name: str) -> None:
    assert read_shape(FOLDER / "configs" / name).total_params / 1e9 == pytest.approx(
        PARAMETERS[name], rel=0.002
    )


def test_two_nodes_hold_three_and_a_half_times_the_pages_of_one() -> None:
    """As the recipe for Kimi K2.5 says."""
    recipe = "kimi-k2.5-h200"
    both, one = (
        plan_recipe(load_recipe(recipe, overrides, check=contradictions)[0], FOLDER)
        for overrides in ([], ["cluster.nodes=1", "experts.redundant=0"])
    )
    assert one.fits
    assert both.kv_tokens / one.kv_tokens == pytest.approx(3.5, abs=0.1)


def test_every_packaged_dimension_file_is_used() -> None:
    used = {load_recipe(name, check=contradictions)[0].model.config for name in LARGE}
    assert used == {f"configs/{folder.name}" for folder in (FOLDER / "configs").iterdir()}


def test_what_cannot_run_is_still_refused_by_default() -> None:
    text = "model: {path: x}\nkv_cache: {host_memory: 1GiB}"
    assert parse_recipe(text, check=contradictions).kv_cache.host_memory == 2**30
    with pytest.raises(RecipeError, match="does not work yet"):
        parse_recipe(text)


def test_installed_copies_have_them() -> None:
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    for pattern in ("*.yaml", "hardware/*.yaml", "configs/*/config.json", "configs/*/params.json"):
        assert f'"{pattern}"' in text and list(FOLDER.glob(pattern))
