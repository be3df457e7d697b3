"""The exchange by NCCL EP: a token goes once to a rank, steps smaller than the memory, FP8 as it
is, and calls that the library's own Python takes.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.kernels.reference.fp8 import NormedRows, Quantised, quantise_rows
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.nccl_ep import HandleLibrary, NcclEpGroup, NcclEpLibrary
from lockstep.parallel.nccl_ep_sizes import MemoryShape
from lockstep.parallel.slot_major import SlotShape
from support.parallel.nccl_ep_double import HandleDouble, NcclEpDouble

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)
SHAPE = TokenShape((6, 6), 2, 2048, torch.bfloat16)


def test_a_smaller_step_computes_fewer_rows() -> None:
    """Its outputs are laid into rows of the largest step, after those of each slot."""
    double = NcclEpDouble(ALONE)
    exchange, _ = _exchange(double, SHAPE)
    x, weights = torch.randn(3, 2048).bfloat16(), torch.rand(3, 2)
    for capacity in (6, 3):
        exchange.begin_step(3, capacity)
        handle = exchange.dispatch(x, torch.tensor([[0, 3], [3, 1], [-1, -1]]), weights, 0)
        received = exchange.receive(handle)
        assert double.opened[1].sent == [1, 1, 0], "once to a rank, however many of its experts"
        assert len(received.slots_M) == 4 * capacity and len(received.x_ND) == 4 * 6
        y = received.x_ND[received.rows_M]
        exchange.send_back(y, handle)
        expected = x.float() * weights.sum(1, keepdim=True) * torch.tensor([[1.0], [1.0], [0.0]])
        torch.testing.assert_close(exchange.combine(handle), expected.bfloat16())


def test_tokens_in_fp8_travel_as_they_are() -> None:
    """Tokens that the norm has quantised travel unchanged; others are quantised as experts do."""
    exchange, _ = _exchange(NcclEpDouble(ALONE), replace(SHAPE, eight=True))
    x = torch.randn(6, 2048).bfloat16()
    own = quantise_rows(x * 2)
    exchange.begin_step(6, 6)
    for normed, wanted in ((x, quantise_rows(x)), (NormedRows(x, own), own)):
        handle = exchange.dispatch(normed, torch.tensor([[2, -1]] * 6), torch.rand(6, 2), 0)
        received = exchange.receive(handle)
        found, rows = received.x_ND, received.rows_M[received.slots_M == 2]
        assert isinstance(found, Quantised) and found.scales.is_contiguous()
        assert torch.equal(found.values.view(torch.uint8)[rows].flip(0), wanted.values.view(torch.uint8))
        assert torch.equal(found.scales[rows].flip(0), wanted.scales)
        exchange.send_back(torch.zeros(len(received.rows_M), 2048).bfloat16(), handle)
        exchange.combine(handle)


@pytest.mark.parametrize("eight", [False, True])
def test_the_library_s_own_python_takes_every_call(eight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes as they are, over a double of its C functions, which reads their structures."""
    pytest.importorskip("nccl.ep", reason="nccl-extensions is not installed")
    functions = FunctionsDouble(eight)
    for name in ("nccl.ep.group", "nccl.ep.handle"):
        monkeypatch.setattr(importlib.import_module(name), "_ep_bindings", functions)
    core = importlib.import_module("nccl.core")
    monkeypatch.setattr(core, "get_unique_id", lambda: SimpleNamespace(as_bytes=b"unique"))
    monkeypatch.setattr(core, "UniqueId", SimpleNamespace(from_bytes=lambda text: text))
    met: list[Any] = []

    def init(nranks: int, rank: int, unique_id: Any) -> Any:
        met.append((nranks, rank, unique_id))
        return SimpleNamespace(ptr=11)

    monkeypatch.setattr(core, "Communicator", SimpleNamespace(init=init))
    exchange, group = _exchange(NcclEpLibrary(), replace(SHAPE, eight=eight))
    assert met == [(1, 0, b"unique")]
    exchange.begin_step(5, 5)
    x, ids = torch.randn(5, 2048).bfloat16(), torch.tensor([[0, 3]] * 5)
    handles = [exchange.dispatch(x, ids, torch.rand(5, 2), 0) for _ in range(2)]
    for handle in handles:
        received = exchange.receive(handle)
        assert isinstance(received.x_ND, Quantised) == eight
        exchange.send_back(torch.ones(len(received.rows_M), 2048).bfloat16(), handle)
    for handle in handles:
        found = exchange.combine(handle)[:, 0]
        torch.testing.assert_close(found, handle.weights_TK.sum(1).bfloat16())
    assert functions.calls == ["dispatch"] * 2 + ["combine"] * 2
    assert group.num_bytes == 2 * 6 * max(2 * (16 + 4096), (4 + 2) * (4096 + 64))


def test_memory_holds_tokens_or_outputs() -> None:
    """Twice, for the two halves: a token once from each rank, or an output for each choice."""
    few = MemoryShape(num_slots=8, top_k=2, capacity=128, hidden=7168)
    assert few.num_bytes(64) == 2 * 128 * 65 * (16 + 2 * 7168)
    many = MemoryShape(num_slots=256, top_k=8, capacity=128, hidden=7168)
    assert many.num_bytes(8) == 2 * 128 * (256 + 8) * (2 * 7168 + 4 * 56)


class FunctionsDouble:
    """The C functions of the library, for a rank alone. Handles are numbers."""

    def __init__(self, eight: bool) -> None:
        self._real = importlib.import_module("nccl._extensions.bindings.nccl_ep")
        self._eight = eight
        self._handles: dict[int, HandleDouble] = {}
        self.calls: list[str] = []

    def create_group(self, communicator: int, config: int) -> int:
        found = self._real.GroupConfig.from_ptr(config)
        assert (communicator, found.algorithm, found.num_experts) == (11, 0, 4)
        assert (found.max_dispatch_tokens_per_rank, found.max_token_bytes) == (6, 2 * 2048)
        assert not found.enable_mask
        return 22

    def create_handle(
        self, group: int, layout: int, topk_idx: int, layout_info: int, config: int, stream: int
    ) -> int:
        assert (group, layout, layout_info, config, stream) == (22, 1, 0, 0, 0)
        assert self._read(topk_idx).tolist() == [[-1, -1]]
        shape = SlotShape(4, 2, 6, 2, 2048, torch.bfloat16, self._eight)
        number = 33 + len(self._handles)
        self._handles[number] = HandleDouble(ALONE, shape)
        return number

    def update_handle(self, handle: int, topk_idx: int, layout_info: int, stream: int) -> None:
        assert layout_info == stream == 0
        self._handles[handle].update(self._read(topk_idx), stream=stream)

    def dispatch(self, handle: int, inputs: int, outputs: int, layout: int, config: int, stream: int) -> None:
        given, found = (
            self._real.DispatchInputs.from_ptr(inputs),
            self._real.DispatchOutputs.from_ptr(outputs),
        )
        info, settings = self._real.LayoutInfo.from_ptr(layout), self._real.DispatchConfig.from_ptr(config)
        assert not (given.topk_weights or found.topk_weights or found.topk_idx)
        assert not (info.src_rank_counters or info.expert_offsets or info.recv_total_counter)
        assert not (settings.send_only or settings.round_scales)
        self._handles[handle].run_dispatch(
            self._read(given.tokens),
            self._read(given.scales) if given.scales else None,
            settings.quant_recipe,
            self._read(found.tokens),
            self._read(found.scales) if found.scales else None,
            self._read(info.expert_counters),
        )
        self.calls.append("dispatch")

    def combine(self, handle: int, inputs: int, outputs: int, config: int, stream: int) -> None:
        given, found = self._real.CombineInputs.from_ptr(inputs), self._real.CombineOutputs.from_ptr(outputs)
        assert config == 0 and not given.topk_weights
        self._handles[handle].run_combine(
            self._read(given.tokens), self._read(found.tokens), self._read(found.topk_weights)
        )
        self.calls.append("combine")

    def _read(self, address: int) -> Tensor:
        """The tensor that a structure describes, in the same memory."""
        found = self._real.Tensor.from_ptr(address)
        sizes = (ctypes.c_size_t * found.ndim_).from_address(found.sizes)[:]
        known = {2: torch.int32, 4: torch.int64, 7: torch.float32, 9: torch.bfloat16, 10: torch.float8_e4m3fn}
        dtype = known[int(found.datatype)]
        num_bytes = dtype.itemsize
        for size in sizes:
            num_bytes *= size
        memory = (ctypes.c_char * num_bytes).from_address(found.data_)
        return torch.frombuffer(memory, dtype=dtype).view(*sizes)


def _exchange(library: HandleLibrary, shape: TokenShape) -> tuple[SlotMajorExchange, NcclEpGroup]:
    group = NcclEpGroup("experts", 0, 1, HashStore(), CPU, library)
    exchange = SlotMajorExchange(contiguous(1, 4, 1), group, CPU, shape)
    group.build(1)
    return exchange, group
