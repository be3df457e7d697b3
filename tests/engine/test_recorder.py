"""A recording replays to the same plans, and a changed one is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.recorder import Mismatch, Recorder, Settings, replay
from lockstep.engine.simulated import SimulatedRank
from lockstep.engine.specs import Layout, SchedulerSpec
from lockstep.engine.types import Abort, Sampling, Stage, Staged, StepPlan, StepResult, Submit
from support.planner_world import ROOT


def record(path: Path) -> int:
    """Serves ten requests, one of them aborted, and records it; the number of plans."""
    settings = Settings(Layout(data=2), SchedulerSpec(max_running=4, max_batch_tokens=32), [40, 40], 4, 96)
    planner, recorder = settings.planner(), Recorder(path, settings)
    ranks = [SimulatedRank(rank, 4, 24) for rank in range(2)]
    plans = 0
    for index in range(10):
        tokens = np.arange(index, index + 20, dtype=np.int32).tobytes()
        submit = Submit(index, str(index), tokens, chain_hashes(ROOT, tokens, 4), 40, Sampling(seed=index))
        recorder.event("submit", 0, submit)
        planner.submit(0, submit)
    for turn in range(150):
        if turn == 9:
            recorder.event("abort", 0, Abort(1))
            planner.abort(0, Abort(1))
        plan = planner.plan()
        recorder.plan(plan)
        recorder.event("tidy")
        planner.tidy()
        for rank, message in planner.take_staging():
            ranks[rank].stage(message)
            if isinstance(message, Stage):
                recorder.event("staged", Staged(rank, message.staged))
                planner.staged(Staged(rank, message.staged))
        planner.take_output()
        if plan is not None:
            plans += 1
            results = [ranks[data].execute(StepPlan(plan.header, section)) for data, section in plan.sections.items()]
            booked = [result for result in results if isinstance(result, StepResult)]
            recorder.event("results", booked)
            planner.results(booked)
    assert planner.idle()
    recorder.close()
    return plans


def test_a_recording_replays_to_the_same_plans(tmp_path: Path) -> None:
    plans = record(tmp_path / "recording")
    assert sum(1 for _ in replay(tmp_path / "recording")) == plans > 20


def test_a_recording_cut_off_ends_where_it_is_cut(tmp_path: Path) -> None:
    plans = record(tmp_path / "recording")
    whole = (tmp_path / "recording").read_bytes()
    (tmp_path / "recording").write_bytes(whole[: len(whole) // 2 + 1])
    assert 0 < sum(1 for _ in replay(tmp_path / "recording")) < plans


def test_a_plan_that_differs_is_noticed(tmp_path: Path) -> None:
    record(tmp_path / "recording")
    whole = (tmp_path / "recording").read_bytes()
    (tmp_path / "recording").write_bytes(whole.replace(b"\xabmax_running\x04", b"\xabmax_running\x03"))
    with pytest.raises(Mismatch):
        list(replay(tmp_path / "recording"))
