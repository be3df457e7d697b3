"""Libraries that a recipe names, in the op table."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lockstep.kernels.libraries.deep_gemm import DeepGemm
from lockstep.kernels.libraries.flash_attn_4 import FlashAttention4
from lockstep.kernels.libraries.flash_mla import FlashMlaChosen, FlashMlaRows
from lockstep.kernels.libraries.flashinfer import FlashInfer
from lockstep.kernels.table import ops_of, with_libraries
from lockstep.kernels.triton.column import Triton

CARD = torch.device("cuda:0")


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
