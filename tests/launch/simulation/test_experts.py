"""Uneven expert loads in a simulation: their effect on steps, with and without balancing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import lockstep
from lockstep.launch.capacity.plan import plan_recipe
from lockstep.launch.capacity.setup import Setup
from lockstep.launch.commands.simulate import simulate
from lockstep.launch.recipe.file import load_recipe
from lockstep.launch.recipe.recipe import contradictions
from lockstep.launch.simulation.experts import ExpertLoadsError, balance_experts

TRACE = Path(lockstep.__file__).parent / "recipes" / "demo" / "routing_trace.npz"
DEEPSEEK = "deepseek-gb200"
PROMPTS = "poisson:rate=400,input=1500,output=2,count=100,seed=1"


def setup_of(name: str) -> Setup:
    recipe, path = load_recipe(name, (), contradictions)
    return plan_recipe(recipe, path.parent).setup


def test_a_drift_is_mended_by_few_moves() -> None:
    setup = setup_of(DEEPSEEK)
    told = balance_experts("lognormal:drift=0.1", setup, balances=True, folder=Path())
    assert 1.1 < told.unbalanced < 1.3 and told.balanced < 1.06 and told.simulated == told.balanced
    assert 0 < told.received < 0.2
    assert told.received_bytes % setup.expert_bytes == 0 and told.received_bytes > 0
    again = balance_experts("lognormal:drift=0.1", setup, balances=False, folder=Path())
    assert again.simulated == told.unbalanced and again.balanced == told.balanced
    calm = balance_experts("lognormal:drift=0,seed=3", setup, balances=True, folder=Path())
    assert calm.received == 0


@pytest.mark.parametrize(
    "asked", ["lognormal:", "lognormal:sigma=x", "lognormal:width=1", "lognormal:sigma=9", "nowhere.json"]
)
def test_other_loads_are_refused(asked: str) -> None:
    if asked == "lognormal:":
        balance_experts(asked, setup_of(DEEPSEEK), balances=True, folder=Path())
        return
    with pytest.raises(ExpertLoadsError, match=f"--experts {asked}"):
        balance_experts(asked, setup_of(DEEPSEEK), balances=True, folder=Path())


def simulated(experts: str | None, *overrides: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON report of the command."""
    with pytest.raises(typer.Exit) as end:
        simulate(overrides[0], PROMPTS, [*overrides[1:]], as_json=True, experts=experts)
    assert end.value.exit_code == 0
    return dict(json.loads(capsys.readouterr().out))


def test_balancing_shortens_simulated_steps(capsys: pytest.CaptureFixture[str]) -> None:
    loads = "lognormal:drift=1"
    even = simulated(None, DEEPSEEK, capsys=capsys)
    balanced = simulated(loads, DEEPSEEK, "experts.balance=on", capsys=capsys)
    off = simulated(loads, DEEPSEEK, capsys=capsys)
    first = [each["time_to_first_token"]["p50"] for each in (even, balanced, off)]
    assert first[0] <= first[1] < first[2]  # balanced, the exchange binds
    assert even["experts"] is None and off["experts"]["simulated"] > 1.5 * balanced["experts"]["simulated"]


def test_the_demo_s_trace_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    told = simulated(str(TRACE), "demo", "cluster.hardware=cpu", "cluster.ranks_per_node=8", capsys=capsys)
    assert told["experts"]["unbalanced"] > told["experts"]["balanced"] >= 1
