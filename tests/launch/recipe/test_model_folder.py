"""Random weights need a description: that of model.path, else of model.config."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lockstep.launch.capacity.plan import plan_recipe
from lockstep.launch.kubernetes.deployment import DeploymentOptions, make_deployment
from lockstep.launch.preflight.judge import Requirements, judge
from lockstep.launch.preflight.model_files import read_model_files
from lockstep.launch.preflight.probe import NodeFacts
from lockstep.launch.recipe.file import load_recipe
from lockstep.launch.recipe.model_folder import model_directory
from lockstep.launch.recipe.recipe import Recipe, RecipeError

QWEN3 = "qwen3-30b-a3b-1xh100"
RANDOM = "model.weights=random"


def test_the_description_that_exists_is_served(tmp_path: Path) -> None:
    recipe, path = load_recipe(QWEN3, [RANDOM])
    assert model_directory(recipe, path.parent) == path.parent / "configs/qwen3-30b-a3b"
    other = shutil.copytree(path.parent / "configs/mixtral-8x7b", tmp_path / "mine")
    recipe, path = load_recipe(QWEN3, [RANDOM, f"model.path={other}"])
    assert model_directory(recipe, path.parent) == other
    recipe, path = load_recipe(QWEN3)
    assert model_directory(recipe, path.parent) == Path("/models/Qwen3-30B-A3B")


def test_any_other_kind_of_weights_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.weights = \"zeros\": should be 'checkpoint' or 'random'"):
        load_recipe(QWEN3, ["model.weights=zeros"])


def test_a_plan_counts_the_same_bytes() -> None:
    plans = [plan_recipe(*_loaded(overrides)) for overrides in ([], [RANDOM])]
    assert plans[0].ranks == plans[1].ranks and plans[0].ranks[0].memory.weights.total > 50 << 30


def test_files_are_sound_without_tensors_and_stored_ones_are_not_read(tmp_path: Path) -> None:
    recipe, folder = _loaded([RANDOM])
    model = shutil.copytree(model_directory(recipe, folder), tmp_path / "model")
    assert "only safetensors" in read_model_files(model).problem
    (model / "model.safetensors").write_bytes(b"broken")
    found = read_model_files(model, "random")
    assert found.problem == "" and found.num_tensors == 0 and set(found.parts) == {"config.json"}
    wanted = Requirements(world=1, ranks_per_node=1, num_nodes=1, device="cpu")
    lines = [str(finding) for finding in judge([NodeFacts(name="alpha", model=found)], wanted)]
    assert any(f"{model}: random weights" in line for line in lines)
    (model / "config.json").unlink()
    assert "config.json: no such file" in read_model_files(model, "random").problem


def test_an_image_has_packaged_descriptions() -> None:
    recipe, path = load_recipe(QWEN3, [RANDOM, "cluster.nodes=1"])
    options = DeploymentOptions()
    assert make_deployment(recipe, path, [RANDOM], options).model_path is None
    recipe, path = load_recipe(QWEN3)
    assert make_deployment(recipe, path, [], options).model_path == Path("/models/Qwen3-30B-A3B")


def _loaded(overrides: list[str]) -> tuple[Recipe, Path]:
    recipe, path = load_recipe(QWEN3, overrides)
    return recipe, path.parent
