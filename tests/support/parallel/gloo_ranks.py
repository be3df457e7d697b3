"""Runs a function on several processes that meet through a store, as the ranks of a cluster do."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from lockstep.parallel.collectives import Collectives

Target = Callable[..., Any]

# Seconds for a meeting and for a collective: one rank may compile kernels or wait for a core while
# the others are ready.
DEADLINE = 240.0

_DIED = "died without a word"

# Ranks are forked from a process that has imported their code, which takes 2 s of CPU
# time. It does nothing else, so it has no threads and no locks that a child would inherit.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lockstep.engine.rank.imports_on_cpu"])


def run_ranks(
    target: Target, world: int, *args: Any, timeout: float = 480.0, memory: bool = True, mortal: bool = False
) -> list[Any]:
    """``target(collectives, *args)`` on ``world`` fresh processes; their results by rank.

    ``memory``: as of ``Collectives``. The result of a rank that dies is None if ranks are
    ``mortal``.

    Fails with the child's traceback when one raises, and names the ranks that are silent when
    ``timeout`` passes.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = [_FORKS.Pipe(duplex=False) for _ in range(world)]
    children = [
        _FORKS.Process(
            target=_child, args=(target, rank, world, store.port, ends[rank][1], args, memory), daemon=True
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        for child, (_, writer) in zip(children, ends, strict=True):
            child.start()
            writer.close()
        answers = [_answer(reader, deadline) for reader, _ in ends]
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()
                child.join()
    errors = "\n".join(
        f"rank {rank}: {error}"
        for rank, (error, _) in enumerate(answers)
        if error is not None and not (mortal and error == _DIED)
    )
    assert not errors, errors
    return [result for _, result in answers]


def meet(name: str, index: int, size: int, collectives: Collectives) -> Collectives:
    """A further group of ``size`` ranks, of which this one is ``index``; it meets at the store of
    ``collectives``.
    """
    further = Collectives(name, index, size, collectives.store, DEADLINE, torch.device("cpu"))
    further.build(0)
    return further


def _answer(reader: Connection, deadline: float) -> tuple[str | None, Any]:
    if not reader.poll(max(0.0, deadline - time.monotonic())):
        return "still silent at the deadline", None
    try:
        error, result = pickle.loads(reader.recv_bytes())
    except EOFError:
        return _DIED, None
    return error, result


def _child(
    target: Target,
    rank: int,
    world: int,
    port: int,
    writer: Connection,
    args: tuple[Any, ...],
    memory: bool,
) -> None:
    gc.freeze()  # collections leave what is shared with the others alone
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=DEADLINE)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit) if world > 1 else None
        collectives = Collectives("test", rank, world, store, DEADLINE, torch.device("cpu"), memory)
        collectives.build(0)
        writer.send_bytes(
            pickle.dumps((None, target(collectives, *args)))
        )  # by value: shared tensors die with the child
    except BaseException:
        writer.send_bytes(pickle.dumps((traceback.format_exc(), None)))
