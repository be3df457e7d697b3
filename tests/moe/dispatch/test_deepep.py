"""The exchange by DeepEP: ranks that meet before another capacity, FP8 by the kernels, and calls
that the library's own Python takes.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.kernels.reference.fp8 import Quantised, quantise_rows, widen_rows
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel import deepep
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import BufferLibrary, DeepEPGroup, DeepEPLibrary
from lockstep.parallel.deepep_sizes import BufferShape, rounded_capacity
from support.parallel.deepep_double import BufferDouble, DeepEPDouble, by_kernels, size_hint

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)
SHAPE = TokenShape((6, 6), 2, 2048, torch.bfloat16)


def test_ranks_meet_before_a_step_of_another_capacity() -> None:
    """Once a step. Capacities are rounded so that rows of a slot are a multiple of 4."""
    double = DeepEPDouble(ALONE)
    exchange = SlotMajorExchange(contiguous(2, 4, 1), _group(double, 1, CPU), CPU, SHAPE)
    exchange._group.build(1)
    for capacity in (6, 0, 3):
        exchange.begin_step(0, capacity)
        for layer in range(2):
            ids = torch.zeros(0, 2, dtype=torch.int64)
            handle = exchange.dispatch(torch.zeros(0, 2048).bfloat16(), ids, torch.zeros(0, 2), layer)
            received = exchange.receive(handle)
            assert len(received.slots_M) == 4 * max(4, -(-capacity // 4) * 4)
            exchange.send_back(torch.zeros(len(received.rows_M), 2048).bfloat16(), handle)
            assert exchange.combine(handle).shape == (0, 2048)
    assert double.opened[0].calls == ["clean", *["dispatch", "combine"] * 2] * 3
    assert [rounded_capacity(5, size) for size in (1, 2, 3, 4, 6, 72)] == [8, 6, 8, 5, 6, 5]


def test_the_kernels_quantise_tokens_in_fp8() -> None:
    """Scales come column by column, and experts get them row by row. Experts would make values that
    differ by one step at most.
    """
    group = _group(DeepEPDouble(ALONE), 1, CPU)
    exchange = SlotMajorExchange(contiguous(1, 4, 1), group, CPU, replace(SHAPE, eight=True))
    group.build(1)
    x = torch.randn(6, 2048).bfloat16()
    x[0] *= 1e-6
    exchange.begin_step(6, 6)
    received = exchange.receive(exchange.dispatch(x, torch.tensor([[2, -1]] * 6), torch.rand(6, 2), 0))
    found = received.x_ND
    assert isinstance(found, Quantised) and found.scales.is_contiguous() and found.values.is_contiguous()
    assert found.values.shape == (4 * 8, 2048) and found.scales.shape == (4 * 8, 16)
    rows = (received.slots_M == 2).nonzero().flatten()
    got = Quantised(found.values[rows].flip(0).contiguous(), found.scales[rows].flip(0))
    kernels, own = by_kernels(x), quantise_rows(x)
    assert torch.equal(got.values.view(torch.uint8), kernels.values.view(torch.uint8))
    assert torch.equal(got.scales, kernels.scales) and (got.scales[0] == 1e-4 / 448).all()
    torch.testing.assert_close(got.scales[1:], own.scales[1:], rtol=2e-7, atol=0)
    torch.testing.assert_close(widen_rows(got)[1:], widen_rows(own)[1:], rtol=2**-3, atol=0)


def test_cards_on_pcie_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIE")
    with pytest.raises(ValueError, match="deepep: NVIDIA H100 PCIE: needs GPUs with NVLink"):
        DeepEPLibrary()


@pytest.mark.parametrize("eight", [False, True])
def test_the_library_s_own_python_takes_every_call(eight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ``Buffer`` as it is, over a double of its extension, which needs a GPU."""
    library = _library_over_double(monkeypatch)
    group = _group(library, 1, CPU)
    shape = TokenShape((6, 4), 2, 2048, torch.bfloat16, eight)
    exchange = SlotMajorExchange(contiguous(1, 4, 1), group, CPU, shape)
    group.build(1)
    exchange.begin_step(5, 6)
    x, ids = torch.randn(5, 2048).bfloat16(), torch.tensor([[0, 3]] * 5)
    handle = exchange.dispatch(x, ids, torch.rand(5, 2), 0)
    received = exchange.receive(handle)
    assert isinstance(received.x_ND, Quantised) == eight
    exchange.send_back(torch.ones(len(received.rows_M), 2048).bfloat16(), handle)
    torch.testing.assert_close(exchange.combine(handle)[:, 0], handle.weights_TK.sum(1).bfloat16())
    assert group.num_bytes == pytest.approx(size_hint(8, 2048, 1, 4), rel=0.01)


def test_the_size_of_the_memory_is_the_library_s() -> None:
    for capacity, hidden, size, slots in ((128, 7168, 72, 288), (5, 2048, 2, 8), (384, 4096, 8, 128)):
        found = BufferShape(slots, capacity, hidden).num_bytes(size)
        assert found == pytest.approx(
            size_hint(rounded_capacity(capacity, size), hidden, size, slots), rel=1e-3
        )


class RuntimeDouble:
    """The extension's ``Buffer``, with the positional arguments that its Python hands on."""

    def __init__(
        self,
        rank: int,
        size: int,
        nvl: int,
        rdma: int,
        low: bool,
        explicitly: bool,
        shrink: bool,
        mnnvl: bool,
    ) -> None:
        assert (rank, size, nvl, low, explicitly, shrink, mnnvl) == (0, 1, 0, True, True, False, False)
        self._buffer = BufferDouble(ALONE, rdma, 4)
        self.clean_low_latency_buffer = self._buffer.clean_low_latency_buffer

    def get_local_device_id(self) -> int:
        return 3

    def get_local_ipc_handle(self) -> bytearray:
        return bytearray(64)

    def get_num_rdma_ranks(self) -> int:
        return 1

    def get_local_nvshmem_unique_id(self) -> bytearray:
        return bytearray(b"id of the first rank")

    def sync(self, device_ids: Any, handles: Any, root_unique_id: Any) -> None:
        assert list(device_ids) == [3] and root_unique_id == b"id of the first rank"
        assert all(isinstance(each, bytearray) for each in (*handles, root_unique_id)), (
            "pybind11 takes no other"
        )

    def is_available(self) -> bool:
        return True

    def low_latency_dispatch(self, x: Tensor, topk_idx: Tensor, *rest: Any) -> tuple[Any, ...]:
        numbers = [each for each in rest if type(each) is int]
        flags = [each for each in rest if type(each) is bool]
        assert all(each is None for each in rest[: len(rest) - 2 - len(flags)]), "statistics"
        most, slots = numbers
        assert not any(flags[1:]), "no rounded scales, no events, no hooks"
        tokens, counts, handle, _, _ = self._buffer.low_latency_dispatch(
            x, topk_idx, most, slots, use_fp8=flags[0]
        )
        values, scales = tokens if isinstance(tokens, tuple) else (tokens, None)
        return values, scales, counts, handle[0], handle[1], None, None

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, weights: Tensor, sources: Tensor, ranges: Tensor, *rest: Any
    ) -> tuple[Any, ...]:
        statistics, most, slots, logfmt, copied, later, hook, out, *overlap = rest
        assert statistics is None and not any((logfmt, copied, later, hook, *overlap))
        handle = sources, ranges, most, x.shape[2], slots
        return self._buffer.low_latency_combine(x, topk_idx, weights, handle, out=out)


def _library_over_double(monkeypatch: pytest.MonkeyPatch) -> DeepEPLibrary:
    """The installed package without its first lines, which seek a GPU, over ``RuntimeDouble``."""
    spec = importlib.util.find_spec("deep_ep")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("sgl-deep-ep is not installed")
    folder = Path(spec.submodule_search_locations[0])
    extension = types.ModuleType("deep_ep._C")
    double: dict[str, Any] = {
        "Buffer": RuntimeDouble,
        "Config": object,
        "EventHandle": object,
        "get_low_latency_rdma_size_hint": size_hint,
    }
    vars(extension).update(double)
    packages = {"deep_ep": folder, "deep_ep.buffers": folder / "buffers", "deep_ep.utils": folder / "utils"}
    for name, path in packages.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "deep_ep._C", extension)
    for name in ("deep_ep.utils.comm", "deep_ep.utils.event", "deep_ep.utils.envs", "deep_ep.buffers.legacy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for name in ("DISABLE_P2P", "IB_ENABLE_IBGDA", "IBGDA_NUM_RC_PER_PE", "QP_DEPTH", "MAX_TEAMS"):
        monkeypatch.setenv(f"NVSHMEM_{name}", "1024")
    for name in ("DISABLE_NVLS", "CUMEM_GRANULARITY", "DISABLE_MNNVL"):
        monkeypatch.setenv(f"NVSHMEM_{name}", "")
    legacy = importlib.import_module("deep_ep.buffers.legacy")
    package = sys.modules["deep_ep"]
    vars(package).update(Buffer=legacy.Buffer, topk_idx_t=torch.int64)
    for name in ("low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer"):
        assert set(inspect.signature(getattr(deepep.LowLatencyBuffer, name)).parameters) <= set(
            inspect.signature(getattr(legacy.Buffer, name)).parameters
        ), name
    return DeepEPLibrary()


def _group(library: BufferLibrary, size: int, device: torch.device) -> DeepEPGroup:
    return DeepEPGroup("experts", 0, size, HashStore(), device, library)
