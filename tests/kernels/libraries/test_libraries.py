"""Libraries that a recipe names, in the op table."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lockstep.kernels.libraries.deep_gemm import DeepGemm
from lockstep.kernels.libraries.flash_attn_4 import FlashAttention4
from lockstep.kernels.libraries.flash_mla import FlashMlaChosen, FlashMlaRows
from lockstep.kernels.libraries.flashinfer import FlashInfer
from lockstep.kernels.reference.paged import PagedBatch, Selection
from lockstep.kernels.table import ops_of, with_libraries
from lockstep.kernels.triton.column import Triton

BF16, CARD = torch.bfloat16, torch.device("cuda:0")


@pytest.mark.parametrize(
    ("op", "name", "module", "package"),
    [
        ("linear_fp8", "deep_gemm", "deep_gemm", "sgl-deep-gemm"),
        ("attention", "flashinfer", "flashinfer", "flashinfer-python"),
        ("attention", "flashmla", "flash_mla", "sgl-flash-mla"),
        ("prompt_attention", "flash_attn_4", "flash_attn.cute", "flash-attn-4"),
    ],
)
def test_a_library_that_is_not_there_or_not_for_the_device_is_refused(
    op: str, name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = ops_of("reference")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{op} = {name}: .*install {package} or use own"):
        with_libraries(ops, {op: name}, CARD)
    with pytest.raises(ValueError, match="serves on GPUs, not on cpu"):
        with_libraries(ops, {op: name}, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"kernels.{op} = cudnn: allowed are own, .*{name}"):
        with_libraries(ops, {op: "cudnn"}, CARD)


def test_a_library_built_for_another_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(ValueError, match=r"attention = flashmla: libcudart\.so\.13: .*install sgl-flash-mla"):
        with_libraries(ops_of("reference"), {"attention": "flashmla"}, CARD)


@pytest.mark.parametrize("attention", ["flashinfer", "flashmla"])
def test_libraries_take_their_ops_together(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("deep_gemm", "flashinfer", "flash_mla", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(has_legacy=lambda: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ops = ops_of("triton")
    assert with_libraries(ops, {}, CARD) is ops
    named = {"linear_fp8": "deep_gemm", "attention": attention, "prompt_attention": "flash_attn_4"}
    with FakeTensorMode():  # no card for the workspace
        found = with_libraries(ops, named, CARD)
    assert isinstance(found, Triton) and isinstance(found._product, DeepGemm)
    decode = {"flashinfer": FlashInfer, "flashmla": FlashMlaRows}[attention]
    assert isinstance(found.attend.decode, decode) and found.attend.decode is found.mla_attend.decode
    assert isinstance(found.attend.extend, FlashAttention4)
    assert isinstance(found._chosen, FlashMlaChosen) == (attention == "flashmla")


def stub(shape_of: Callable[[Tensor], Sequence[int]], calls: list[int]) -> Callable[..., tuple[Tensor, None]]:
    def attend(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        calls.append(len(q))
        return q.new_empty(shape_of(q)), None

    return attend


def test_no_value_is_read_on_the_host() -> None:
    """On tensors without values whoever reads one fails, as a capture would."""
    calls, ops = list[int](), ops_of("triton")
    mla = SimpleNamespace(
        get_mla_metadata=lambda: (None, None),
        flash_mla_with_kvcache=stub(lambda q: (*q.shape[:3], 512), calls),
    )
    prompts = SimpleNamespace(flash_attn_varlen_func=stub(lambda q: q.shape, calls))
    assert isinstance(ops, Triton)
    ops = ops.with_decode(functools.partial(FlashMlaRows, mla, 90)).with_chosen(FlashMlaChosen(mla, 90))
    ops = ops.with_extend(functools.partial(FlashAttention4, prompts, 90))
    with FakeTensorMode():
        q, q_rope = torch.empty(300, 64, 128, dtype=BF16), torch.empty(300, 64, 64, dtype=BF16)
        expand, heads = torch.empty(64, 256, 512, dtype=BF16), torch.empty(640, 8, 128, dtype=BF16)
        full, eight = torch.empty(640, 576, dtype=BF16), torch.empty(640, 656, dtype=torch.uint8)
        batch = rows_of(300, 300)
        places = torch.empty(300, 128, dtype=torch.int64)
        chosen = Selection(places[:, 0], places, batch.lengths_R, None, places[:0, 0])
        ops.mla_attend(q, q_rope, full, expand, batch, 0.1)
        ops.mla_attend_selected(q, q_rope, eight, expand, batch, 0.1, chosen)
        ops.attend(q, heads, heads, rows_of(0, 3), 0.1)
    assert calls == [300, 256, 44, 300], "chosen positions of 256 tokens at once"


def rows_of(num_decode: int, num_rows: int) -> PagedBatch:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32)

    starts, lengths, pages = empty(num_rows + 1), empty(num_rows), empty(num_rows, 4)
    return PagedBatch(num_decode, 64, starts, lengths, pages, empty(300), (), ())
