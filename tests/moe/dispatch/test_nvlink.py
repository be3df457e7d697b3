"""The exchange by FlashInfer: stale rows are no pairs, nothing is read by the host, and the
library's own signatures take every call.
"""

from __future__ import annotations

import importlib
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.kernels.reference.experts import weighted_sum
from lockstep.kernels.reference.fp8 import quantise_rows
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch import nvlink
from lockstep.moe.dispatch.nvlink import NvlinkExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.nvlink import (
    FlashInferLibrary,
    NvlinkGroup,
    Rounds,
    RoundShape,
    RoundsLibrary,
)
from lockstep.parallel.store_ranks import StoreRanks
from support.moe.rounds_without_memory import exchange_without_memory
from support.parallel.nvlink_double import NvlinkDouble, RoundsDouble

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)
SHAPE = TokenShape((6, 6), 2, 8, torch.float32)


def test_padding_and_stale_rows_are_no_pairs() -> None:
    """Half of the rows of a second round are padding; the memory is full of NaN. One token has one
    expert, and outputs of no pair mean nothing.
    """
    group = _group(NvlinkDouble(ALONE), 1, CPU)
    exchange = NvlinkExchange(contiguous(1, 4, 1), group, CPU, SHAPE)
    assert (group.recovery, group.transport) == ("process restart", ""), "nobody to lose yet"
    assert _group(NvlinkDouble(ALONE), 2, CPU).transport == "FlashInfer over NVLink"
    group.build(1)
    x, ids, weights = torch.randn(6, 8), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    ids[0, 1] = -1
    exchange.begin_step(6, 6)
    for real in (6, 3):
        ids[real:] = -1
        handle = exchange.dispatch(x, ids, weights, 0)
        received = exchange.receive(handle)
        assert (received.slots_M >= 0).sum() == 2 * real - 1 and len(received.rows_M) == 12
        y = torch.where((received.slots_M >= 0)[:, None], received.x_ND[received.rows_M], 7)
        exchange.send_back(y, handle)
        combined = exchange.combine(handle)
        scale = torch.where(ids >= 0, weights, 0).sum(1, keepdim=True)
        torch.testing.assert_close(combined, x * scale)
        assert not combined[real:].any(), "padding gets zeros"


def test_a_token_goes_once_to_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its experts that has; ``ids`` name slots of all ranks."""
    double = NvlinkDouble(Collectives("experts", 0, 4, HashStore(), 1.0, CPU))
    monkeypatch.setattr(StoreRanks, "allgather", lambda self, data: (data,) * self.Get_size())
    monkeypatch.setattr(RoundsDouble, "_gather", lambda self, rows, most, fill: _to_all(rows, most, fill))
    group = _group(double, 4, CPU)
    exchange = NvlinkExchange(contiguous(1, 8, 4), group, CPU, replace(SHAPE, top_k=3))
    group.build(1)
    exchange.begin_step(3, 4)
    ids = torch.tensor([[0, 1, 7], [2, 3, 6], [-1, -1, -1]])  # two experts a rank
    received = exchange.receive(exchange.dispatch(torch.randn(3, 8), ids, torch.rand(3, 3), 0))
    assert double.opened[0].sent == [2, 2, 0]
    slots = received.slots_M.view(16, 2)
    assert slots[::4].tolist() == [[1, 0]] * 4 and (slots.view(4, 4, 2)[:, 1:] == -1).all()


def _to_all(rows: Tensor, most: int, fill: int) -> Tensor:
    """Four ranks with the same tokens."""
    padded = torch.full((most, rows.shape[1]), fill, dtype=rows.dtype)
    padded[: len(rows)] = rows
    return padded.expand(4, -1, -1)


@pytest.mark.parametrize(("eight", "rows"), [(False, 64), (True, 1024), (True, 0)])
def test_no_value_reaches_the_host(eight: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no values: what the host reads raises. 72 ranks rehearse
    DeepSeek-V3, then meet.
    """

    class TorchOps:
        weighted_sum, quantise_rows = staticmethod(weighted_sum), staticmethod(quantise_rows)

    monkeypatch.setattr(nvlink, "ops_of", lambda column: TorchOps())
    meta = torch.device("meta")
    group = _group(NvlinkDouble(ALONE), 72, meta)
    placement, shape = contiguous(58, 256, 72), TokenShape((1024,), 8, 7168, torch.bfloat16, eight)
    exchange = NvlinkExchange(placement, group, meta, shape)
    group.rehearse()
    room = 72 * 1024  # a rank has four slots
    exchange_without_memory(exchange, rows, 1024, eight, (room, 4 * room))
    group.destroy()


@pytest.mark.parametrize("eight", [False, True])
def test_the_installed_library_takes_every_call(eight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own configurations, checks and signatures, in front of the double."""
    moe_ep = pytest.importorskip("flashinfer.moe_ep", reason="flashinfer-python is not installed")
    known = importlib.import_module("flashinfer.moe_ep.core.comm.communication")._COMMUNICATION_REGISTRY
    real, double = moe_ep.NVLinkOneSidedAlltoAll, NvlinkDouble(ALONE)

    class Watched(FlashInferLibrary):
        def open(self, shape: RoundShape, ranks: StoreRanks, device: torch.device) -> Rounds:
            rounds = double.open(shape, ranks, device)

            def create(*args: Any, **options: Any) -> Any:
                found = inspect.signature(real).bind(*args, **options).arguments
                bootstrap, params = found["bootstrap"], found["params"]
                assert (bootstrap.world_size, bootstrap.rank, bootstrap.device) == (1, 0, 3)
                assert isinstance(found["config"], moe_ep.NVLinkOneSidedConfig)
                assert found["config"].comm_backend is ranks
                sent = 256 + 4 * 2 if eight else 2 * 256
                assert params.dispatch_bytes_per_token == sent
                assert shape.num_bytes(1) == shape.capacity * (sent + 2 * 2 * 4 + 2 * 256)
                instance = mock.create_autospec(real, instance=True)
                for name in ("dispatch", "combine", "get_combine_input_buffer"):
                    getattr(instance, name).side_effect = getattr(rounds, name)
                return instance

            monkeypatch.setitem(known, "nvlink_one_sided", create)
            return super().open(shape, ranks, torch.device("cuda:3"))

    group = _group(Watched(), 1, CPU)
    exchange = NvlinkExchange(
        contiguous(1, 4, 1), group, CPU, TokenShape((6, 4), 2, 256, torch.bfloat16, eight)
    )
    group.build(1)
    exchange.begin_step(5, 6)
    x, ids = torch.randn(5, 256).to(torch.bfloat16), torch.tensor([[0, 3]] * 5)
    handle = exchange.dispatch(x, ids, torch.rand(5, 2), 0)
    received = exchange.receive(handle)
    exchange.send_back(torch.ones(len(received.rows_M), 256, dtype=torch.bfloat16), handle)
    torch.testing.assert_close(exchange.combine(handle)[:, 0], handle.weights_TK.sum(1).to(torch.bfloat16))


def test_the_installed_library_shares_files_over_the_store(tmp_path: Path) -> None:
    """Ranks of one host hand each other descriptors of their memory, and agree to refuse a host
    without NVLink.
    """
    files = pytest.importorskip("flashinfer.comm.fd_exchange", reason="flashinfer-python is not installed")
    common = importlib.import_module("flashinfer.moe_ep.backends.split.comm.nvlink_common")
    bootstrap, store = importlib.import_module("flashinfer.moe_ep").BootstrapConfig, HashStore()

    def share(index: int) -> list[str]:
        ranks, own = StoreRanks(store, index, 2), tmp_path / str(index)
        own.write_text(f"of rank {index}")
        with own.open() as file:
            found = files.exchange_fds(ranks, os.dup(file.fileno()))
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=r"not supported on EP ranks \[0, 1\]"):
                common.mnnvl_mapping_and_config(bootstrap(world_size=2, rank=index), ranks)
        return sorted(os.pread(each, 99, 0).decode() for each in found)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(share, range(2))) == [["of rank 0", "of rank 1"]] * 2


def _group(library: RoundsLibrary, size: int, device: torch.device) -> NvlinkGroup:
    return NvlinkGroup("experts", 0, size, HashStore(), device, library)
