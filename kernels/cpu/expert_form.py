"""Biases and activations of experts in compiled kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..reference.experts import ExpertForm
from .codegen.arrays import array, exp, inner


class Form(NamedTuple):
    """``ExpertForm`` as kernels read it. ``up_bias`` [S, 2F] and ``down_bias`` [S, D] are bf16 as
    uint16, or float32; empty if there are none.
    """

    clamped: bool
    alpha: Any
    limit: Any
    up_bias: NDArray[Any]
    down_bias: NDArray[Any]


def form_of(form: ExpertForm, dtype: torch.dtype) -> Form:
    """``dtype``: of the rows."""
    none = np.empty((0, 0), np.uint16 if dtype == torch.bfloat16 else np.float32)
    up, down = (none, none) if form.biases is None else (array(bias) for bias in form.biases)
    activation = form.activation
    return Form(
        activation.kind == "clamped", np.float32(activation.alpha), np.float32(activation.limit), up, down
    )


@inner(error_model="numpy")
def clamped_mul(gate, up, alpha, limit):
    """``Activation`` of kind "clamped" for one value."""
    gate = min(gate, limit)
    up = min(max(up, -limit), limit)
    return gate / (np.float32(1) + exp(-alpha * gate)) * (up + np.float32(1))
