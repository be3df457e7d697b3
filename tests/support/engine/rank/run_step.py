"""A step of an executor, from its plan to its result."""

from __future__ import annotations

import time

from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.contract import StepExecutor


def run_step(executor: StepExecutor, plan: StepPlan) -> StepResult:
    """Submits a plan and waits for its result."""
    executor.submit(plan)
    deadline = time.monotonic() + 60
    while (result := executor.take()) is None:
        assert time.monotonic() < deadline, f"no result of step {plan.header.step} within 60 s"
    return result
