"""Whole steps at the sizes of real models, on tensors without memory, by plans of a real planner:
one copy in, one copy out on the side stream, and nothing else between host and device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Header, Mode, StepPlan
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.transfers import Mark, Passed
from lockstep.parallel.mesh import Mesh
from support.engine.rank.executors_without_memory import MAX_LEN, MAX_TOKENS, META, ROWS, executor_of

HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)
NUM_PAGES, PAGE_SIZE = 1000, 64

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces launches of the interpreter")


class Border(TorchDispatchMode):
    """Counts copies from the host to the device, and refuses ops that have tensors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.copies_in = 0
        self.triton: Counter[str] = Counter()

    @property
    def launched(self) -> Callable[..., None]:
        """Takes the place of launches of Triton's kernels."""

        def launch(grid: Any, *arguments: Any, **named: Any) -> None:
            self.triton[grid.fn.__name__] += 1
            tensors = [each for each in tree_leaves((arguments, named)) if isinstance(each, Tensor)]
            assert all(each.device == META for each in tensors), f"{grid.fn.__name__}: memory of the host"

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        result = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        if len({each.device for each in (*given, *result)}) > 1:
            assert func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default), func
            self.copies_in += 1  # out of tensors without memory torch copies nothing
        return found


class SideDouble:
    """A ``SideStream`` from tensors without memory: zeros arrive."""

    def __init__(self) -> None:
        self.num_copies = 0

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        assert target.device.type == "cpu" and source.device == META and source.shape == target.shape
        self.num_copies += 1
        return Passed()


class Again:
    """A ``GraphRecorder`` that launches again: nothing has values."""

    def record(self, part: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def repeat() -> None:
            part()

        return repeat, part()


class Steps:
    """Steps of a planner for an executor without memory: a header, its copies in and out."""

    def __init__(self, executor: DeviceExecutor, side: SideDouble) -> None:
        spec = SchedulerSpec(max_running=ROWS, max_batch_tokens=4096)
        self.planner = Planner(Settings(Mesh(), spec, [NUM_PAGES], PAGE_SIZE, MAX_LEN))
        self.executor, self.side, self._handle = executor, side, 0

    def ask(self, count: int, num_tokens: int) -> None:
        """Requests, whose prompts reach the executor as they would, between steps."""
        for _ in range(count):
            tokens = np.full(num_tokens, 2 + self._handle % 1000, np.int32).tobytes()
            self.planner.submit(0, Submit(self._handle, str(self._handle), tokens, b"", num_tokens + 40, HOT))
            self._handle += 1
        self.planner.tidy()
        for _, message in self.planner.take_staging():
            assert isinstance(message, Preload)
            self.executor.stage(message.staged, message.tokens_i32)
            self.planner.staged(Preloaded(0, message.staged))
        self.planner.tidy()

    def step(self) -> tuple[Header, int, int, Counter[str]]:
        plan = self.planner.plan()
        assert plan is not None
        border, before = Border(), self.side.num_copies
        launch = mock.patch.object(interpreter.GridExecutor, "__call__", border.launched)
        with launch, border:
            self.executor.submit(StepPlan(plan.header, plan.sections[0]))
            result = self.executor.take()
        assert result is not None
        self.planner.results([result])
        self.planner.tidy()
        return plan.header, border.copies_in, self.side.num_copies - before, border.triton


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [
        ("qwen3-30b-a3b", "local"),
        ("deepseek-v3", "local"),
        ("deepseek-v3", "all_gather"),
        ("deepseek-v3", "all_to_all"),
        ("deepseek-v3", "flashinfer"),
    ],
)
def test_a_step_is_one_copy_in_and_one_out(name: str, dispatch: str) -> None:
    side = SideDouble()
    executor = executor_of(name, 4, dispatch, (MAX_TOKENS,), recorder=Again(), side=side)
    steps, found = Steps(executor, side), []
    with mock.patch.object(interpreter.GridExecutor, "__call__", Border().launched):
        executor.begin_epoch(0, ())
    steps.ask(ROWS - 2, 7)
    found += [steps.step() for _ in range(3)]
    steps.ask(1, 700)  # a prompt beside rows that decode, in a captured step
    found += [steps.step() for _ in range(2)]
    steps.ask(1, 1500)  # and one that is too long for that
    found += [steps.step() for _ in range(2)]
    for header, copies_in, copies_out, launched in found:
        assert (copies_in, copies_out) == (1, 1), (header, copies_in, copies_out)
        assert launched["_pick_kernel"] == 1
    kinds = {(header.mode, header.capacity <= 1024) for header, *_ in found}
    assert kinds == {(Mode.DECODE, True), (Mode.MIXED, True), (Mode.MIXED, False)}
