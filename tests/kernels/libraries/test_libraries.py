"""Libraries that a recipe names, in the op table."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lockstep.kernels.libraries.deep_gemm import DeepGemm
from lockstep.kernels.libraries.flashinfer import FlashInfer
from lockstep.kernels.table import ops_of, with_libraries
from lockstep.kernels.triton.column import Triton

CARD = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("op", "name", "package"),
    [("linear_fp8", "deep_gemm", "sgl-deep-gemm"), ("attention", "flashinfer", "flashinfer-python")],
)
def test_a_library_that_is_not_there_or_not_for_the_device_is_refused(
    op: str, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = ops_of("reference")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"{op} = {name}: .*install {package} or use own"):
        with_libraries(ops, {op: name}, CARD)
    with pytest.raises(ValueError, match="serves on GPUs, not on cpu"):
        with_libraries(ops, {op: name}, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"kernels.{op} = cudnn: allowed are own and {name}"):
        with_libraries(ops, {op: "cudnn"}, CARD)


def test_libraries_take_their_ops_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deep_gemm", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ops = ops_of("triton")
    assert with_libraries(ops, {}, CARD) is ops
    with FakeTensorMode():  # no card for the workspace
        found = with_libraries(ops, {"linear_fp8": "deep_gemm", "attention": "flashinfer"}, CARD)
    assert isinstance(found, Triton) and isinstance(found._product, DeepGemm)
    assert isinstance(found.attend.decode, FlashInfer) and found.attend.decode is found.mla_attend.decode
