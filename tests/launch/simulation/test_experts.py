"""Uneven expert loads in a simulation: their effect on steps, with and without balancing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lockstep
from lockstep.launch.commands.app import app
from lockstep.launch.simulation.experts import ExpertLoadsError, balance_experts

from .test_simulate import DEEPSEEK, planned

TRACE = Path(lockstep.__file__).parent / "recipes" / "demo" / "routing_trace.npz"
PROMPTS = "poisson:rate=400,input=2000,output=2,count=200,seed=1"


def test_a_drift_is_mended_by_few_moves() -> None:
    setup = planned(DEEPSEEK)[0].setup
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
        balance_experts(asked, planned(DEEPSEEK)[0].setup, balances=True, folder=Path())
        return
    with pytest.raises(ExpertLoadsError, match=f"--experts {asked}"):
        balance_experts(asked, planned(DEEPSEEK)[0].setup, balances=True, folder=Path())


def _simulated(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["simulate", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_balancing_shortens_simulated_steps() -> None:
    recipe = ("--recipe", DEEPSEEK, "--trace", PROMPTS)
    loads = ("--experts", "lognormal:drift=1")
    even, balanced, off = (
        _simulated(*recipe, *more) for more in ((), loads, (*loads, "experts.balance=off"))
    )
    first = [each["time_to_first_token"]["p50"] for each in (even, balanced, off)]
    assert first[0] < first[1] < first[2]
    assert even["experts"] is None and off["experts"]["simulated"] > 1.5 * balanced["experts"]["simulated"]


def test_the_demo_s_trace_is_simulated() -> None:
    recipe = (
        "--recipe",
        "demo",
        "cluster.hardware=cpu",
        "--trace",
        "poisson:rate=5,input=50,output=5,count=5",
    )
    told = _simulated(*recipe, "--experts", str(TRACE))["experts"]
    assert told["unbalanced"] > told["balanced"] >= 1
