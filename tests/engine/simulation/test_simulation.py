"""The controller's turn in virtual time: every request is answered, times match arithmetic, and
requests that never end are named.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.planner.cost_model import Cost
from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import Rejected, Submit, TokenBatch
from lockstep.engine.protocol.message import Message, Sampling
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.simulation import simulation
from lockstep.engine.simulation.simulated_group import SimulatedGroup, StepWork
from lockstep.engine.simulation.simulated_rank import SimulatedRank
from lockstep.engine.simulation.simulation import Arrival, Simulation, StepSeen, Stuck
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import ROOT


@dataclass
class Line:
    """A step takes ``fixed`` seconds, and ``token`` seconds for each token, on each stage."""

    fixed: float = 1.0
    token: float = 0.0
    stages: int = 1

    def __call__(self, work: StepWork) -> NDArray[np.float64]:
        return np.tile(self.fixed + self.token * work.tokens_D, (self.stages, 1))


@dataclass
class Log:
    """Times of each request's tokens and of its end, statuses of rejected requests, and steps."""

    tokens: dict[int, list[float]] = field(default_factory=dict)
    finished: dict[int, float] = field(default_factory=dict)
    rejected: dict[int, int] = field(default_factory=dict)
    steps: list[StepSeen] = field(default_factory=list)

    def told(self, now: float, messages: list[tuple[int, Message]]) -> None:
        for _, message in messages:
            if isinstance(message, Rejected):
                self.rejected[message.handle] = message.status
            elif isinstance(message, TokenBatch):
                ends = np.frombuffer(message.finish_u8, np.uint8).tolist()
                for handle, end in zip(
                    np.frombuffer(message.handles_i64, np.int64).tolist(), ends, strict=True
                ):
                    self.tokens.setdefault(handle, []).append(now)
                    if end:
                        self.finished[handle] = now

    def stepped(self, planner: Planner, step: StepSeen) -> None:
        self.steps.append(step)

    def measured(self, booking: float, planning: float) -> None:
        assert booking >= 0 and planning > 0


def settings_of(mesh: Mesh = Mesh(), *, pages: int = 64, **spec: object) -> Settings:  # noqa: B008 - frozen
    own = {
        "max_running": 4,
        "max_batch_tokens": 64,
        "checksum_every": 1,
        "pacing": False,
        "inter_token_target": 1e9,
    } | spec
    return Settings(mesh, SchedulerSpec(**own), [pages] * mesh.data, 4, 256)  # type: ignore[arg-type]


def arrival(number: int, at: float, num_prompt: int, output: int, *, alike: int = 0) -> Arrival:
    """A request whose first ``alike`` prompt tokens are the same for all requests."""
    prompt = (
        (np.arange(num_prompt) + np.where(np.arange(num_prompt) < alike, 0, 1000 * (number + 1)))
        .astype(np.int32)
        .tobytes()
    )
    return at, Submit(
        number, f"r{number}", prompt, chain_hashes(ROOT, prompt, 4), num_prompt + output, Sampling()
    )


def run(chosen: Settings, times: simulation.StepTimes, arrivals: list[Arrival]) -> tuple[Log, Simulation]:
    log = Log()
    simulated = Simulation(chosen, times, log)
    assert simulated.run(iter(arrivals))
    simulated.planner.check()
    return log, simulated


def test_a_request_alone_takes_the_steps_of_its_prompt_and_one_a_token() -> None:
    log, simulated = run(settings_of(), Line(1.0, 0.01), [arrival(0, 2.0, 100, 4)])
    first = 2.0 + (1 + 0.64) + (1 + 0.36)
    assert log.tokens[0] == pytest.approx([first, first + 1.01, first + 2.02, first + 3.03])
    assert simulated.now == pytest.approx(first + 3.03), "nothing runs after the last token"


def test_a_later_request_begins_with_the_next_step_that_is_not_yet_planned() -> None:
    log, _ = run(settings_of(), Line(1.0), [arrival(0, 0.0, 8, 10), arrival(1, 2.5, 8, 1)])
    assert log.tokens[0] == pytest.approx(np.arange(1.0, 11.0).tolist())
    assert log.tokens[1] == pytest.approx([5.0]), "2 to 3 runs, 3 to 4 was planned ahead"


def test_a_paced_plan_waits_for_late_requests_and_costs_no_time() -> None:
    log, _ = run(settings_of(pacing=True), Line(1.0), [arrival(0, 0.0, 8, 10), arrival(1, 2.5, 8, 1)])
    assert log.tokens[0] == pytest.approx(np.arange(1.0, 11.0).tolist())
    assert log.tokens[1] == pytest.approx([4.0]), "the plan of 3 to 4 leaves at 2.69"


def test_a_step_ends_with_its_slowest_rank_and_others_wait() -> None:
    chosen = settings_of(Mesh(data=2))
    log, simulated = run(chosen, Line(1.0, 0.1), [arrival(0, 0.0, 10, 2), arrival(1, 0.0, 4, 2)])
    assert log.tokens == {0: pytest.approx([2.0, 3.1]), 1: pytest.approx([2.0, 3.1])}
    assert [step.own_SD.tolist() for step in log.steps] == [[[2.0, pytest.approx(1.4)]], [[1.1, 1.1]]]
    assert simulated.planner.group.counters.steps == 2


def test_stages_of_a_pipeline_work_side_by_side() -> None:
    piped = Mesh(pipeline=2)
    log, _ = run(settings_of(piped), Line(1.0, stages=2), [arrival(0, 0.0, 8, 3)])
    assert log.tokens[0] == pytest.approx([2.0, 4.0, 6.0]), "a token goes through both stages before the next"
    log, _ = run(settings_of(piped), Line(1.0, stages=2), [arrival(0, 0.0, 8, 3), arrival(1, 0.0, 8, 3)])
    assert sorted(log.finished.values()) == pytest.approx([6.0, 7.0]), "the other cohort is a stage behind"


def test_the_planner_learns_what_steps_take() -> None:
    times = Line(0.005, 0.0004)
    uneven = settings_of(Mesh(data=3), max_running=16)
    _, simulated = run(uneven, times, [arrival(n, 0.01 * n, 10 + 7 * n % 50, 40) for n in range(40)])
    cost = simulated.planner.group.cost.cost
    assert (cost.fixed, cost.token) == (pytest.approx(0.005, rel=0.05), pytest.approx(0.0004, rel=0.05))
    assert cost.token != Cost().token


def test_a_full_queue_answers_503_and_too_long_a_request_400() -> None:
    arrivals = [arrival(0, 0.0, 250, 7)] + [arrival(n, 0.5, 8, 50) for n in range(1, 9)]
    log, _ = run(settings_of(max_queue=2), Line(), arrivals)
    assert Counter(log.rejected.values()) == {400: 1, 503: 2}, "4 rows and a queue of 2"
    assert len(log.finished) == 6


def test_a_prefix_is_computed_once_and_found_again() -> None:
    arrivals = [arrival(n, 10.0 * n, 40, 2, alike=24) for n in range(3)]
    log, simulated = run(settings_of(), Line(1.0, 0.01), arrivals)
    counters = simulated.planner.group.counters
    assert (counters.prefix_queries, counters.prefix_hits) == (120, 48)
    assert log.tokens[0][0] == pytest.approx(1.4) and log.tokens[1][0] == pytest.approx(11.16)


def test_the_same_arrivals_give_the_same_times() -> None:
    arrivals = [arrival(n, 0.7 * n, 30 + n, 20, alike=4 * (n % 5)) for n in range(30)]
    chosen = settings_of(Mesh(data=2), pages=40, pacing=True)
    first, second = (run(chosen, Line(0.3, 0.003), arrivals)[0] for _ in range(2))
    assert first.tokens == second.tokens
    assert len(first.finished) == 30


# --------------------------------------------------------------------------- any load


@given(
    mesh=st.builds(Mesh, pipeline=st.integers(1, 3), data=st.integers(1, 3), tensor=st.integers(1, 2)),
    asks=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 100), st.integers(1, 60), st.integers(0, 60)),
        min_size=1,
        max_size=30,
    ),
    pages=st.integers(64, 80),
    queue=st.integers(1, 40),
    pacing=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_and_tokens_add_up(
    mesh: Mesh, asks: list[tuple[float, int, int, int]], pages: int, queue: int, pacing: bool
) -> None:
    """The planner checks its state against the ranks' checksums after every step."""
    ordered = sorted(asks)
    arrivals = [
        arrival(number, at, prompt, output, alike=alike)
        for number, (at, prompt, output, alike) in enumerate(ordered)
    ]
    chosen = settings_of(mesh, pages=pages, max_queue=queue, pacing=pacing)
    log, simulated = run(chosen, Line(0.5, 0.01, mesh.pipeline), arrivals)
    assert set(log.finished) | set(log.rejected) == set(range(len(asks)))
    for number, (at, _, output, _) in enumerate(ordered):
        if number not in log.rejected:
            times = log.tokens[number]
            assert len(times) == output
            assert times[0] >= at + 0.5 * mesh.pipeline
            assert (np.diff(times) >= 0.5 * mesh.pipeline - 1e-9).all(), "a token needs the one before it"
    assert simulated.planner.group.counters.generation_tokens == sum(
        len(times) for times in log.tokens.values()
    )
    assert set(log.rejected.values()) <= {503}


def test_pressure_preempts_and_everybody_still_gets_everything() -> None:
    arrivals = [arrival(number, 0.0, 40, 150) for number in range(8)]
    log, simulated = run(settings_of(pages=64), Line(0.1), arrivals)
    assert simulated.planner.group.counters.preemptions > 0
    assert {number: len(times) for number, times in log.tokens.items()} == dict.fromkeys(range(8), 150)


def test_the_group_equals_its_ranks() -> None:
    """Tokens, context and checksums of every step equal those of ``SimulatedRank``."""
    chosen = settings_of(Mesh(data=2), pages=70)
    planner, group = Planner(chosen), SimulatedGroup(chosen)
    ranks = [SimulatedRank(rank, 4, 64) for rank in range(2)]
    coefficients = {"tokens_D": Cost(0, 1, 0, 0), "decode_context_D": Cost(0, 0, 1, 0)}
    for number in range(12):
        planner.submit(0, arrival(number, 0.0, 30 + 5 * number, 40, alike=20)[1])
    steps = 0
    while not planner.idle():
        plan = planner.plan()
        planner.tidy()
        planner.take_output()
        for rank, message in planner.take_staging():
            ranks[rank].stage(message)
            group.stage(message)
            if isinstance(message, Preload):
                planner.staged(Preloaded(rank, message.staged))
        if plan is None:
            continue
        steps += 1
        executed = group.execute(plan)
        name, cost = list(coefficients.items())[steps % 2]
        mine = group.results(executed, 0, np.zeros(2))
        for data, section in plan.sections.items():
            ranks[data].cost = cost
            theirs = ranks[data].execute(StepPlan(plan.header, section))
            assert isinstance(theirs, StepResult)
            assert theirs.seconds == getattr(executed.work, name)[data]
            assert (len(theirs.tokens_i32), theirs.checksum) == (
                len(mine[data].tokens_i32),
                mine[data].checksum,
            )
        planner.results(mine)
    assert steps > 60


# -------------------------------------------------------------------------- requests that never end


def test_a_request_that_never_ends_is_named() -> None:
    log = Log()
    simulated = Simulation(settings_of(), Line(), log)

    def arrivals() -> Iterator[Arrival]:
        yield arrival(0, 0.0, 8, 50)
        yield arrival(1, 5.0, 8, 3)
        simulated.planner.hold(0, 0, held=True)

    with pytest.raises(
        Stuck, match=r"nothing can happen any more, but request r0 \(8 prompt tokens, limit 58\) decodes at"
    ):
        simulated.run(arrivals())
    assert set(log.finished) == {1}
    assert gc.isenabled()


def test_steps_without_a_token_for_anybody_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "patience", lambda settings: 5)
    with pytest.raises(
        Stuck, match=r"no.* token for 5 steps, and request r0 \(200 prompt tokens, limit 202\) is in prefill"
    ):
        run(settings_of(max_batch_tokens=4), Line(), [arrival(0, 0.0, 200, 2)])


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_long_prompt_in_small_chunks_is_waited_for(pipeline: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "PATIENCE", 5)
    log, _ = run(
        settings_of(Mesh(pipeline=pipeline), max_batch_tokens=2),
        Line(stages=pipeline),
        [arrival(0, 0.0, 200, 2)],
    )
    assert set(log.finished) == {0}


def test_it_can_be_stopped() -> None:
    log, turns = Log(), iter(range(1000))
    simulated = Simulation(settings_of(), Line(), log)
    assert not simulated.run(iter([arrival(0, 0.0, 8, 100)]), lambda: next(turns) >= 20)
    assert 5 < len(log.tokens[0]) < 100 and not log.finished
