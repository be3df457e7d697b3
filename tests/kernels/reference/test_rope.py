"""Rotary embedding: its defining properties, and YaRN's ends. The model tests compare values with
``transformers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference.rope import (
    Angles,
    angles,
    frequencies,
    rotate_and_write,
    rotate_halves,
    rotate_pairs,
    yarn_frequencies,
)

Rotate = Callable[[Tensor, Angles], Tensor]
BOTH = pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])


@BOTH
def test_products_depend_on_the_distance_alone(rotate: Rotate) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 16)

    def product(m: int, n: int) -> Tensor:
        turned = [rotate(x, angles(torch.tensor([p]), frequencies(16, 100.0))) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(40, 33), product(7, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(40, 33), product(40, 30), atol=1e-2)


@BOTH
def test_position_zero_only_reorders(rotate: Rotate) -> None:
    x = torch.randn(1, 2, 8)
    assert torch.equal(
        rotate(x, angles(torch.zeros(1, dtype=torch.int64), frequencies(8, 100.0))).sort(-1).values,
        x.sort(-1).values,
    )


def test_one_pair_turns_by_its_angle() -> None:
    rotation = angles(torch.tensor([3]), torch.tensor([0.1]))
    expected = torch.tensor([[[math.cos(0.3), math.sin(0.3)]]])
    for rotate in (rotate_halves, rotate_pairs):
        torch.testing.assert_close(rotate(torch.tensor([[[1.0, 0.0]]]), rotation), expected)


def test_pairs_are_halves_after_reordering() -> None:
    x = torch.randn(5, 3, 12)
    rotation = angles(torch.arange(5), frequencies(12, 1000.0), magnitude=1.3)
    reordered = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    torch.testing.assert_close(rotate_pairs(x, rotation), rotate_halves(reordered, rotation))


def test_bfloat16_is_rotated_in_float32() -> None:
    x = torch.randn(2, 1, 8).bfloat16()
    assert rotate_halves(x, angles(torch.tensor([300, 301]), frequencies(8, 100.0))).dtype == torch.float32


@pytest.mark.parametrize("interleaved", [False, True])
def test_values_past_the_frequencies_are_left_alone(interleaved: bool) -> None:
    q, k, v = torch.randn(3, 4, 2, 12).bfloat16()
    rotation = angles(torch.arange(4) + 5, frequencies(8, 100.0))
    cache = (torch.zeros(6, 2, 12, dtype=torch.bfloat16), torch.zeros(6, 2, 12, dtype=torch.bfloat16))
    write = torch.tensor([5, 0, 1, 3])
    out = rotate_and_write(q, k, v, rotation, cache, write, interleaved)
    rotate = rotate_pairs if interleaved else rotate_halves
    for x, got in ((q, out), (k, cache[0][write])):
        assert torch.equal(got, torch.cat([rotate(x[..., :8], rotation).bfloat16(), x[..., 8:]], -1))
    assert torch.equal(cache[1][write], v)


def test_no_tokens() -> None:
    assert rotate_pairs(
        torch.empty(0, 2, 8), angles(torch.empty(0, dtype=torch.int64), frequencies(8, 100.0))
    ).shape == (0, 2, 8)


def test_yarn_keeps_fast_pairs_and_slows_the_rest() -> None:
    plain = frequencies(64, 10000.0)
    stretched = yarn_frequencies(64, 10000.0, 40.0, 4096, 32.0, 1.0, True)
    torch.testing.assert_close(stretched[:8], plain[:8])
    torch.testing.assert_close(stretched[-6:], plain[-6:] / 40)
    ratio = plain / stretched
    assert (ratio.diff() >= -1e-4).all()
    torch.testing.assert_close(yarn_frequencies(64, 10000.0, 1.0, 4096, 32.0, 1.0, True), plain)
