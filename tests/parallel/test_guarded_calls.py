"""Errors of calls among ranks: those that tell of a lost peer are CollectiveError, or ProcessSpent
where the memory of a group serves one epoch; a rank's own faults stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from torch._C._distributed_c10d import Store
from torch.distributed import DistBackendError, HashStore

from lockstep.parallel import transports
from lockstep.parallel.collectives import CollectiveError, Collectives, Pending
from lockstep.parallel.nvlink import NvlinkGroup
from lockstep.parallel.one_epoch import OneEpochGroup
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.recovery import ProcessSpent
from support.parallel.nvlink_double import NvlinkDouble

CPU = torch.device("cpu")
LOST = RuntimeError("Connection closed by peer\nand more"), DistBackendError("remote process exited")
OWN = (
    NotImplementedError("no such kernel"),
    RecursionError("too deep"),
    torch.AcceleratorError("an illegal memory access"),
    torch.OutOfMemoryError("20 GiB"),
)


class Failing:
    """A process group and its work, of which every call fails with ``error``."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def _fail(self, *_: Any) -> NoReturn:
        raise self._error

    allreduce = is_completed = wait = abort = _fail


class Remote:
    """A transport of a device whose meetings fail, or give a group that does."""

    name, recovery, on_host = "remote", "abort and recapture", False

    def __init__(self, error: RuntimeError, meets: bool) -> None:
        self._error, self._meets = error, meets

    def meet(self, *_: Any) -> Failing:
        if self._meets:
            return Failing(self._error)
        raise self._error


def collectives(error: RuntimeError, monkeypatch: pytest.MonkeyPatch, meets: bool = True) -> Collectives:
    monkeypatch.setattr(transports, "transport_of", lambda device: Remote(error, meets))
    return Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU)


def calls(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """Each fails with ``error``, by what its message names."""
    group, unmet = (collectives(error, monkeypatch, meets) for meets in (True, False))
    group.build(0)
    work: Any = Failing(error)
    pending = Pending("tokens", torch.ones(2), work)
    return {
        "rank 0 did not meet its 1 peers": lambda: unmet.build(0),
        "rank 0 started a sum": lambda: group.all_reduce(torch.ones(2), "a sum"),
        "rank 0 asked for tokens": lambda: group.is_done(pending),
        "rank 0 waited for tokens after 0.0 s of 1 s": lambda: group.wait(pending),
    }


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_a_lost_peer_is_an_error_of_the_collective(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    for named, call in calls(error, monkeypatch).items():
        with pytest.raises(CollectiveError, match=rf"{named}.*: {str(error).splitlines()[0]}$"):
            call()


@pytest.mark.parametrize("error", OWN, ids=repr)
def test_a_fault_of_the_rank_is_no_lost_peer(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in calls(error, monkeypatch).values():
        with pytest.raises(type(error)) as found:
            call()
        assert found.value is error and found.value.__cause__ is None


@pytest.mark.parametrize("leave", [lambda group: group.cut(2), lambda group: group.destroy()])
def test_a_process_whose_group_cannot_be_aborted_is_spent(
    leave: Callable[[RankGroups], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels wait for a peer that is gone, and nothing ends them."""
    groups = RankGroups(collectives(LOST[0], monkeypatch))
    groups.build(2)
    with pytest.raises(ProcessSpent, match=r"experts of stage 0: the group cannot be aborted: Connection"):
        leave(groups)


class Memory(OneEpochGroup):
    """Memory whose library fails with ``error``, at the meeting if it ``fails`` there."""

    means = "memory"

    def __init__(self, error: RuntimeError, fails: bool) -> None:
        super().__init__("experts", 0, 2, HashStore(), CPU)
        self._error, self._fails = error, fails

    def exchange(self) -> None:
        self._start(self._fail)

    def _meet(self, met: Store) -> None:
        if self._fails:
            self._fail()

    _stand_in = _drop = lambda self: None

    def _fail(self) -> None:
        raise self._error


@pytest.mark.parametrize("error", [*LOST, *OWN], ids=repr)
def test_memory_that_lost_a_rank_spends_the_process(error: RuntimeError) -> None:
    unmet, met = Memory(error, fails=True), Memory(error, fails=False)
    met.build(3)
    for call, named in (
        (lambda: unmet.build(3), "experts: rank 0 did not meet its 1 peers in epoch 3: "),
        (met.exchange, "experts: rank 0 started an exchange: "),
    ):
        with pytest.raises(RuntimeError) as found:
            call()
        if error in OWN:
            assert found.value is error
        else:
            assert isinstance(found.value, ProcessSpent) and str(found.value).startswith(named)


def test_an_error_of_a_rehearsal_is_the_rank_s_own() -> None:
    """Nobody else takes part."""
    memory = Memory(LOST[0], fails=False)
    memory.rehearse()
    with pytest.raises(RuntimeError) as found:
        memory.exchange()
    assert found.value is LOST[0]


def test_room_of_a_library_is_asked_for_within_the_guard() -> None:
    alone = Collectives("alone", 0, 1, None, 1.0, CPU)
    group = NvlinkGroup("experts", 0, 2, HashStore(), CPU, NvlinkDouble(alone))
    broken: Any = Failing(LOST[0])
    broken.get_combine_input_buffer = broken.wait
    group._rounds = [broken]
    with pytest.raises(ProcessSpent, match="experts: rank 0 asked for room for outputs: Connection"):
        group.room_for_outputs(0, torch.bfloat16)
