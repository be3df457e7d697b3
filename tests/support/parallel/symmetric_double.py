"""A double of torch symmetric memory over gloo: asserts of a call what NVSHMEM's kernels need, and
computes its definition on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from lockstep.parallel.collectives import Collectives

THREADS = 512  # of a block of the exchange
CHUNK_BYTES = 16 * THREADS * 8  # that a block copies before another is used


class SymmetricDouble:
    """Symmetric memory of the ranks of ``collectives``. ``garbage`` fills what an exchange leaves
    untouched of the region it writes to.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._groups: dict[str, int] = {}
        self._known: dict[int, str] = {}  # groups of tensors, by address
        self.calls = 0

    def register(self, group: str, index: int, size: int, store: Store) -> None:
        assert (index, size) == (self._collectives.index, self._collectives.size)
        assert group not in self._groups, f"{group}: registered twice"
        self._groups[group] = size

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        assert self._groups, "NVSHMEM starts with the first allocation and needs its group"
        return torch.empty(shape, dtype=dtype, device=device)

    def rendezvous(self, tensor: Tensor, group: str) -> None:
        """Every rank has the same shape and dtype."""
        told = torch.tensor([[tensor.nbytes, *tensor.shape[:1], tensor.itemsize]])
        gathered = self._gather(told)
        assert (gathered == gathered[0]).all(), f"regions differ between ranks: {gathered.tolist()}"
        self._known[tensor.data_ptr()] = group

    def all_to_all_vdev(
        self, rows: Tensor, received: Tensor, splits_W: Tensor, received_2W: Tensor, group: str
    ) -> None:
        self.calls += 1
        size = self._groups[group]
        for tensor in (rows, received, splits_W, received_2W):
            assert self._known.get(tensor.data_ptr()) == group, "not symmetric, or a view that starts inside"
            assert tensor.is_contiguous() and tensor.device == rows.device
        assert splits_W.dtype == received_2W.dtype == torch.int64
        assert splits_W.shape == (size,) and received_2W.shape == (2, size)
        assert rows.dtype == received.dtype and rows.stride(0) == received.stride(0)
        row_bytes = rows.stride(0) * rows.itemsize
        for most in (64, 16):
            chunks = math.ceil(rows.nbytes / CHUNK_BYTES)
            blocks = min(most, math.ceil(chunks / size) * size)
            assert row_bytes % (16 * max(1, blocks // size)) == 0, f"{row_bytes} bytes, {blocks} blocks"
        send = splits_W.tolist()
        assert min(send) >= 0 and sum(send) <= len(rows), f"{send} of {len(rows)} rows"
        arriving = self._collectives.wait(self._collectives.all_to_all(splits_W, None, None, "splits"))
        assert int(arriving.sum()) <= len(received), f"{arriving.tolist()} into {len(received)} rows"
        received_2W[0] = arriving
        received_2W[1] = arriving.cumsum(0) - arriving
        sent = self._collectives.all_to_all(rows[: sum(send)], send, arriving.tolist(), "rows")
        found = self._collectives.wait(sent)
        received[: len(found)] = found

    def _gather(self, rows: Tensor) -> Tensor:
        return self._collectives.wait(self._collectives.all_gather(rows, "regions"))


class AbsentLibrary:
    """Symmetric memory of ranks that are not there: allocates, and moves nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def register(self, group: str, index: int, size: int, store: Store) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def rendezvous(self, tensor: Tensor, group: str) -> None:
        pass

    def all_to_all_vdev(
        self, rows: Tensor, received: Tensor, splits_W: Tensor, received_2W: Tensor, group: str
    ) -> None:
        assert rows.is_contiguous() and received.is_contiguous() and rows.stride(0) == received.stride(0)
        self.calls += 1
