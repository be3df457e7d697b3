"""Weights in 4 bits: every code and scale against values written by hand, quantising, and the
experts built on them.
"""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.formats.four_bit_format import INT4, INT4_FP16, MXFP4, NVFP4, FourBitFormat
from lockstep.kernels.reference.experts import experts_reference
from lockstep.kernels.reference.four_bit import (
    FourBit,
    dequantise,
    experts_four_bit,
    pack_codes,
    quantise,
    unpack_codes,
)

FORMATS = {"int4": INT4, "int4 in fp16": INT4_FP16, "mxfp4": MXFP4, "nvfp4": NVFP4}
INTEGERS = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
ALL_CODES = torch.arange(16, dtype=torch.uint8)


def test_codes_are_packed_from_the_low_bits_on() -> None:
    codes = torch.tensor([[1, 2, 15, 0, 0, 0, 8, 7]])
    packed = pack_codes(codes)
    assert packed.tolist() == [[0x21, 0x0F, 0x00, 0x78]]
    assert torch.equal(unpack_codes(packed), codes.to(torch.uint8))


def test_eight_codes_make_the_word_of_compressed_tensors() -> None:
    """Value k of a word is bits 4 k to 4 k + 3, with 8 added."""
    word = sum((value + 8) << (4 * k) for k, value in enumerate([-8, -7, 7, 0, 1, 2, -1, 3]))
    stored = torch.tensor([[word - (1 << 32) if word >= 1 << 31 else word]], dtype=torch.int32)
    codes = unpack_codes(stored.view(torch.uint8))
    assert (codes.to(torch.int8) - 8).tolist() == [[-8, -7, 7, 0, 1, 2, -1, 3]]


@pytest.mark.parametrize(("format", "numbers"), [(INT4, INTEGERS), (MXFP4, E2M1), (NVFP4, E2M1)])
def test_each_code_stands_for_its_number(format: FourBitFormat, numbers: list[float]) -> None:
    codes = pack_codes(ALL_CODES.repeat(1, 2))
    scales = torch.ones(1, format.groups(32), dtype=quantise(torch.ones(1, 32), format).scales.dtype)
    factors = torch.ones(1) if format.has_factor else None
    assert dequantise(FourBit(format, codes, scales, factors)).tolist() == [numbers * 2]


def test_scales_of_powers_of_two() -> None:
    """E8M0: bits 127 are 1; 0 is 2^-127 and 254 is 2^127."""
    bits = torch.tensor([[0, 1, 126, 127, 128, 254]], dtype=torch.uint8)
    codes = pack_codes(torch.full((1, 6 * 32), 2))  # the number 1
    values = dequantise(FourBit(MXFP4, codes, bits.view(torch.float8_e8m0fnu)))
    expected = [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]
    assert values[0, ::32].tolist() == expected and values[0, 31::32].tolist() == expected


def test_scales_in_e4m3_are_multiplied_by_the_factor_of_their_matrix() -> None:
    bits = torch.tensor([[0x38, 0x01], [0x7E, 0x30]], dtype=torch.uint8)  # 1, 2^-9; 448, 0.5
    codes = pack_codes(torch.full((2, 32), 7))  # the number 6
    factors = torch.tensor([0.25, 3.0])
    values = dequantise(FourBit(NVFP4, codes, bits.view(torch.float8_e4m3fn), factors))
    assert values[0].tolist() == [1.5] * 16 + [6 * 2.0**-9 * 0.25] * 16
    assert values[1].tolist() == [6 * 448 * 3.0] * 16 + [9.0] * 16


def test_a_scale_belongs_to_its_group_and_row_also_at_the_edge() -> None:
    """40 values: a group of 32 and one of 8."""
    codes = pack_codes(torch.full((2, 40), 9))  # 1
    scales = torch.tensor([[2.0, 3.0], [5.0, 7.0]], dtype=torch.bfloat16)
    values = dequantise(FourBit(INT4, codes, scales))
    assert values.tolist() == [[2.0] * 32 + [3.0] * 8, [5.0] * 32 + [7.0] * 8]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_under_their_scales_are_quantised_exactly(name: str) -> None:
    """Every group holds the largest number, so that the scale can be found again."""
    format = FORMATS[name]
    numbers = torch.tensor(format.numbers)
    group = numbers.repeat(format.group // 16) * 0.5
    w = torch.stack((group, group * 4)).repeat(1, 3)
    if format.name == "int4":  # -8 / 7.5 is no scale of these
        w = w / 0.5 * 7.5 / 8
        assert torch.allclose(dequantise(quantise(w, format)), w, rtol=0.08, atol=0.4)
        return
    assert torch.equal(dequantise(quantise(w, format)), w)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [8, 40, 256])
def test_values_come_back_within_half_a_step(name: str, columns: int) -> None:
    format = FORMATS[name]
    w = (
        torch.randn(6, columns, generator=torch.Generator().manual_seed(3))
        * torch.logspace(-2, 2, 6)[:, None]
    )
    error = (dequantise(quantise(w, format, parts=2)) - w).abs()
    most = w.abs().amax(1, keepdim=True)
    assert (error <= most * {"int4": 0.07, "mxfp4": 0.26, "nvfp4": 0.2}[format.name]).all()
    assert not dequantise(quantise(torch.zeros(2, columns), format)).any()


def test_ties_go_to_even_codes() -> None:
    w = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, 4.0] + [4.0] * 21])
    assert dequantise(quantise(w, MXFP4))[0, :10].tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -1, -4]


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_format(name: str) -> None:
    w = quantise(torch.randn(6, 40), FORMATS[name])
    factors = 0 if w.factors is None else w.factors.nbytes
    assert FORMATS[name].matrix_bytes(6, 40) == w.codes.nbytes + w.scales.nbytes + factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_those_of_the_dequantised_weights(name: str, dtype: torch.dtype) -> None:
    format, generator = FORMATS[name], torch.Generator().manual_seed(4)
    w13 = quantise(torch.randn(5, 2 * 24, 40, generator=generator), format, parts=2)
    w2 = quantise(torch.randn(5, 40, 24, generator=generator), format)
    x = torch.randn(4, 40, generator=generator).to(dtype)
    rows, slots = torch.tensor([0, 1, 1, 2, 3, 0]), torch.tensor([3, -1, 0, 3, 4, 0])
    counts, expected_counts = torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    expected = experts_reference(
        x, rows, slots, dequantise(w13).to(dtype), dequantise(w2).to(dtype), expected_counts
    )
    assert torch.equal(experts_four_bit(x, rows, slots, w13, w2, counts), expected)
    assert torch.equal(counts, expected_counts) and counts.tolist() == [3, 1, 1, 3, 2]
