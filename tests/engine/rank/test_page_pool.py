"""The page pool: its size, and what it remembers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.engine.kv.budget import PoolLimits
from lockstep.engine.models.config import load_config
from lockstep.engine.rank import page_pool as kv_pool
from lockstep.engine.rank.page_pool import (
    KVPool,
    bytes_per_page,
    entries_of,
    fit_pages,
    free_bytes,
    room_for_weights,
)
from lockstep.kernels.formats.kv_format import KvFormat
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint

CPU = torch.device("cpu")


def test_an_explicit_size_is_taken_as_it_is() -> None:
    assert fit_pages(1000, 16, PoolLimits(10_999, 32), 1, CPU) == 10
    with pytest.raises(
        ValueError, match=r"kv_cache\.memory: 999 bytes hold no page of 1000 bytes \(16 tokens\)"
    ):
        fit_pages(1000, 16, PoolLimits(999, 32), 1, CPU)


def test_auto_takes_a_share_of_what_is_free_and_no_more_than_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_pool, "free_bytes", lambda device: 100_000)
    assert fit_pages(1000, 16, PoolLimits(None, 10**9), 1, CPU) == 50
    assert fit_pages(1000, 16, PoolLimits(None, 10**9), 4, CPU) == 12
    assert fit_pages(1000, 16, PoolLimits(None, 33), 4, CPU) == 3
    with pytest.raises(ValueError, match="auto: of 100000 free bytes: 12500 bytes hold no page of 20000"):
        fit_pages(20_000, 16, PoolLimits(None, 10**9), 4, CPU)


def test_free_memory_respects_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes(CPU)
    assert 0 < free < 1 << 50
    monkeypatch.setattr(kv_pool, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("8000000\n")
    assert free_bytes(CPU) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 1_000_000


@pytest.mark.parametrize(
    ("kv_format", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.uint8)]
)
@pytest.mark.parametrize("config", [qwen3_moe_config(), deepseek_v3_config()])
def test_the_cache_is_zeroed_and_costs_what_is_said(
    tmp_path: Path, config: dict[str, object], kv_format: KvFormat, dtype: torch.dtype
) -> None:
    model = load_config(write_checkpoint(tmp_path / "model", config))
    entries = entries_of(model, range(3), 1, kv_format)
    pool = KVPool(entries, 5, 8, kv_format, CPU)
    tensors = [tensor for layer in pool.cache for tensor in layer]
    assert len(pool.cache) == 3 and all(tensor.dtype == dtype and not tensor.any() for tensor in tensors)
    assert all(len(tensor) == 6 * 8 for tensor in tensors) and pool.scratch == 5  # one page more than counted
    assert (
        sum(tensor.nbytes for tensor in tensors)
        == 6 * pool.page_bytes
        == 6 * bytes_per_page(entries, 8, kv_format)
    )
    tensors[0][3] = 1
    assert tensors[0].sum() == tensors[0][3].numel()


def test_free_memory_is_within_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = free_bytes(CPU)
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    monkeypatch.setattr(kv_pool.resource, "getrlimit", lambda kind: (held + (3 << 20), -1))
    assert 0 <= free_bytes(CPU) < min(unlimited, 64 << 20)
    monkeypatch.setattr(kv_pool.resource, "getrlimit", lambda kind: (held // 2, -1))
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_weights_without_room_name_the_way_out(error: Exception) -> None:
    text = r"no room for all weights, \d+ bytes .* \(parallel\.tensor"
    with pytest.raises(ValueError, match=text), room_for_weights(CPU):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), room_for_weights(CPU):
        raise RuntimeError("a bug")
