"""Experts in 4 bits on a CPU: equal to those of the dequantised weights, whatever the number of
rows and the lengths of groups.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lockstep.kernels.activation import SILU, Activation
from lockstep.kernels.cpu.experts_four_bit import run_decoded
from lockstep.kernels.formats.four_bit_format import INT4, INT4_FP16, MXFP4, NVFP4, FourBitFormat
from lockstep.kernels.reference.experts import PLAIN_FORM, ExpertForm, experts_reference
from lockstep.kernels.reference.four_bit import FourBit, dequantise, quantise
from lockstep.kernels.table import ops_of

FORMATS = {"int4": INT4, "int4 in fp16": INT4_FP16, "mxfp4": MXFP4, "nvfp4": NVFP4}
# Values of a row: whole vectors of 128, a vector and a part, less than one, and a group that is not
# full.
SIZES = [(256, 128), (200, 136), (96, 72), (40, 24)]
NUM_SLOTS = 5
CLAMPED = Activation("clamped", 1.702, 1.5)


def weights(format: FourBitFormat, hidden: int, width: int) -> tuple[FourBit, FourBit]:
    generator = torch.Generator().manual_seed(hidden + width)
    w13 = torch.randn(NUM_SLOTS, 2 * width, hidden, generator=generator) * hidden**-0.5
    w13[1] *= 100  # a slot with scales of its own
    w2 = torch.randn(NUM_SLOTS, hidden, width, generator=generator) * width**-0.5
    return quantise(w13, format, parts=2), quantise(w2, format)


def exact(
    x: Tensor, rows: Tensor, slots: Tensor, w13: FourBit, w2: FourBit, form: ExpertForm = PLAIN_FORM
) -> Tensor:
    """In float32."""
    if form.biases is not None:
        form = replace(form, biases=(form.biases[0].float(), form.biases[1].float()))
    counts = torch.zeros(NUM_SLOTS, dtype=torch.int64)
    return experts_reference(x.float(), rows, slots, dequantise(w13), dequantise(w2), counts, form)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, within: float = 2e-6) -> None:
    """Rows within what rounding to the dtype in between and at the end costs."""
    error = (found.float() - expected).norm(dim=-1)
    assert found.dtype == dtype
    assert (error <= expected.norm(dim=-1) * (1e-2 if dtype == torch.bfloat16 else within) + 1e-20).all()


def formed(
    hidden: int, width: int, dtype: torch.dtype, biased: bool, activation: Activation = SILU
) -> ExpertForm:
    if not biased:
        return ExpertForm(activation)
    generator = torch.Generator().manual_seed(width)
    up, down = (torch.randn(NUM_SLOTS, n, generator=generator).to(dtype) for n in (2 * width, hidden))
    return ExpertForm(activation, (up, down))


def check(
    format: FourBitFormat,
    dtype: torch.dtype,
    in_registers: bool,
    biased: bool = False,
    activation: Activation = SILU,
) -> None:
    ops, generator = ops_of("cpu"), torch.Generator().manual_seed(0)
    for hidden, width in SIZES:
        within = 2e-5 if biased or activation is CLAMPED else 2e-6  # sums cancel and values are cut
        form = formed(hidden, width, dtype, biased, activation)
        w13, w2 = weights(format, hidden, width)
        packed = [
            replace(p, in_registers=p.in_registers and in_registers)
            for p in map(ops.pack_four_bit, (w13, w2))
        ]
        for num_pairs in (0, 1, 7, 30, 600):
            x = torch.randn(9, hidden, generator=generator).to(dtype)
            rows = torch.randint(0, 9, (num_pairs,), generator=generator)
            slots = torch.randint(-1, NUM_SLOTS - 1, (num_pairs,), generator=generator)
            counts = torch.ones(NUM_SLOTS, dtype=torch.int64)
            found = ops.experts_four_bit(x, rows, slots, *packed, counts, form)
            assert_near(found, exact(x, rows, slots, w13, w2, form), dtype, within)
            assert counts.tolist() == [1 + int((slots == slot).sum()) for slot in range(NUM_SLOTS)]
            assert not found[slots < 0].any()


@pytest.mark.parametrize("name", FORMATS)
def test_experts_in_bf16(name: str) -> None:
    check(FORMATS[name], torch.bfloat16, in_registers=True)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_in_float32(name: str) -> None:
    check(FORMATS[name], torch.float32, in_registers=False)


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_experts_in_bf16_where_no_instruction_multiplies_it(name: str) -> None:
    check(FORMATS[name], torch.bfloat16, in_registers=False)


@pytest.mark.parametrize("biased, activation", [(True, CLAMPED), (True, SILU), (False, CLAMPED)])
@pytest.mark.parametrize("dtype, in_registers", [(torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_biases_and_the_clamped_activation(
    name: str, dtype: torch.dtype, in_registers: bool, biased: bool, activation: Activation
) -> None:
    check(FORMATS[name], dtype, in_registers, biased, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_depends_on_no_neighbour(dtype: torch.dtype) -> None:
    ops, (w13, w2) = ops_of("cpu"), weights(INT4, 200, 136)
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows, slots = torch.arange(40), torch.arange(40) % 3
    together = ops.experts_four_bit(x, rows, slots, w13, w2, torch.zeros(NUM_SLOTS, dtype=torch.int64))
    for some in (slice(0, 1), slice(7, 12), slice(3, 23)):
        counts = torch.zeros(NUM_SLOTS, dtype=torch.int64)
        alone = ops.experts_four_bit(x, rows[some], slots[some], w13, w2, counts)
        assert torch.equal(alone, together[some])


def test_strided_rows_compile_nothing_more() -> None:
    w13, w2 = (ops_of("cpu").pack_four_bit(w) for w in weights(INT4, 40, 24))
    x, rows, slots = torch.randn(9, 40), torch.arange(7), torch.arange(7) % NUM_SLOTS
    wide, double = torch.zeros(9, 48), torch.stack([rows, slots], 1)
    wide[:, :40] = x

    def computed(*given: Tensor) -> Tensor:
        counts = torch.zeros(NUM_SLOTS, dtype=torch.int64)
        return ops_of("cpu").experts_four_bit(*given, w13, w2, counts)

    whole = computed(x, rows, slots)
    known = len(run_decoded.signatures)
    assert torch.equal(computed(wide[:, :40], *double.unbind(1)), whole)
    assert len(run_decoded.signatures) == known


def test_every_code_and_scale_is_read_as_the_reference_does() -> None:
    """One value of x at a time picks a column of w13: gate is 1 throughout, so up is seen."""
    ops, hidden, width = ops_of("cpu"), 128, 8
    for format in (MXFP4, NVFP4, INT4, INT4_FP16):
        w13 = quantise(torch.ones(1, 2 * width, hidden), format, parts=2)
        codes = torch.arange(16, dtype=torch.uint8).repeat(hidden // 16)
        up = w13.codes[0, width:]
        up[:] = codes[::2] | codes[1::2] << 4
        scales = w13.scales.view(torch.uint8)[0, width:]
        if format.scale == "e8m0":
            scales[:] = torch.arange(0, 32, 1, dtype=torch.uint8).view(8, 4) + 112
        elif format.scale == "e4m3":
            scales[:] = torch.arange(0, 128, 2, dtype=torch.uint8).view(8, 8)
        w2 = quantise(torch.eye(hidden, width)[None], format)
        x = torch.eye(hidden).to(torch.bfloat16)
        rows, slots = torch.arange(hidden), torch.zeros(hidden, dtype=torch.int64)
        found = ops.experts_four_bit(x, rows, slots, w13, w2, torch.zeros(1, dtype=torch.int64))
        expected = experts_reference(
            x.float(), rows, slots, dequantise(w13), dequantise(w2), torch.zeros(1, dtype=torch.int64)
        )
        torch.testing.assert_close(
            found.float(), expected, rtol=2e-2, atol=1e-6 * float(expected.abs().max())
        )


def test_weights_that_move_are_seen_by_packed_experts() -> None:
    ops, (w13, w2) = ops_of("cpu"), weights(INT4, 96, 72)
    packed = ops.pack_four_bit(w13), ops.pack_four_bit(w2)
    for w in (w13, w2):
        w.codes[3], w.scales[3] = w.codes[0].clone(), w.scales[0].clone()
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    rows, slots = torch.tensor([0, 0]), torch.tensor([3, 0])
    found = ops.experts_four_bit(x, rows, slots, *packed, torch.zeros(NUM_SLOTS, dtype=torch.int64))
    assert torch.equal(found[0], found[1])
