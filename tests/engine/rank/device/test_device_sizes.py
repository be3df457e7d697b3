"""The executor of a device at the sizes of real models, on tensors without memory: the host can
read nothing, and every launch is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from lockstep.engine.models.config import load_config
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.rank.device import executor as device_executor
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.page_pool import KVPool
from lockstep.engine.rank.parts import Parts
from lockstep.launch.recipe.file import find_recipe
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.clock import NoClock
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.collectives import Collectives, RankGroups
from lockstep.parallel.dense import UNSPLIT_LAYERS
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.stages import whole_model

META = torch.device("meta")
CONFIGS = find_recipe("demo").parent / "configs"
ROWS = 256
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


class NoUpload:
    """Arrays that arrive as tensors without memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Keeps nothing."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(array).to(META) for array in arrays]


class Launches(TorchDispatchMode):
    """Counts operations of torch that launch something, and kernels of Triton, which it does not
    run.
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

        with mock.patch.object(interpreter.GridExecutor, "__call__", launch), self, torch.inference_mode():
            yield


def executor_of(name: str) -> DeviceExecutor:
    config = load_config(CONFIGS / name)
    alone = Collectives("alone", 0, 1, None, 1.0, META)
    dispatcher = LocalDispatcher(
        contiguous(len(config.moe_layers), config.moe.num_experts, 1), META, NoClock()
    )
    stage = whole_model(config.num_layers, config.moe_layers)
    part = ModelPart(stage, UNSPLIT_LAYERS)
    model = build_model(
        config, dispatcher, torch.bfloat16, META, "triton", keep_fp8=config.kernel_fp8, part=part
    )
    parts = Parts(
        rank=0,
        model=model,
        dispatcher=dispatcher,
        groups=RankGroups(alone),
        splits=UNSPLIT_LAYERS,
        links=PipelineLinks(alone, stage, META),
        turns=Turns(),
        samples=True,
        pool=KVPool(config.part(config.num_layers, 1), 1000, 64, "fp8", META),
        device=META,
    )
    with mock.patch.object(device_executor, "Upload", NoUpload):
        return DeviceExecutor(parts, ROWS, 4096, 1, 8192, None)


@pytest.mark.parametrize(("name", "budget"), [("qwen3-30b-a3b", 20), ("deepseek-v3", 32)])
def test_a_decode_step_reads_nothing_and_keeps_to_its_launches(name: str, budget: int) -> None:
    executor = executor_of(name)
    decode, launches = executor._decode, Launches()
    idle = Rows(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.bool_), 0)
    entries = [np.zeros(0, np.int64), np.zeros(0, np.int32)]
    sent = decode.send(ROWS, idle, idle.samples, entries, [])
    with launches.counting():
        hidden_BD = decode._layers(ROWS, *sent[:6])
        tokens_B = decode._sample(hidden_BD, sent[6:13])
    assert tokens_B.shape == (ROWS,) and hidden_BD.shape == (ROWS, executor.model.config.hidden)
    assert launches.triton["_sample_kernel"] == 1
    each = (launches.torch.total() + launches.triton.total()) / executor.model.config.num_layers
    assert each <= budget, (each, launches.torch, launches.triton)
