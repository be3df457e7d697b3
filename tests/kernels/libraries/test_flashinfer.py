"""FlashInfer behind the op table, by a double with its signatures (0.7.4) that asserts what the
library reads and computes the reference.
"""

from __future__ import annotations

import functools
import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import head_entry
from lockstep.kernels.libraries.flashinfer import FlashInfer
from lockstep.kernels.reference.attention import PLAIN_RULE, AttentionRule, attend
from lockstep.kernels.reference.kv_entries import write_heads
from lockstep.kernels.reference.mla import mla_attend
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton.attend import attend_decode
from lockstep.kernels.triton.attend_inputs import Keys, Queries, heads_of, latents_of
from lockstep.kernels.triton.column import Triton
from support.kernels.paged_rows import PagedRows, on_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the double computes on a CPU")

BF16, CPU, SCALE = torch.bfloat16, torch.device("cpu"), 0.125
ROWS = [(40, 1), (7, 1), (15, 1), (20, 9)]  # three decode; the second is padding in a captured step


class Double:
    """``flashinfer`` on a card of a kind: its two entry points without a plan on the host."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache=self._heads)
        self.mla = SimpleNamespace(trtllm_batch_decode_with_kv_cache_mla=self._latents)

    def _heads(
        self,
        query: Tensor,
        kv_cache: Tensor | tuple[Tensor, Tensor],
        workspace_buffer: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        bmm1_scale: float | Tensor = 1.0,
        bmm2_scale: float | Tensor = 1.0,
        window_left: int = -1,
        out: Tensor | None = None,
        sinks: Tensor | None = None,
        kv_layout: str = "HND",
    ) -> Tensor:
        assert isinstance(kv_cache, tuple) and kv_layout == "NHD" and bmm2_scale == 1.0
        (rows, heads, dim), (num_pages, page_size, kv_heads, _) = query.shape, kv_cache[0].shape
        assert query.dtype == BF16 and query.is_contiguous(), "XQA reads no strides of queries"
        assert heads % kv_heads == 0 and dim in (64, 128, 256) and page_size in (16, 32, 64, 128)
        for cache in kv_cache:
            assert cache.shape == (num_pages, page_size, kv_heads, dim) and cache.dtype == BF16
            assert cache.is_contiguous()
        assert out is not None and out.shape == query.shape and out.dtype == BF16 and out.is_contiguous()
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (heads,))
        batch = self._rows_of(workspace_buffer, block_tables, seq_lens, max_seq_len, rows, page_size)
        assert isinstance(bmm1_scale, float)
        rule = AttentionRule(window_left + 1, sinks)
        caches = (cache.flatten(0, 1) for cache in kv_cache)
        out.copy_(attend(query, *caches, batch, bmm1_scale, rule))
        self.calls.append("heads")
        return out

    def _latents(
        self,
        query: Tensor,
        kv_cache: Tensor,
        workspace_buffer: Tensor,
        qk_nope_head_dim: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        sparse_mla_top_k: int = 0,
        out: Tensor | None = None,
        bmm1_scale: float | Tensor = 1.0,
        bmm2_scale: float | Tensor = 1.0,
        backend: str = "auto",
    ) -> Tensor:
        assert (qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim) == (128, 512, 64)
        assert backend == "trtllm-gen" and bmm2_scale == 1.0 and not sparse_mla_top_k and out is None
        (rows, per_row, heads, _), (_, page_size, _) = query.shape, kv_cache.shape
        assert query.shape == (rows, 1, heads, 576) and kv_cache.shape[2] == 576 and per_row == 1
        assert query.dtype == kv_cache.dtype == BF16 and query.is_contiguous() and kv_cache.is_contiguous()
        assert page_size in (32, 64)
        batch = self._rows_of(workspace_buffer, block_tables, seq_lens, max_seq_len, rows, page_size)
        assert isinstance(bmm1_scale, float)
        cache = kv_cache.flatten(0, 1)[:, None]
        found = attend(query[:, 0], cache, cache, batch, bmm1_scale)[:, None, :, :512].contiguous()
        self.calls.append("latents")
        return found

    def _rows_of(
        self, workspace: Tensor, tables: Tensor, lengths: Tensor, most: int, rows: int, page_size: int
    ) -> Any:
        assert workspace.dtype == torch.uint8 and workspace.numel() == 128 << 20
        assert tables.dtype == lengths.dtype == torch.int32 and lengths.shape == (rows,)
        assert tables.shape[0] == rows and tables.is_contiguous() and lengths.is_contiguous()
        assert most == tables.shape[1] * page_size and 1 <= int(lengths.min()) <= int(lengths.max()) <= most
        batch = PagedRows([(length - 1, 1) for length in lengths.tolist()], rows, page_size=page_size).batch
        batch.pages_RP = tables
        return batch


def ops_with(double: Double, arch: int) -> Triton:
    ops = ops_of("triton")
    assert isinstance(ops, Triton)
    return ops.with_decode(functools.partial(FlashInfer, double, arch, CPU))


@pytest.mark.parametrize(("arch", "rule"), [(90, "plain"), (100, "window"), (120, "sinks")])
def test_decode_rows_over_bf16_pages_are_the_librarys(arch: int, rule: str) -> None:
    torch.manual_seed(0)
    rows, double = PagedRows(ROWS, 3, page_size=16), Double()
    caches = [torch.randn(rows.num_pages * 16, 2, 64).to(BF16) for _ in range(2)]
    q = torch.randn(12, 10, 64).to(BF16)[:, 1:-1]  # some heads of a wider tensor
    rules = {
        "plain": PLAIN_RULE,
        "window": AttentionRule(11),
        "sinks": AttentionRule(0, torch.linspace(-2, 2, 8)),
    }
    expected = attend(q, *caches, rows.batch, SCALE, rules[rule])
    batch = on_device(rows.batch, CPU)
    batch.lengths_R[1] = 0
    got = ops_with(double, arch).attend(q, *caches, batch, SCALE, rules[rule])
    assert double.calls == ["heads"] and got[1].isfinite().all()
    kept = [0, *range(2, 12)]
    torch.testing.assert_close(got[kept].float(), expected[kept].float(), rtol=0.02, atol=0.02)


def test_latents_are_the_librarys_on_sm_100() -> None:
    torch.manual_seed(1)
    rows, double = PagedRows(ROWS, 3, page_size=32), Double()
    cache = torch.randn(rows.num_pages * 32, 576).to(BF16)
    q_nope, q_rope = torch.randn(12, 4, 192).to(BF16).split([128, 64], -1)
    expand = (torch.randn(4, 256, 512) * 512**-0.5).to(BF16)
    expected = mla_attend(q_nope, q_rope, cache, expand, rows.batch, SCALE)
    batch = on_device(rows.batch, CPU)
    got = ops_with(double, 100).mla_attend(q_nope, q_rope, cache, expand, batch, SCALE)
    assert double.calls == ["latents"]
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05)


def test_other_pages_are_our_own_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows, double = PagedRows(ROWS, 3, page_size=16), Double()
    cache = torch.zeros(rows.num_pages * 16, *head_entry("fp8", 2, 64), dtype=torch.uint8)
    for row in range(len(ROWS)):
        write_heads(cache, rows.places(row), torch.randn(len(rows.places(row)), 2, 64))
    q, batch = torch.randn(12, 8, 64).to(BF16), on_device(rows.batch, CPU)
    ops = ops_with(double, 90)
    with caplog.at_level(logging.WARNING):
        got = ops.attend(q, cache, cache, batch, SCALE)
        ops.attend(q, cache, cache, batch, SCALE)
    assert torch.equal(got, ops_of("triton").attend(q, cache, cache, batch, SCALE)) and not double.calls
    assert caplog.text.count("our own kernel for pages in fp8: it takes one scale") == 1


def heads(dim: int = 128, dtype: torch.dtype = BF16) -> tuple[Queries, Keys]:
    q, cache = torch.empty(1, 8, dim, dtype=dtype), torch.empty(64, 2, dim, dtype=dtype)
    return Queries(q, None, q), Keys(heads_of(cache, dim), None, heads_of(cache, dim))


def latents(dim: int = 512, heads: int = 8) -> tuple[Queries, Keys]:
    q, cache = torch.empty(1, heads, dim, dtype=BF16), torch.empty(64, dim + 64, dtype=BF16)
    return Queries(q, torch.empty(1, heads, 64, dtype=BF16), q), latents_of(cache, dim)


def test_reasons() -> None:
    reason = FlashInfer(Double(), 90, CPU, attend_decode).supports
    for arch in (90, 100, 103, 120):
        assert not reason(*heads(), 64, arch)
    assert "sm_80" in reason(*heads(), 64, 80)
    assert "not bfloat16" in reason(*heads(dtype=torch.float16), 64, 90)
    eight = torch.zeros(64, *head_entry("fp8", 2, 128), dtype=torch.uint8)
    assert "each entry has its own" in reason(
        heads()[0], Keys(heads_of(eight, 128), None, heads_of(eight, 128)), 64, 90
    )
    assert "pages of 8 tokens" in reason(*heads(), 8, 90)
    assert "heads of 96 dims" in reason(*heads(96), 64, 90)
    assert not reason(*latents(), 64, 100)
    assert "only on sm_100" in reason(*latents(), 64, 90)
    assert "pages of 128 tokens" in reason(*latents(), 128, 100)
    assert "latents for 96 heads" in reason(*latents(heads=96), 64, 100)
    assert "latents of 256 + 64 dims" in reason(*latents(256), 64, 100)


def test_the_installed_library_has_the_doubles_parameters() -> None:
    """Looks at FlashInfer itself if it is installed."""
    library, double = pytest.importorskip("flashinfer"), Double()
    pairs = (
        (library.decode.trtllm_batch_decode_with_kv_cache, double._heads),
        (library.mla.trtllm_batch_decode_with_kv_cache_mla, double._latents),
    )
    for real, ours in pairs:
        parameters = inspect.signature(real).parameters
        for name, parameter in inspect.signature(ours).parameters.items():
            assert parameters[name].default == parameter.default, name
