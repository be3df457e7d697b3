"""The pilot records whatever it does to the planner, and asks for plans at the right times."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.planner.group_plan import GroupPlan
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import Abort, Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import Refused, StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.recording.recorder import replay
from lockstep.engine.simulation.simulated_rank import SimulatedRank
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import ROOT

SETTINGS = Settings(Mesh(data=2), SchedulerSpec(max_running=4, max_batch_tokens=32), [40, 40], 4, 96)


def submit_of(handle: int) -> Submit:
    tokens = np.arange(handle, handle + 20, dtype=np.int32).tobytes()
    return Submit(handle, str(handle), tokens, chain_hashes(ROOT, tokens, 4), 40, Sampling(seed=handle))


class Driver:
    """A pilot, its ranks, and a clock of one second a turn."""

    def __init__(self, pilot: Pilot) -> None:
        self.pilot = pilot
        self.ranks = [SimulatedRank(rank, 4, 24) for rank in range(2)]
        self.now = 0.0
        self.plans = 0

    def turn(self) -> None:
        self.now += 1.0
        plan = self.pilot.plan(self.now) if self.pilot.due(self.now) else None
        for rank, message in self.pilot.follow_up()[0]:
            self.ranks[rank].stage(message)
            if isinstance(message, Preload):
                self.pilot.staged(Preloaded(rank, message.staged))
        if plan is not None:
            self.plans += 1
            self.pilot.book(self.results(plan), self.now, 0.1)

    def results(self, plan: GroupPlan) -> list[StepResult]:
        steps = [StepPlan(plan.header, section) for section in plan.sections.values()]
        results = [rank.execute(step) for rank, step in zip(self.ranks, steps, strict=True)]
        return [result for result in results if isinstance(result, StepResult)]


def test_a_recording_of_every_call_replays(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    driver = Driver(pilot := Pilot(SETTINGS, str(path)))
    for handle in range(10):
        pilot.submit(handle % 3, submit_of(handle))
    for turn in range(150):
        if turn == 5:
            pilot.abort(0, Abort(3))
            pilot.abort_frontend(2)
        if turn == 10:
            pilot.begin_epoch([], [1])
        if turn == 15:
            pilot.refused(Refused(0, pilot.group.steps.epoch, 0, 3, 5))
        driver.turn()
    assert pilot.planner.idle() and pilot.group.steps.epoch == 2
    pilot.submit(0, submit_of(11))
    driver.turn()
    pilot.fail_all()
    driver.turn()
    assert pilot.planner.idle()
    pilot.close()
    assert sum(1 for _ in replay(path)) == driver.plans > 20


def test_a_plan_is_due_when_work_arrives_and_not_without_work() -> None:
    driver = Driver(pilot := Pilot(SETTINGS))
    driver.turn()
    assert pilot.wait(driver.now) == math.inf and not pilot.due(driver.now)
    pilot.submit(0, submit_of(0))
    assert pilot.wait(driver.now) == 0 and pilot.due(driver.now)


def test_a_plan_after_a_result_waits_for_most_of_the_step_in_flight() -> None:
    driver = Driver(pilot := Pilot(SETTINGS))
    pilot.submit(0, submit_of(0))
    driver.turn()
    driver.turn()
    plan, ahead = pilot.plan(driver.now), pilot.plan(driver.now)
    assert plan is not None and ahead is not None
    assert pilot.wait(driver.now) == math.inf, "no more plans may be in flight"
    pilot.book(driver.results(plan), driver.now, 1.0)
    assert 0.6 < pilot.wait(driver.now) < 0.8
    assert not pilot.due(driver.now + 0.6) and pilot.due(driver.now + 0.8)


def test_a_full_disk_is_told_once() -> None:
    pilot = Pilot(SETTINGS, "/dev/full")
    assert pilot.flush_recording().startswith("the recording to /dev/full has ended: [Errno 28]")
    assert pilot.flush_recording() == ""
    pilot.submit(0, submit_of(0))
    pilot.close()
