"""Experts in blocks: results of the first product as the second one reads them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels.cpu.codegen.blocks import pack_blocks
from lockstep.kernels.cpu.expert_blocks import experts

HIDDEN, SLOTS = 32, 3


def weights_of(width: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(width)
    shapes = (SLOTS, 2 * width, HIDDEN), (SLOTS, HIDDEN, width)
    return tuple(torch.randn(shape, generator=draw).bfloat16() / 6 for shape in shapes)  # type: ignore[return-value]


def computed(x_ND: Tensor, slots_M: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    counts_S = torch.zeros(SLOTS, dtype=torch.int64)
    w13_S, w2_S = (pack_blocks(each) for each in weights)
    return experts(x_ND, torch.arange(len(slots_M)), slots_M, w13_S, w2_S, counts_S)


@pytest.mark.parametrize("width", [16, 32, 48, 80])
@pytest.mark.parametrize("num_rows", [1, 17, 300])
def test_widths_that_end_within_a_tile(width: int, num_rows: int) -> None:
    """Slots with few rows, with many and with none."""
    draw = torch.Generator().manual_seed(num_rows)
    x_ND, weights = torch.randn(num_rows, HIDDEN, generator=draw).bfloat16(), weights_of(width)
    slots_M = torch.randint(0, 2, (num_rows,), generator=draw) * 2
    found = computed(x_ND, slots_M, weights).double()
    gate_MF, up_MF = torch.einsum("md,mfd->mf", x_ND.double(), weights[0].double()[slots_M]).chunk(2, dim=1)
    inner_MF = (F.silu(gate_MF) * up_MF).bfloat16().double()
    wanted = torch.einsum("mf,mdf->md", inner_MF, weights[1].double()[slots_M])
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_many_rows_are_those_of_few() -> None:
    """Their results between the products take 32 MiB, which the system gets back once nobody holds
    them.
    """
    width, num_rows = 1024, 16_384
    draw = torch.Generator().manual_seed(0)
    x_ND, weights = torch.randn(num_rows, HIDDEN, generator=draw).bfloat16(), weights_of(width)
    slots_M = torch.arange(num_rows) % SLOTS
    whole = computed(x_ND, slots_M, weights)
    for start in (0, 5000, num_rows - 40):
        some = slice(start, start + 40)
        assert torch.equal(computed(x_ND[some], slots_M[some], weights), whole[some])
