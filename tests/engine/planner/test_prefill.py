"""The prompt tokens of a step: how much time prompts get beside decoding rows, and alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lockstep.engine.planner.cost_model import Cost
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import World

SHARE = 1 / 3
TARGET = 0.2


def world(cost: Cost, share: float = SHARE, limit: float = 5.0, batch: int = 4096) -> World:
    """A rank as slow as ``cost`` says; the planner knows it, and sections were large before."""
    made = World(
        Mesh(data=1),
        pages=2048,
        page_size=4,
        max_len=4096,
        max_batch_tokens=batch,
        inter_token_target=TARGET,
        prompt_share=share,
        step_time_limit=limit,
    )
    model = made.planner.group.cost
    model.cost, model.trusted = cost, batch if limit else None
    made.ranks[0].cost = Cost(0.0, 0.0, 0.0, 0.0)  # it measures nothing, so that the model stays
    return made


def chunks(made: World, steps: int) -> list[tuple[int, int]]:
    """Decoding rows and prompt tokens of the next steps, whose results tell no times."""
    found = []
    for _ in range(steps):
        group = made.planner.group
        if not made.plan():
            break
        plan = made.plans[0][-1]
        extended = int(np.frombuffer(plan.section.extend_pairs, np.int32).reshape(-1, 2)[:, 1].sum())
        flight = group.steps.flights[plan.header.step]
        found.append((int(flight.tokens[0]) - extended, extended))
        while made.stage(0):
            pass
        made.execute(0)
        made.deliver(0)
    return found


def start(made: World, decoding: int, prompt: int) -> None:
    """``decoding`` rows decode, and a prompt arrives."""
    for number in range(decoding):
        made.submit([number + 1] * 4, 2000, stop=False)
    for _ in range(30):
        made.round()
    made.submit(list(range(prompt)), 1, stop=False)
    made.tidy()
    while made.stage(0):
        pass


@settings(max_examples=40, deadline=None)
@given(
    step=st.floats(0.01, 3.0),
    token=st.floats(1e-5, 1e-2),
    decoding=st.integers(1, 6),
    prompt=st.integers(64, 2000),
)
def test_prompts_always_get_their_share_of_the_time(
    step: float, token: float, decoding: int, prompt: int
) -> None:
    cost = Cost(fixed=step, token=token, kv=0.0, context=0.0)
    made = world(cost)
    start(made, decoding, prompt)
    waiting = [(rows, extended) for rows, extended in chunks(made, 8) if extended]
    assert waiting, "the prompt does not advance"
    left = prompt
    for rows, extended in waiting:
        decode = cost.fixed + cost.token * rows
        seconds = decode + cost.token * extended
        most = max(TARGET, decode / (1 - SHARE))
        page = cost.token * made.page_size
        assert seconds <= most + page + 1e-9, "prompts take more than their share"
        enough = extended == left or seconds >= most - page - 1e-9 or extended == 4096 - rows
        assert enough, f"{extended} prompt tokens in a step of {seconds:.3f} s, of {most:.3f} s allowed"
        left -= extended


def test_a_prompt_that_once_starved_ends_within_a_few_steps() -> None:
    """2,500 tokens beside steps of 0.7 s took over 150 steps, a page each."""
    cost = Cost(fixed=0.7, token=1e-3, kv=0.0, context=0.0)
    starved, served = world(cost, share=0.0, limit=0.0), world(cost)
    for made in (starved, served):
        start(made, 2, 2500)
    assert [extended for _, extended in chunks(starved, 4)] == [4] * 4
    steps = [extended for _, extended in chunks(served, 12) if extended]
    assert sum(steps) == 2500 and len(steps) <= 9, steps


@pytest.mark.parametrize(("token", "chunk"), [(1e-5, 2000), (5e-3, 996), (0.05, 98), (5.0, 4)])
def test_a_step_without_decoding_rows_stays_below_its_limit(token: float, chunk: int) -> None:
    cost = Cost(fixed=0.02, token=token, kv=0.0, context=0.0)
    made = world(cost)
    made.submit(list(range(2000)), 1, stop=False)
    made.tidy()
    while made.stage(0):
        pass
    [(rows, extended)] = chunks(made, 1)
    assert rows == 0 and abs(extended - chunk) <= 1


def test_the_first_chunk_of_an_unknown_machine_is_small_and_a_lost_step_halves_the_next() -> None:
    made = world(Cost())
    model = made.planner.group.cost
    model.trusted = 256
    made.submit(list(range(3000)), 1, stop=False)
    made.tidy()
    while made.stage(0):
        pass
    assert made.plan()
    assert made.planner.group.steps.flights[0].tokens.tolist() == [256]
    made.planner.begin_epoch()
    assert model.trusted == 128


def test_recordings_from_before_know_neither_share_nor_limit() -> None:
    made = world(Cost(fixed=3.0, token=0.1, kv=0.0, context=0.0), share=0.0, limit=0.0)
    made.submit(list(range(3000)), 1, stop=False)
    made.tidy()
    while made.stage(0):
        pass
    assert [extended for _, extended in chunks(made, 1)] == [3000]
