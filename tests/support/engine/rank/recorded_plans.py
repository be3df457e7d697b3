"""Plans that one executor has executed, for another one to execute."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.executor import Executor

from .hand_plans import Driver, Request

BY_HOST = (
    Sampling(temperature=0.7, seed=5, presence_penalty=1.5, repetition_penalty=1.3),
    Sampling(temperature=0.0, num_logprobs=2, stop_i32=np.array([5, 77], np.int32).tobytes(), min_tokens=3),
    Sampling(
        temperature=0.0,
        bias_ids_i32=np.array([77], np.int32).tobytes(),
        bias_values_f32=np.array([100.0], np.float32).tobytes(),
    ),
    Sampling(temperature=1.0, seed=6, allowed_i32=np.array([3, 9, 40, 80], np.int32).tobytes()),
)
"""Settings of rows that are not drawn by a recording: their logits change, or they ask for more."""


def mixed_requests(samplings: tuple[Sampling, ...]) -> list[Request]:
    """Requests that come one after another, in chunks, and are held for a while: slots are given
    away again.
    """
    draw = np.random.default_rng(8)
    return [
        Request(
            draw.integers(2, 320, int(length)).tolist(),
            int(draw.integers(3, 12)),
            samplings[number % len(samplings)],
            start=2 * number,
            chunk=int(draw.integers(3, 30)),
            held=frozenset(range(2 * number + 6, 2 * number + 9)) if number % 3 == 0 else frozenset(),
        )
        for number, length in enumerate(draw.integers(1, 50, 14))
    ]


def executed(driver: Driver) -> tuple[list[StepPlan], list[StepResult]]:
    driver.run()
    return driver.plans, driver.results


def results_of(
    executor: Executor, requests: list[Request], plans: list[StepPlan], depth: int
) -> list[StepResult]:
    """The results of plans of which ``depth`` are under way at a time."""
    for number, request in enumerate(requests):
        executor.stage(number, np.asarray(request.prompt, np.int32).tobytes())
    executor.begin_epoch(0, ())
    found: list[StepResult] = []
    waiting, under_way, end = deque(plans), 0, time.monotonic() + 120
    while waiting or under_way:
        while waiting and under_way < depth:
            executor.submit(waiting.popleft())
            under_way += 1
        if (result := executor.take()) is not None:
            found.append(result)
            under_way -= 1
        assert time.monotonic() < end, f"{len(found)} of {len(plans)} results within 120 s"
    return found
