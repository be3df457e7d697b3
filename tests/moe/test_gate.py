"""The gate's weights in memory."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference.column import Reference
from lockstep.moe.config import MoEConfig
from lockstep.moe.layer import Gate
from lockstep.parallel.linear import Backend

CONFIG = MoEConfig(hidden=32, expert_width=8, num_experts=4, top_k=2, selection_bias=True)


class Narrow(Reference):
    takes_narrow_gates = True


def packed(ops: Reference, dtype: torch.dtype, stored: torch.dtype) -> tuple[Gate, torch.Tensor]:
    gate = Gate(CONFIG, Backend(dtype, torch.device("cpu"), ops))
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(stored)
    gate.weight.copy_(weight)
    gate.pack()
    return gate, weight


@pytest.mark.parametrize(
    ("ops", "dtype", "stored", "held"),
    [
        (Narrow(), torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (Narrow(), torch.bfloat16, torch.float32, torch.float32),
        (Narrow(), torch.float32, torch.bfloat16, torch.float32),
        (Reference(), torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=["a router in bf16", "a router in float32", "a model in float32", "ops of a CPU"],
)
def test_weights_are_narrow_where_none_of_them_changes(
    ops: Reference, dtype: torch.dtype, stored: torch.dtype, held: torch.dtype
) -> None:
    gate, weight = packed(ops, dtype, stored)
    assert gate.weight.dtype == held and torch.equal(gate.weight.float(), weight.float())
    assert gate.weights.weight is gate.weight and gate.weights.bias is gate.e_score_correction_bias
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.dtype == torch.float32
