"""The ranks of a group as libraries ask for them while they share memory, in the calls of MPI."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from torch._C._distributed_c10d import Store

from .recovery import ProcessSpent


class StoreRanks:
    """The ranks of a group, over the store where they meet: FlashInfer's ``CommBackend``, and as
    much of an ``mpi4py.MPI.Comm`` as DeepEP calls. Raises ProcessSpent where one is silent: the
    memory is half made.
    """

    def __init__(self, store: Store, index: int, size: int) -> None:
        self._store, self._index, self._size = store, index, size
        self._numbers = itertools.count()

    def Get_rank(self) -> int:
        return self._index

    def Get_size(self) -> int:
        return self._size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """The data of all ranks: numbers, texts, bytes, or sequences of those. The first rank
        gathers them.
        """
        number = next(self._numbers)
        try:
            self._put(f"{number}/{self._index}", data)
            if self._index == 0:
                parts = [self._store.get(f"{number}/{rank}") for rank in range(self._size)]
                self._put(str(number), parts)
            gathered = msgspec.msgpack.decode(self._store.get(str(number)), type=list[bytes])
        except RuntimeError as error:
            raise ProcessSpent(
                f"rank {self._index} shares memory with {self._size - 1} others: {error}"
            ) from error
        return tuple(msgspec.msgpack.decode(part) for part in gathered)

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> StoreRanks:
        """The library divides ranks by stages of a pipeline, of which this is one."""
        assert (color, key) == (0, self._index), f"group {color} and place {key} of rank {self._index}"
        return self

    def _put(self, key: str, data: Any) -> None:
        self._store.set(key, msgspec.msgpack.encode(data))  # type: ignore[arg-type]  # it takes bytes
