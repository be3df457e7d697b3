"""Recordings of steps whose experts are shared with another rank: repeated with other rows and with
other contents from the peer, they give what steps give that are computed anew.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.parallel.collectives import Collectives, Pending
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.launch_recorder import LaunchRecorder

CPU, CAPACITY, HIDDEN = torch.device("cpu"), 4, 64

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="records launches of the interpreter")


class Peer(Collectives):
    """A group of two, as a recording sees it: operations of a device. The other rank sends the same
    tokens in reverse, and adds ``outside`` [CAPACITY, HIDDEN] to each sum, from memory of its own.
    """

    def __init__(self) -> None:
        super().__init__("experts", 0, 2, HashStore(), 1.0, CPU)
        self.outside, self.gathered, self.reduced = torch.zeros(CAPACITY, HIDDEN), 0, 0

    def build(self, epoch: int, vacant: Collection[int] = ()) -> None:
        """Nobody to meet."""

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        self.gathered += 1
        return Pending(what, torch.cat([rows, rows.flip(0)]), None)

    def reduce_scatter(self, rows: Tensor, what: str) -> Pending:
        self.reduced += 1
        own, theirs = rows.chunk(2)
        return Pending(what, own + theirs.flip(0) + self.outside[: len(own)].to(rows.dtype), None)


class Changing(Driver):
    """Sets the contents of the peer before each step."""

    peer: Peer

    def step(self, step: int) -> StepResult:
        self.peer.outside.copy_(torch.randn(CAPACITY, HIDDEN, generator=torch.Generator().manual_seed(step)))
        return super().step(step)


def tokens_of(path: Path, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Peer, list[list[int]]]:
    peer = Peer()
    executor = build_executor(
        path,
        peer,
        "all_gather",
        column="triton",
        as_device=True,
        recorder=LaunchRecorder() if recorded else None,
        num_slots=4,
    )
    assert isinstance(executor, DeviceExecutor)
    if recorded:
        monkeypatch.setattr(executor._captured, "_sizes", (CAPACITY,))
        monkeypatch.setattr(executor, "_compute", None)
    requests = [
        Request([7 * number + 2, 9, 5, 11][: 2 + number], 3, GREEDY, start=number, chunk=3)
        for number in range(2)
    ]
    driver = Changing(executor, requests, lambda step: CAPACITY, num_slots=4)
    driver.peer = peer
    for number, request in enumerate(requests):
        executor.stage(number, torch.tensor(request.prompt, dtype=torch.int32).numpy().tobytes())
    executor.begin_epoch(0, ())
    return peer, driver.run()


def test_recorded_steps_with_an_exchange_give_those_of_computed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=1))
    often, wanted = tokens_of(path, False, monkeypatch)
    once, found = tokens_of(path, True, monkeypatch)
    assert found == wanted and len({token for tokens in wanted for token in tokens}) > 3
    assert (once.gathered, once.reduced) == (2, 2), "a warm-up and a capture"
    assert often.gathered == often.reduced > 3

    with monkeypatch.context() as frozen:
        frozen.setattr(Peer, "reduce_scatter", _frozen)
        assert tokens_of(path, True, monkeypatch)[1] != wanted, "contents that a recording had frozen in"


def _frozen(self: Peer, rows: Tensor, what: str) -> Pending:
    own, theirs = rows.chunk(2)
    return Pending(what, own + theirs.flip(0) + torch.tensor(self.outside[: len(own)].tolist()), None)
