"""The rehearsal of a rank: steps of all sizes without any other rank, and the memory that they
take.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from lockstep.engine.kv.budget import GPU_RESERVE_BYTES, PoolLimits
from lockstep.engine.rank import page_pool
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.rehearsal import rehearse
from lockstep.engine.rank.page_pool import fit_pages
from lockstep.parallel.collectives import Collectives
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import build_executor
from support.engine.rank.launch_recorder import LaunchRecorder
from support.kernels.poison import poisoned

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = deepseek_v3_config(num_hidden_layers=2)
    return write_checkpoint(tmp_path_factory.mktemp("rehearsal") / "model", config)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="records launches of the interpreter")


def small(executor: Any) -> DeviceExecutor:
    assert isinstance(executor, DeviceExecutor)
    executor._max_tokens, executor._captured._sizes = 2, (1, 4)
    return executor


class FakeMemory:
    """A device of 100 GiB, on which an executor has taken 3 GiB when it is made and 2 for each
    recording.
    """

    def __init__(self) -> None:
        self.made: weakref.ref[DeviceExecutor] | None = None
        self.read: list[int] = []
        self.released_after: list[int] = []

    def free(self) -> int:
        executor = None if self.made is None else self.made()
        taken = 0 if executor is None else 3 + 2 * executor._captured._graphs.num_recorded
        self.read.append((100 - taken) << 30)
        return self.read[-1]

    def release(self) -> None:
        self.released_after.append(len(self.read))


def test_memory_is_read_while_recordings_live_and_is_free_afterwards(tmp_path: Path) -> None:
    """Each size that is computed or captured is told."""
    memory, path = FakeMemory(), write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=1))
    told: list[str] = []

    def make() -> DeviceExecutor:
        made = build_executor(
            path, column="triton", as_device=True, recorder=LaunchRecorder(), tell=told.append
        )
        memory.made = weakref.ref(small(made))
        return small(made)

    assert rehearse(make, memory) == (3 + 2 * 4) << 30, "layers and sampling, of two sizes"
    assert memory.released_after == [0, 2], "before the first reading, and when all is over"
    assert memory.free() == 100 << 30, "nothing of a rehearsal is kept"
    computed = [f"computing {number} of 2 sizes of steps" for number in (1, 2)]
    captured = [f"capturing {number} of 2 sizes of steps" for number in (1, 2)]
    assert told == [*computed, *captured]
    told.clear()
    make().begin_epoch(0, ())
    assert told == [*captured, ""]


def test_pages_get_what_weights_and_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is that of ``launch plan`` for the same bytes."""
    gpu, page = torch.device("cuda"), 1 << 20
    monkeypatch.setattr(page_pool, "free_bytes", lambda device: 60 << 30)
    limits = PoolLimits(None, 10**9, claimed=11 << 30)
    pages = fit_pages(page, 16, limits, 1, gpu)
    assert pages == (int(0.97 * (49 << 30)) - GPU_RESERVE_BYTES) // page
    assert fit_pages(page, 16, PoolLimits(48 << 30, 10**9, 11 << 30), 1, gpu) == 48 << 10
    with pytest.raises(ValueError, match=rf"steps take {11 << 30}; use at most {49 << 30}, or auto"):
        fit_pages(page, 16, PoolLimits(50 << 30, 10**9, 11 << 30), 1, gpu)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_rehearses_without_the_others(path: Path, tensor: int) -> None:
    """Eight ranks share experts, and nobody else is there; the recorder refuses host reads. Memory
    that nobody has written holds NaN.
    """
    experts = Collectives("experts", 5, 8, HashStore(), 1.0, CPU)
    layers = Collectives("layers", 0, tensor, HashStore(), 1.0, CPU)
    executor = build_executor(
        path,
        experts,
        "all_gather",
        column="triton",
        as_device=True,
        recorder=LaunchRecorder(),
        tensor=layers,
    )
    with poisoned(), small(executor).rehearsing():
        assert small(executor)._captured._graphs.num_recorded == 4
    assert small(executor)._captured._graphs.num_recorded == 0
    assert not executor._parts.dispatcher.counts_LS.any() and experts.transport == ""


def test_a_stage_rehearses_by_hidden_states_of_its_own(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=2))
    for index in range(2):
        stages = Collectives("stages", index, 2, HashStore(), 1.0, CPU)
        executor = build_executor(
            model, column="reference", as_device=True, recorder=LaunchRecorder(), stages=stages
        )
        assert isinstance(executor, DeviceExecutor)
        executor._max_tokens = 2
        with executor.rehearsing():
            assert executor._captured._graphs.num_recorded == 0, "stages capture nothing"
