"""Memory at the same place on every rank of a group, and exchanges between ranks whose counts stay
on the device (torch symmetric memory over NVSHMEM).

A rank reserves regions, then ``build`` allocates them: all ranks reserve the same ones in the same
order. NVSHMEM cannot be left and joined again by a process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from .one_epoch import OneEpochGroup, Started

_WORLD = "0"
"""The group by which NVSHMEM finds all of its processes, by its name in torch."""

_FULL_BYTES = 8 << 20
"""An exchange uses all of its blocks if its source has so many bytes: 64 blocks of 128 kB."""

_MOST_BLOCKS, _FAR_BLOCKS = 64, 16
"""Blocks of an exchange within NVLink and beyond. Blocks of one peer share its bytes in equal
parts, and an assertion on the device fails where bytes are left over."""

_MOST_RANKS = 512
"""A block of the exchange has a thread for each rank."""


def row_alignment(size: int) -> int:
    """Bytes of which rows are a multiple, so that each block among ``size`` ranks copies whole
    16-byte words.
    """
    return 16 * math.lcm(max(1, _MOST_BLOCKS // size), max(1, _FAR_BLOCKS // size))


def region_rows(num_rows: int, row_bytes: int) -> int:
    """Rows that a region needs for ``num_rows``."""
    return max(num_rows, -(-_FULL_BYTES // row_bytes))


class SymmetricLibrary(Protocol):
    """The calls of a library for symmetric memory."""

    def register(self, group: str, index: int, size: int, store: Store) -> None:
        """Tells the library of a group of ranks."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocates on all ranks of the group; they call alike."""
        ...

    def rendezvous(self, tensor: Tensor, group: str) -> None:
        """Makes the tensor known to the other ranks; they call alike."""
        ...

    def all_to_all_vdev(
        self, rows: Tensor, received: Tensor, splits_W: Tensor, received_2W: Tensor, group: str
    ) -> None:
        """Sends ``rows`` in W runs of splits_W rows, run w to rank w. Writes the runs of all ranks
        to ``received`` without gaps, and their lengths and starts to received_2W.
        """
        ...


class TorchSymmetricLibrary:
    """``torch.ops.symm_mem`` with the backend NVSHMEM.

    ``all_to_all_vdev_2d``, which sorts by expert too, is limited to 32 ranks and 32 experts of a
    rank, since it adds up in one warp.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def register(self, group: str, index: int, size: int, store: Store) -> None:
        from torch._C import _distributed_c10d as c10d

        memory: Any = c10d._SymmetricMemory
        if not c10d._is_nvshmem_available():
            raise RuntimeError(
                "experts.dispatch = all_to_all: this torch has no NVSHMEM; use all_gather, or a torch "
                "with nvidia-nvshmem"
            )
        memory.set_backend("NVSHMEM")
        self._kept += register_group(group, index, size, store)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        from torch.distributed import _symmetric_memory

        return _symmetric_memory.empty(shape, dtype=dtype, device=device)

    def rendezvous(self, tensor: Tensor, group: str) -> None:
        from torch._C import _distributed_c10d as c10d

        c10d._SymmetricMemory.rendezvous(tensor, group)

    def all_to_all_vdev(
        self, rows: Tensor, received: Tensor, splits_W: Tensor, received_2W: Tensor, group: str
    ) -> None:
        torch.ops.symm_mem.all_to_all_vdev(rows, received, splits_W, received_2W, group)


def register_group(group: str, index: int, size: int, store: Store) -> list[Any]:
    """Registers a group under its name and as all processes of NVSHMEM. Torch finds it as long as
    the returned objects live.

    Versions of torch look for it in one of two places: among process groups or among those of
    symmetric memory.
    """
    from torch._C import _distributed_c10d

    c10d: Any = _distributed_c10d
    kept = []
    for name in (_WORLD, group):
        met = PrefixStore(name, store)
        registered = c10d.ProcessGroup(met, index, size)
        registered._set_group_name(name)
        c10d._register_process_group(name, registered)
        c10d._SymmetricMemory.set_group_info(name, index, size, met)
        kept.append(registered)
    return kept


@dataclass(frozen=True)
class Region:
    """Reserved symmetric memory: its number, shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SymmetricGroup(OneEpochGroup):
    """The symmetric memory of ``size`` ranks; this rank is ``index``. Regions lie at fixed
    addresses from ``build`` on.
    """

    means = "symmetric memory"

    def __init__(
        self,
        name: str,
        index: int,
        size: int,
        store: Store,
        device: torch.device,
        library: SymmetricLibrary,
    ) -> None:
        if size > _MOST_RANKS:
            raise ValueError(
                f"experts.dispatch = all_to_all: {size} ranks; allowed are {_MOST_RANKS} on GPUs"
            )
        super().__init__(name, index, size, store, device)
        self._library = library
        self._regions: list[Region] = []
        self._tensors: list[Tensor] = []

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
        """Memory that ``build`` will allocate."""
        assert not self._tensors, f"{self._name}: memory is reserved before it is built"
        region = Region(len(self._regions), shape, dtype)
        self._regions.append(region)
        return region

    @property
    def num_bytes(self) -> int:
        """Bytes of all regions reserved so far."""
        return sum(math.prod(region.shape) * region.dtype.itemsize for region in self._regions)

    def __getitem__(self, region: Region) -> Tensor:
        return self._tensors[region.number]

    def start_all_to_all(
        self, rows: Region, received: Region, splits: Region, received_splits: Region
    ) -> Started:
        """Sends runs of rows to all ranks, once the current stream has come so far; the host reads
        nothing.

        ``splits`` [W] and ``received_splits`` [2, W] are int64. Begins with a barrier of all ranks,
        but ends without one: ``rows`` may change after the next exchange has begun.
        """
        if self._rehearses:
            return None
        tensors = self[rows], self[received], self[splits], self[received_splits]
        return self._start(lambda: self._library.all_to_all_vdev(*tensors, self._group))

    def _meet(self, met: Store) -> None:
        self._library.register(self._group, self.index, self.size, met)
        for region in self._regions:
            tensor = self._library.empty(region.shape, region.dtype, self._device)
            self._library.rendezvous(tensor, self._group)
            self._tensors.append(tensor.zero_())

    def _stand_in(self) -> None:
        for region in self._regions:
            self._tensors.append(torch.zeros(region.shape, dtype=region.dtype, device=self._device))

    def _drop(self) -> None:
        self._tensors.clear()
