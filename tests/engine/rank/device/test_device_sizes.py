"""The executor of a device at the sizes of real models, on tensors without memory: the host can
read nothing, and every launch is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from lockstep.engine.protocol.slot_table import Rows
from lockstep.kernels.table import ops_of
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.device_waits import DeviceWaits
from lockstep.parallel.one_epoch import OneEpochGroup
from support.engine.rank.executors_without_memory import ROWS, executor_of

QUIET = (
    "empty",
    "detach",
    "view",
    "slice",
    "select",
    "transpose",
    "expand",
    "unflatten",
    "unsqueeze",
    "flatten",
    "split",
    "reshape",
    "aten.t.",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")


class Launches(TorchDispatchMode):
    """Counts operations of torch that launch something, and kernels of Triton, which it does not
    run. Every wait for a group is timed, as among ranks that are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.triton: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(quiet in str(func) for quiet in QUIET):
            self.torch[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator[None]:
        def launch(grid: Any, *_: Any, **__: Any) -> None:
            self.triton[grid.fn.__name__] += 1

        waits = DeviceWaits(("experts",), torch.device("meta"), ops_of("triton").add_time)

        def timed(wait: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                waits.begin("experts")
                found = wait(*arguments)
                waits.end("experts")
                return found

            return run

        with (
            mock.patch.object(interpreter.GridExecutor, "__call__", launch),
            mock.patch.object(Collectives, "wait", timed(Collectives.wait)),
            mock.patch.object(OneEpochGroup, "wait", timed(OneEpochGroup.wait)),
            self,
            torch.inference_mode(),
        ):
            yield


@pytest.mark.parametrize(
    ("name", "dispatch", "budget"),
    [
        ("qwen3-30b-a3b", "local", 20),
        ("deepseek-v3", "local", 32),
        ("deepseek-v3", "all_gather", 58),
        ("deepseek-v3", "all_to_all", 74),
        ("deepseek-v3", "flashinfer", 47),
        ("deepseek-v3", "deepep", 42),
        ("deepseek-v3", "nccl_ep", 42),
        ("deepseek-v3.2", "local", 105),
        ("glm-5.2", "local", 62),
    ],
)
def test_a_decode_step_reads_nothing_and_keeps_to_its_launches(name: str, dispatch: str, budget: int) -> None:
    executor = executor_of(name, dispatch=dispatch)
    decode, launches = executor._captured, Launches()
    idle = Rows(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.bool_), 0)
    entries = [np.zeros(0, np.int64), np.zeros(0, np.int32)]
    sent = decode.send(ROWS, idle, idle.samples, entries, [], alone=True)
    with launches.counting():
        hidden_BD = decode._layers(ROWS, *sent[:7])
        tokens_B = decode._sample(hidden_BD, sent[7:14])
    assert tokens_B.shape == (ROWS,) and hidden_BD.shape == (ROWS, executor.model.config.hidden)
    assert launches.triton["_pick_kernel"] == 1
    waits = 0 if dispatch == "local" else 2 * len(executor.model.config.moe_layers)
    assert launches.triton["_add_time_kernel"] == 2 * waits, "one for a dispatch, one for its combine"
    each = (launches.torch.total() + launches.triton.total()) / executor.model.config.num_layers
    assert each <= budget, (each, launches.torch, launches.triton)
