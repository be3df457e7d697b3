"""Step metrics match values worked out by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from lockstep.engine.controller.step_totals import StepTotals
from lockstep.engine.frontend.metrics.metrics import Metrics
from lockstep.engine.protocol.cluster_state import PLAN_SECONDS, STEP_TOKENS, RankState
from lockstep.engine.protocol.plan import Header, Mode, Transfer
from lockstep.engine.protocol.results import StepResult
from lockstep.moe.balance.placement import EMPTY, Placement, contiguous
from lockstep.parallel.mesh import Mesh
from support.engine.frontend.scripted_controller import STATE

LABEL = '{engine="0",model_name="m"}'
WORLD = 3


def header(step: int, capacity: int, microbatches: int = 1, moves: int = 0) -> Header:
    rows = np.array([(0, 1, 0, 1, 2)] * moves + [(0, -1, -1, 2, 0)], np.int32)  # the last one empties a slot
    started = (Transfer(1, 0, rows.tobytes()),)
    return Header(0, 0, step, step - 1, Mode.MIXED, capacity, microbatches, moves=started)


def result(
    rank: int,
    seconds: float,
    waited: float,
    loads: list[list[int]] | None = None,
    phases: list[float] | None = None,
) -> StepResult:
    return StepResult(
        group=0,
        epoch=0,
        step=0,
        rank=rank,
        seconds=seconds,
        waited=waited,
        expert_i64=b"" if loads is None else np.array(loads, np.int64).tobytes(),
        phases_f32=b"" if phases is None else np.array(phases, np.float32).tobytes(),
    )


def shown(totals: StepTotals) -> dict[str, float]:
    """The samples of /metrics of a cluster with these totals."""
    lines = [line for line in rendered(totals) if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def rendered(totals: StepTotals) -> list[str]:
    ranks = tuple(
        RankState(rank, "node", 10 + rank, "serving" if rank else "lost", 1, 2, 3, 4, 0.1, 0.05)
        for rank in range(WORLD)
    )
    state = msgspec.structs.replace(
        STATE, epoch=7, page_size=4, kv_usage=0.0, imbalance=1.25, ranks=ranks, totals=totals.pack()
    )
    state = msgspec.structs.replace(state, placement_version=5, moves_open=2)
    metrics = Metrics("m")
    metrics.state(state)
    return metrics.render(0).decode().splitlines()


@pytest.fixture
def values() -> dict[str, float]:
    totals = StepTotals(Mesh(data=WORLD), [slice(0, 2)], 1000)
    totals.planned(0.0004, header(0, 8), np.array([8, 1, 3]), 8 + 1 + 4)
    totals.planned(0.0031, header(1, 16, microbatches=2, moves=3), np.array([10, 0, 14]), 16 + 0 + 16)
    totals.observed([result(0, 0.5, 0.1), result(2, 0.3, 0.25)])
    totals.observed([result(1, 0.4, 0.0), result(0, 0.2, 0.2)])
    for _ in range(2):
        for rank in range(WORLD):
            totals.reported(result(rank, 0.0, 0.0, [[rank, 1], [0, 2]], [0.5, 0.25, rank]))
    return shown(totals)


def test_plans_by_their_seconds(values: dict[str, float]) -> None:
    buckets = {
        bound: values[f'lockstep:plan_seconds_bucket{{engine="0",le="{float(bound)}",model_name="m"}}']
        for bound in PLAN_SECONDS
    }
    assert [buckets[bound] for bound in (0.00025, 0.0005, 0.003, 0.004)] == [0, 1, 1, 2]
    assert values[f"lockstep:plan_seconds_count{LABEL}"] == 2
    assert values[f"lockstep:plan_seconds_sum{LABEL}"] == pytest.approx(0.0035)


def test_steps_by_their_tokens(values: dict[str, float]) -> None:
    for prefix in ("vllm", "lockstep"):
        name = f"{prefix}:iteration_tokens_total"
        counts = [
            values[f'{name}_bucket{{engine="0",le="{float(bound)}",model_name="m"}}'] for bound in STEP_TOKENS
        ]
        assert counts == [0, 0, 1, *[2] * 10], "12 and 24 tokens"
        assert values[f"{name}_sum{LABEL}"] == 36 and values[f"{name}_count{LABEL}"] == 2
    assert [values[f'lockstep:rank_tokens_total{{data="{data}"}}'] for data in range(WORLD)] == [18, 1, 17]
    assert [values[f'lockstep:rank_step_tokens{{data="{data}"}}'] for data in range(WORLD)] == [10, 0, 14]


def test_padding_overlap_and_moves(values: dict[str, float]) -> None:
    assert values[f"lockstep:step_tokens_total{LABEL}"] == 36
    assert values[f"lockstep:step_rows_total{LABEL}"] == 45
    assert values[f"lockstep:dispatch_rows_total{LABEL}"] == 3 * 8 + 3 * 16
    assert values['lockstep:padding_waste{of="rows"}'] == pytest.approx(9 / 45)
    assert values['lockstep:padding_waste{of="dispatch"}'] == pytest.approx(36 / 72)
    assert values[f"lockstep:overlap{LABEL}"] == 1 and values[f"lockstep:overlapped_steps_total{LABEL}"] == 1
    assert values[f"lockstep:moved_bytes_total{LABEL}"] == 3000


def test_seconds_of_ranks(values: dict[str, float]) -> None:
    busy = [values[f'lockstep:rank_busy_seconds_total{{rank="{rank}"}}'] for rank in range(WORLD)]
    waited = [values[f'lockstep:rank_waited_seconds_total{{rank="{rank}"}}'] for rank in range(WORLD)]
    assert busy == pytest.approx([0.4, 0.4, 0.05]) and waited == pytest.approx([0.3, 0.0, 0.25])
    for phase, expected in {
        "dispatch": [1.0, 1.0, 1.0],
        "expert": [0.5, 0.5, 0.5],
        "combine": [0.0, 2.0, 4.0],
    }.items():
        assert [
            values[f'lockstep:{phase}_seconds_total{{rank="{rank}"}}'] for rank in range(WORLD)
        ] == expected


def test_a_phase_that_stays_empty_on_one_rank_says_so() -> None:
    helps = dict(
        line.removeprefix("# HELP ").split(" ", 1)
        for line in rendered(StepTotals(Mesh(), [slice(0, 0)], 0))
        if line.startswith("# HELP ")
    )
    for phase in ("dispatch", "combine"):
        assert helps[f"lockstep:{phase}_seconds_total"].endswith("0 where all experts live on one rank")
    expert_help = helps["lockstep:expert_seconds_total"]
    assert expert_help.endswith("from the norm before them to their sum")


def test_load_and_balance_of_experts(values: dict[str, float]) -> None:
    load = [
        [values[f'lockstep:expert_load_total{{layer="{layer}",rank="{rank}"}}'] for rank in range(WORLD)]
        for layer in range(2)
    ]
    assert load == [[2, 4, 6], [4, 4, 4]], "twice what one report says"
    assert values['lockstep:balancedness{layer="0"}'] == pytest.approx(2 / 3), (
        "1, 2 and 3 tokens in the last report"
    )
    assert values['lockstep:balancedness{layer="1"}'] == 1


def test_state_of_ranks_and_group(values: dict[str, float]) -> None:
    assert values['lockstep:rank_state{host="node",rank="0",state="lost"}'] == 1
    assert values['lockstep:rank_state{host="node",rank="2",state="serving"}'] == 1
    assert values[f"lockstep:epoch{LABEL}"] == 7 and values[f"lockstep:imbalance_ratio{LABEL}"] == 1.25
    assert values[f"lockstep:placement_version{LABEL}"] == 5 and values[f"lockstep:moves_open{LABEL}"] == 2


def test_experts_by_the_ranks_that_hold_them() -> None:
    """Two layers of four experts on two ranks with five slots in all; in the second, rank 1 has no
    copy of expert 0.
    """
    experts_LWS = np.array([[[0, 1, 2], [0, 3, EMPTY]], [[0, 1, 2], [3, EMPTY, EMPTY]]], np.int32)
    for placement, held in ((Placement(experts_LWS, 4), {"1": 7, "2": 1}), (contiguous(3, 8, 4), {"1": 24})):
        state = msgspec.structs.replace(STATE, placement_i32=placement.ranges().tobytes())
        metrics = Metrics("m")
        metrics.state(state)
        lines = [
            line for line in metrics.render(0).decode().splitlines() if line.startswith("lockstep:experts{")
        ]
        assert lines == [f'lockstep:experts{{ranks="{ranks}"}} {count:.1f}' for ranks, count in held.items()]


def test_one_rank_twice_in_a_batch_counts_twice() -> None:
    totals = StepTotals(Mesh(data=WORLD), [slice(0, 0)], 0)
    totals.observed([result(1, 0.5, 0.1), result(1, 0.25, 0.0)])
    assert shown(totals)['lockstep:rank_busy_seconds_total{rank="1"}'] == pytest.approx(0.65)


def test_nothing_yet_is_shown_without_a_division_by_zero() -> None:
    values = shown(StepTotals(Mesh(data=WORLD), [slice(0, 0)], 0))
    assert (
        values['lockstep:padding_waste{of="rows"}'] == 0
        and values[f"lockstep:plan_seconds_count{LABEL}"] == 0
    )
    totals = StepTotals(Mesh(data=WORLD), [slice(0, 1)], 0)
    assert shown(totals)['lockstep:balancedness{layer="0"}'] == 1
