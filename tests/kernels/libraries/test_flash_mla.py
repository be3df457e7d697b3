"""FlashMLA behind the op table, by a double (sgl-flash-mla 1.0.0) that asserts what its ops read
and computes the reference. Where the package is installed, its own Python code calls the double's
ops.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import latent_entry
from lockstep.kernels.libraries.flash_mla import FlashMlaChosen, FlashMlaRows, check_flash_mla
from lockstep.kernels.reference.attention import attend
from lockstep.kernels.reference.kv_entries import encode_latents
from lockstep.kernels.reference.mla import mla_attend
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton.attend import attend_decode
from lockstep.kernels.triton.attend_inputs import Keys, Queries, heads_of, latents_of
from lockstep.kernels.triton.column import Triton
from support.kernels.paged_rows import PagedRows, on_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the double computes on a CPU")

BF16, CPU, SCALE = torch.bfloat16, torch.device("cpu"), 0.125
LATENT, ROPE, NOPE, VALUE, TOP_K = 512, 64, 128, 128, 64
ROWS = [(70, 1), (7, 1), (15, 1), (20, 9)]  # three decode; the second is padding in a captured step


class Ops:
    """``torch.ops.flash_mla_legacy``: two ops by their schemas, on sm_90."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dense_decode_fwd(
        self,
        q: Tensor,
        kcache: Tensor,
        head_size_v: int,
        seqlens_k: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        is_causal: bool,
        tile_scheduler_metadata: Tensor | None,
        num_splits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, per_row, heads, _ = q.shape
        assert q.shape == (rows, 1, heads, 576) and per_row == 1 and head_size_v == 512
        assert kcache.shape == (len(kcache), 64, 1, 576) and not is_causal
        assert q.dtype == kcache.dtype == BF16 and q.stride(-1) == kcache.stride(-1) == 1
        assert seqlens_k.dtype == block_table.dtype == torch.int32
        assert seqlens_k.shape == (rows,) and seqlens_k.is_contiguous()
        assert block_table.shape[0] == rows and block_table.stride(-1) == 1
        assert tile_scheduler_metadata is None and num_splits is None, "planned for other lengths"
        some = [(max(length, 1) - 1, 1) for length in seqlens_k.tolist()]
        batch = PagedRows(some, rows, page_size=64).batch
        batch.pages_RP = block_table
        cache = kcache.flatten(0, 1)
        out = attend(q[:, 0], cache, cache, batch, softmax_scale)[:, None, :, :512].contiguous()
        out[seqlens_k == 0] = 0
        self.calls.append("rows")
        return out, torch.zeros(rows, heads, 1), torch.zeros(132, 8), torch.zeros(rows + 1)

    def sparse_decode_fwd(
        self,
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        topk_length: Tensor | None,
        attn_sink: Tensor | None,
        tile_scheduler_metadata: Tensor | None,
        num_splits: Tensor | None,
        extra_kv: Tensor | None,
        extra_indices: Tensor | None,
        extra_topk_length: Tensor | None,
        d_v: int,
        sm_scale: float,
        kv_format: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (tokens, _, heads, _), top_k = q.shape, indices.shape[2]
        assert topk_length is None, "the kernel of sm_90 counts no positions"
        assert attn_sink is extra_kv is extra_indices is extra_topk_length is kv_format is None
        assert tile_scheduler_metadata is None and num_splits is None, "planned for other shapes"
        assert q.shape == (tokens, 1, heads, 576) and heads in (64, 128) and d_v == 512
        assert q.dtype == BF16 and q.stride(-1) == 1
        assert kv.dtype == torch.uint8 and kv.shape[2:] == (1, 656) and kv.stride(1) == 656
        assert not kv.stride(0) % 656 and not kv.data_ptr() % 16
        assert indices.dtype == torch.int32 and indices.shape == (tokens, 1, top_k)
        assert indices.stride(-1) == 1 and not indices.stride(0) % 8 and not top_k % 64
        positions = kv.shape[0] * kv.shape[1]
        assert int(indices.min()) >= -1 and int(indices.max()) < positions
        entries = kv.reshape(positions, 656)[indices[:, 0].clamp(min=0).long()]  # [N, K, 656]
        scales = entries[..., 512:528].contiguous().view(torch.float32)
        values = entries[..., :512].contiguous().view(torch.float8_e4m3fn).float()
        latents = (values.unflatten(-1, (4, 128)) * scales[..., None]).flatten(-2)
        keys = torch.cat([latents, entries[..., 528:].contiguous().view(BF16).float()], -1)
        scores = torch.einsum("nhz,nkz->nhk", q[:, 0].float(), keys) * sm_scale
        weights = scores.masked_fill(indices < 0, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = torch.einsum("nhk,nkc->nhc", weights, latents).to(BF16)[:, None]
        self.calls.append("chosen")
        return out, torch.zeros(tokens, heads, 1), torch.zeros(132, 8), torch.zeros(tokens + 1)


@dataclass
class Plan:
    """``FlashMLASchedMeta``: empty until its one call."""

    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


class Double:
    """``flash_mla``: the functions that are called here."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def has_legacy(self) -> bool:
        return True

    def get_mla_metadata(self, *args: object, **kwargs: object) -> tuple[Plan, None]:
        assert not args and not kwargs
        return Plan(), None

    def flash_mla_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Tensor | None,
        head_dim_v: int,
        tile_scheduler_metadata: Plan,
        num_splits: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool | None = None,
        indices: Tensor | None = None,
        use_legacy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        plan = tile_scheduler_metadata
        assert use_legacy and num_splits is None and softmax_scale is not None
        assert is_fp8_kvcache == (indices is not None)
        found: tuple[Tensor, ...]
        if indices is None:
            assert block_table is not None and cache_seqlens is not None
            found = self._ops.dense_decode_fwd(
                *(q, k_cache, head_dim_v, cache_seqlens, block_table, softmax_scale, causal),
                *(plan.tile_scheduler_metadata, plan.num_splits),
            )
        else:
            found = self._ops.sparse_decode_fwd(
                *(q, k_cache, indices, None, None, plan.tile_scheduler_metadata, plan.num_splits),
                *(None, None, None, head_dim_v, softmax_scale),
            )
        plan.tile_scheduler_metadata, plan.num_splits = found[2:]
        return found[0], found[1]


def installed(monkeypatch: pytest.MonkeyPatch, ops: Ops) -> Any:
    """The package's Python code over these ops in place of its own, which need a card's driver."""
    found = importlib.util.find_spec("flash_mla")
    if found is None or found.origin is None:
        pytest.skip("sgl-flash-mla is not installed")
    loader = ModuleType("flash_mla._loader")
    vars(loader)["get_ops"] = lambda use_legacy: {True: ops}[use_legacy]
    package = ModuleType("flash_mla")
    package.__path__ = [str(Path(found.origin).parent)]
    monkeypatch.setitem(sys.modules, "flash_mla", package)
    monkeypatch.setitem(sys.modules, "flash_mla._loader", loader)
    name = "flash_mla.flash_mla_interface"
    spec = importlib.util.spec_from_file_location(name, Path(found.origin).parent / "flash_mla_interface.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["double", "installed"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Ops]:
    ops = Ops()
    return (Double(ops) if request.param == "double" else installed(monkeypatch, ops)), ops


def ops_with(library: Any, arch: int = 90) -> Triton:
    ops = ops_of("triton")
    assert isinstance(ops, Triton)
    rows = functools.partial(FlashMlaRows, library, arch)
    return ops.with_decode(rows).with_chosen(FlashMlaChosen(library, arch))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def test_decode_rows_over_bf16_pages_are_the_librarys(library: tuple[Any, Ops]) -> None:
    torch.manual_seed(0)
    rows = PagedRows(ROWS, 3, page_size=64)
    cache = random(rows.num_pages * 64, LATENT + ROPE)
    q_nope, q_rope = random(12, 4, NOPE + ROPE).split([NOPE, ROPE], -1)
    expand = (torch.randn(4, NOPE + VALUE, LATENT) * LATENT**-0.5).to(BF16)
    expected = mla_attend(q_nope, q_rope, cache, expand, rows.batch, SCALE)
    batch = on_device(rows.batch, CPU)
    batch.lengths_R[1] = 0
    got = ops_with(library[0]).mla_attend(q_nope, q_rope, cache, expand, batch, SCALE)
    assert library[1].calls == ["rows"] and got[1].isfinite().all()
    kept = [0, *range(2, 12)]
    torch.testing.assert_close(got[kept].float(), expected[kept].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize(
    ("rows", "calls"),
    [
        ([(200, 1), (7, 1), (63, 1), (70, 5)], 1),  # prompts choose as well
        ([(60, 1), (7, 1), (20, 3)], 1),  # the prompt sees all
    ],
)
def test_chosen_entries_are_read_where_they_lie(
    library: tuple[Any, Ops], heads: int, rows: list[tuple[int, int]], calls: int
) -> None:
    torch.manual_seed(1)
    paged = PagedRows(rows, sum(count == 1 for _, count in rows), page_size=32)
    num_tokens, places = int(paged.counts.sum()), paged.num_pages * 32
    cache = encode_latents(random(places, LATENT), random(places, ROPE))
    assert cache.shape[1:] == latent_entry("fp8", LATENT, ROPE)
    q_nope, q_rope = random(num_tokens, heads, NOPE), random(num_tokens, heads, ROPE)
    expand = (torch.randn(heads, NOPE + VALUE, LATENT) * LATENT**-0.5).to(BF16)
    q_index, weights, keys = random(num_tokens, 2, 16), torch.randn(num_tokens, 2), random(places, 1, 16)
    reference, ours = ops_of("reference"), ops_with(library[0])
    chosen = reference.select_positions(q_index, weights, keys, paged.batch, TOP_K)
    expected = reference.mla_attend_selected(q_nope, q_rope, cache, expand, paged.batch, SCALE, chosen)
    known = paged.batch.query_starts, paged.batch.lengths
    batch = replace(on_device(paged.batch, CPU), query_starts=known[0], lengths=known[1])
    found = ours.select_positions(q_index, weights, keys, batch, TOP_K)
    assert found is not None
    found.counts_N[1] = 0  # a row of a captured step that is padding
    got = ours.mla_attend_selected(q_nope, q_rope, cache, expand, batch, SCALE, found)
    assert library[1].calls == ["chosen"] * calls and not got[1].any()
    kept = [0, *range(2, num_tokens)]
    torch.testing.assert_close(got[kept].float(), expected[kept].float(), rtol=0.05, atol=0.05)


def test_other_shapes_are_our_own_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(2)
    ops, rows = Ops(), PagedRows([(30, 1), (7, 1)], 2, page_size=16)
    cache, expand = random(rows.num_pages * 16, 20 + 8), random(4, 12 + 8, 20)
    q_nope, q_rope, batch = random(2, 4, 12), random(2, 4, 8), on_device(rows.batch, CPU)
    ours, own = ops_with(Double(ops)), ops_of("triton")
    chosen = own.select_positions(random(2, 2, 16), torch.randn(2, 2), random(len(cache), 1, 16), batch, 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            args = (q_nope, q_rope, cache, expand, batch, SCALE)
            assert torch.equal(ours.mla_attend(*args), own.mla_attend(*args))
            assert torch.equal(
                ours.mla_attend_selected(*args, chosen), own.mla_attend_selected(*args, chosen)
            )
    assert not ops.calls
    assert caplog.text.count("our own kernel for latents of 20 + 8 dims") == 1
    assert caplog.text.count("our own kernel for chosen positions of pages that are not in fp8") == 1


def latents(heads: int = 16, dim: int = LATENT, eight: bool = False) -> tuple[Queries, Keys]:
    q, cache = random(1, heads, dim), random(64, dim + ROPE)
    if eight:
        cache = encode_latents(cache[:, :dim], cache[:, dim:])
    return Queries(q, random(1, heads, ROPE), q), latents_of(cache, dim)


def test_reasons() -> None:
    library = Double(Ops())
    rows = FlashMlaRows(library, 90, attend_decode).supports
    assert not rows(*latents(), 64, 90)
    assert "sm_100: only sm_90" in rows(*latents(), 64, 100)
    assert "each has its own" in rows(*latents(eight=True), 64, 90)
    assert "pages of 32 tokens" in rows(*latents(), 32, 90)
    assert "256 + 64 dims" in rows(*latents(dim=256), 64, 90)
    q, cache = random(1, 8, 128), heads_of(random(64, 2, 128), 128)
    assert "only latents" in rows(Queries(q, None, q), Keys(cache, None, cache), 64, 90)
    chosen = FlashMlaChosen(library, 90).supports
    eight, full, q = torch.zeros(64, 656, dtype=torch.uint8), random(64, 576), random(1, 128, ROPE)
    for arch in (90, 100, 103):
        assert not chosen(q, eight, LATENT, 2048, arch)
    assert "sm_120" in chosen(q, eight, LATENT, 2048, 120)
    assert "not in fp8" in chosen(q, full, LATENT, 2048, 90)
    assert "queries in torch.float32" in chosen(q.float(), eight, LATENT, 2048, 90)
    assert "for 32 heads" in chosen(q[:, :32], eight, LATENT, 2048, 90)
    assert "2000 chosen positions" in chosen(q[:, :64], eight, LATENT, 2000, 90)
    assert "256 + 64 dims" in chosen(q, eight, 256, 2048, 90)


def test_builds_without_its_kernels_are_refused() -> None:
    check_flash_mla(Double(Ops()))
    for other in (SimpleNamespace(), SimpleNamespace(has_legacy=lambda: False)):
        with pytest.raises(ValueError, match=r"kernels\.attention = flashmla: .*install sgl-flash-mla"):
            check_flash_mla(other)


def test_the_installed_library_has_the_doubles_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the package itself if it is installed."""
    library, double = installed(monkeypatch, Ops()), Double(Ops())
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (library.flash_mla_with_kvcache, double.flash_mla_with_kvcache),
        (library.get_mla_metadata, double.get_mla_metadata),
    ]
    for real, ours in pairs:
        parameters = inspect.signature(real).parameters
        for name, parameter in inspect.signature(ours).parameters.items():
            assert parameters[name].default == parameter.default, name
