"""FlashAttention-4 behind the op table, by a double with its signature (4.0.0b36) that asserts what
the library reads and computes the reference.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import head_entry
from lockstep.kernels.libraries.flash_attn_4 import FlashAttention4
from lockstep.kernels.reference.attention import PLAIN_RULE, AttentionRule, attend
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton.attend import attend_extend
from lockstep.kernels.triton.attend_inputs import Keys, Queries, heads_of
from lockstep.kernels.triton.column import Triton
from support.kernels.paged_rows import PagedRows, on_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the double computes on a CPU")

BF16, CPU, SCALE = torch.bfloat16, torch.device("cpu"), 0.125
ROWS = [(40, 1), (7, 1), (0, 33), (20, 9)]
Window = tuple[int | None, int | None]


class Double:
    """``flash_attn.cute``: attention of rows of several tokens over pages."""

    def __init__(self) -> None:
        self.calls = 0

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqused_k: Tensor | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (None, None),
        learnable_sink: Tensor | None = None,
        num_splits: int = 1,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert qv is None and cu_seqlens_k is None and max_seqlen_q is None and max_seqlen_k is None
        assert num_splits == 1 and not return_lse and causal and softmax_scale is not None
        assert cu_seqlens_q is not None and seqused_k is not None and page_table is not None
        (tokens, heads, dim), (_pages, page_size, kv_heads, _), rows = q.shape, k.shape, len(seqused_k)
        assert q.dtype == k.dtype == v.dtype == BF16 and k.shape == v.shape and k.shape[3] == dim
        assert q.stride(2) == 1 and k.is_contiguous() and v.is_contiguous(), "others are copied whole"
        assert not heads % kv_heads and not dim % 8 and page_table.shape[0] == rows
        assert cu_seqlens_q.dtype == seqused_k.dtype == page_table.dtype == torch.int32
        assert cu_seqlens_q.shape == (rows + 1,) and page_table.stride(1) == 1
        assert cu_seqlens_q.stride() == seqused_k.stride() == (1,)
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0 and starts[-1] == tokens
        assert learnable_sink is None or (learnable_sink.shape == (heads,) and learnable_sink.is_contiguous())
        left, right = window_size
        assert right is None, "causal: no key after the query"
        counts = [end - begin for begin, end in itertools.pairwise(starts)]
        some = [(length - count, count) for length, count in zip(seqused_k.tolist(), counts, strict=True)]
        batch = PagedRows(some, 0, page_size=page_size).batch
        batch.pages_RP = page_table
        rule = AttentionRule(0 if left is None else left + 1, learnable_sink)
        self.calls += 1
        return attend(q, k.flatten(0, 1), v.flatten(0, 1), batch, softmax_scale, rule), None


def ops_with(double: Double, arch: int = 90) -> Triton:
    ops = ops_of("triton")
    assert isinstance(ops, Triton)
    return ops.with_extend(functools.partial(FlashAttention4, double, arch))


@pytest.mark.parametrize(("arch", "rule"), [(90, "plain"), (100, "window"), (103, "sinks")])
def test_prompts_over_bf16_pages_are_the_librarys(arch: int, rule: str) -> None:
    torch.manual_seed(0)
    rows, double = PagedRows(ROWS, 2, page_size=16), Double()
    caches = [torch.randn(rows.num_pages * 16, 2, 64).to(BF16) for _ in range(2)]
    q = torch.randn(44, 10, 64).to(BF16)[:, 1:-1]  # some heads of a wider tensor
    rules = {
        "plain": PLAIN_RULE,
        "window": AttentionRule(11),
        "sinks": AttentionRule(0, torch.linspace(-2, 2, 8)),
    }
    expected = attend(q, *caches, rows.batch, SCALE, rules[rule])
    got = ops_with(double, arch).attend(q, *caches, on_device(rows.batch, CPU), SCALE, rules[rule])
    assert double.calls == 1
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)


def test_few_tokens_and_steps_without_prompts_are_our_own(caplog: pytest.LogCaptureFixture) -> None:
    double = Double()
    ours = ops_with(double)
    caplog.set_level(logging.WARNING)
    for some, decode in (([(3, 1), (5, 1)], 2), ([(3, 1), (5, 32)], 1)):
        rows = PagedRows(some, decode, page_size=16)
        caches = [torch.randn(rows.num_pages * 16, 2, 64).to(BF16) for _ in range(2)]
        q, batch = torch.randn(int(rows.counts.sum()), 8, 64).to(BF16), on_device(rows.batch, CPU)
        assert torch.equal(
            ours.attend(q, *caches, batch, SCALE), ops_of("triton").attend(q, *caches, batch, SCALE)
        )
        assert caplog.text.count("our own kernel for steps with prompts of 32 tokens or fewer") == 2 - decode
    assert not double.calls


def test_other_pages_are_our_own_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows, double = PagedRows(ROWS, 2, page_size=16), Double()
    cache = torch.zeros(rows.num_pages * 16, *head_entry("fp8", 2, 64), dtype=torch.uint8)
    q, batch = torch.randn(44, 8, 64).to(BF16), on_device(rows.batch, CPU)
    ops = ops_with(double)
    with caplog.at_level(logging.WARNING):
        got = ops.attend(q, cache, cache, batch, SCALE)
        ops.attend(q, cache, cache, batch, SCALE)
    assert torch.equal(got, ops_of("triton").attend(q, cache, cache, batch, SCALE)) and not double.calls
    assert caplog.text.count("kernels.prompt_attention = flash_attn_4: our own kernel for pages in fp8") == 1


def heads(dim: int = 128, dtype: torch.dtype = BF16, eight: bool = False) -> tuple[Queries, Keys]:
    q, cache = torch.empty(33, 8, dim, dtype=dtype), torch.empty(64, 2, dim, dtype=dtype)
    if eight:
        cache = torch.zeros(64, *head_entry("fp8", 2, dim), dtype=torch.uint8)
    return Queries(q, None, q), Keys(heads_of(cache, dim), None, heads_of(cache, dim))


def test_reasons() -> None:
    reason = FlashAttention4(Double(), 90, attend_extend).supports
    for arch in (90, 100, 103):
        assert not reason(*heads(), 256, arch)
    for arch in (80, 120):
        assert f"sm_{arch}" in reason(*heads(), 1, arch)
    assert "not bfloat16" in reason(*heads(dtype=torch.float16), 1, 90)
    assert "each entry has its own" in reason(*heads(eight=True), 1, 90)
    assert not reason(*heads(256), 1, 90)
    assert "heads of 256 dims on sm_100" in reason(*heads(256), 1, 100)
    assert "more than 256 prompts" in reason(*heads(), 257, 90)
    assert "heads of 80 dims" in reason(*heads(80), 1, 90)


def test_the_installed_library_has_the_doubles_parameters() -> None:
    """Looks at FlashAttention itself if it is installed."""
    library, double = pytest.importorskip("flash_attn.cute"), Double()
    parameters = inspect.signature(library.flash_attn_varlen_func).parameters
    for name, parameter in inspect.signature(double.flash_attn_varlen_func).parameters.items():
        assert parameters[name].default == parameter.default, name
