"""Training operations compiled for one CPU core: ``operations.cpp``, built by g++ on the training
machine.

Several times faster there than plain torch: attention stays in the cache, and chains over rows take
one pass. T, H, N, D, E, F, K, R as in ``operations.py``.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import STATE
from .operations import EPSILON, Angles, Operations, multiply_experts, multiply_experts_back

SOURCE = Path(__file__).with_name("operations.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
UNIT = 64  # rows of an expert are padded to a multiple of this


def supported() -> bool:
    """Whether this machine has a compiler and multiplies bf16."""
    flags = Path("/proc/cpuinfo")
    return bool(shutil.which("g++")) and flags.exists() and " avx512_bf16 " in flags.read_text()


def build(directory: Path = STATE) -> Path:
    """Builds the library unless it exists. Its name holds the checksum of the source."""
    path = directory / f"operations-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not path.exists():
        subprocess.run(["g++", *FLAGS, "-o", str(path), str(SOURCE)], check=True)
    return path


class Compiled(Operations):
    """The operations of the library at ``path``. Tensors are on the CPU; one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._library = ctypes.CDLL(str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self._path,)

    def run(self, name: str, *values: Tensor | int | float | None) -> None:
        """Calls a function of the library. Tensors are passed as the address of their first
        element.
        """
        getattr(self._library, name)(*(_argument(value) for value in values))

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _Norm.apply(self, x, weight)  # type: ignore[no-untyped-call]
        return out

    def attend(
        self, q_THN: Tensor, kv_THN: Tensor, rope_TE: Tensor, angles: Angles, lengths: list[int], scale: float
    ) -> Tensor:
        assert q_THN.shape[2] == 64, "operations.cpp is written for this model's heads"
        assert kv_THN.shape[2] == 96
        assert rope_TE.shape[1] == 32
        how = angles, torch.tensor(lengths), scale
        out: Tensor = _Attention.apply(self, how, q_THN, kv_THN, rope_TE)  # type: ignore[no-untyped-call]
        return out

    def swiglu(self, both: Tensor) -> Tensor:
        out: Tensor = _Swiglu.apply(self, both)  # type: ignore[no-untyped-call]
        return out

    def run_experts(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13_EFD: Tensor, w2_EDF: Tensor
    ) -> Tensor:
        rows = x_TD, ids_TK, weights_TK
        out: Tensor = _Experts.apply(self, *rows, w13_EFD, w2_EDF)  # type: ignore[no-untyped-call]
        return out


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_long(value)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Compiled, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        out = x.new_empty(x.shape, dtype=torch.bfloat16)
        scales = x.new_empty(x.numel() // width, dtype=torch.float32)
        library.run(
            "norm_forward", x, int(x.dtype == torch.float32), weight, len(scales), width, EPSILON, out, scales
        )
        ctx.save_for_backward(x, weight, scales)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        grad = grads[0].contiguous()
        is_float = int(x.dtype == torch.float32)
        ctx.library.run(
            "norm_backward", x, is_float, weight, scales, grad, len(scales), x.shape[-1], dx, dweight
        )
        return None, dx, dweight


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Compiled, how: tuple[Angles, Tensor, float], q: Tensor, kv: Tensor, rope: Tensor
    ) -> Tensor:
        """``how``: angles, lengths of the documents, scale."""
        q = q.contiguous()
        kv = kv.contiguous()
        num, heads = q.shape[:2]
        out = q.new_empty(num, heads, 64)
        log_sums = q.new_empty(num, heads, dtype=torch.float32)
        angles, lengths, scale = ctx.how = how
        ctx.library = library
        ctx.save_for_backward(q, kv, rope, out, log_sums)
        inputs = (q, kv, rope, rope.stride(0), *angles, lengths, len(lengths), heads, scale)
        library.run("attention_forward", *inputs, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, rope, out, log_sums = ctx.saved_tensors
        dq = torch.empty_like(q)
        dkv = torch.empty_like(kv)
        drope = rope.new_empty(rope.shape)
        grad = grads[0].contiguous()
        angles, lengths, scale = ctx.how
        inputs = (q, kv, rope, rope.stride(0), *angles, lengths, len(lengths), q.shape[1], scale)
        ctx.library.run("attention_backward", *inputs, out, log_sums, grad, dq, dkv, drope)
        return None, None, dq, dkv, drope


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Compiled, both: Tensor) -> Tensor:
        both = both.contiguous()
        out = both.new_empty(len(both), both.shape[1] // 2)
        library.run("swiglu_forward", both, *out.shape, out)
        ctx.save_for_backward(both)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [both] = ctx.saved_tensors
        dboth = torch.empty_like(both)
        ctx.library.run("swiglu_backward", both, grads[0].contiguous(), len(both), both.shape[1] // 2, dboth)
        return None, dboth


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Compiled, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        shape = *ids_TK.shape, x_TD.shape[1]
        x_TD = x_TD.contiguous()
        weights_TK = weights_TK.contiguous()
        place_R = ids_TK.new_empty(ids_TK.numel())
        ends_E = ids_TK.new_empty(len(w13))
        library.run("place_rows", ids_TK.contiguous(), len(place_R), len(w13), UNIT, place_R, ends_E)
        ends = ends_E.tolist()
        x_RD = x_TD.new_zeros(ends[-1], shape[2])
        library.run("spread_rows", x_TD, place_R, *shape, x_RD)
        up_RF = x_RD.new_empty(len(x_RD), w13.shape[1])
        act_RF = x_RD.new_empty(len(x_RD), w2.shape[2])
        y_RD = torch.empty_like(x_RD)
        multiply_experts(x_RD, w13, ends, up_RF)
        library.run("swiglu_forward", up_RF, *act_RF.shape, act_RF)
        multiply_experts(act_RF, w2, ends, y_RD)
        out = torch.empty_like(x_TD)
        library.run("gather_rows", y_RD, place_R, weights_TK, *shape, out)
        ctx.save_for_backward(x_RD, up_RF, act_RF, y_RD, place_R, weights_TK, w13, w2)
        ctx.library, ctx.shape, ctx.ends = library, shape, ends
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_RF, act_RF, y_RD, place_R, weights_TK, w13, w2 = ctx.saved_tensors
        grad = grads[0].contiguous()
        dy_RD = torch.zeros_like(y_RD)
        dweights_TK = torch.empty_like(weights_TK)
        ctx.library.run("gather_backward", y_RD, place_R, weights_TK, grad, *ctx.shape, dy_RD, dweights_TK)
        dact_RF = torch.empty_like(act_RF)
        dup_RF = torch.empty_like(up_RF)
        dx_RD = torch.empty_like(x_RD)
        dw2 = multiply_experts_back(dy_RD, act_RF, w2, ctx.ends, dact_RF)
        ctx.library.run("swiglu_backward", up_RF, dact_RF, *act_RF.shape, dup_RF)
        dw13 = multiply_experts_back(dup_RF, x_RD, w13, ctx.ends, dx_RD)
        dx_TD = torch.empty_like(grad)
        ctx.library.run("gather_rows", dx_RD, place_R, None, *ctx.shape, dx_TD)
        return None, dx_TD, None, dweights_TK, dw13, dw2
