"""Experts that move between real ranks while these generate: tokens stay the same, and slots hold
what a rank would load for the new placement.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.models.four_bit_checkpoints import write_pair
from support.engine.rank.greedy_prompts import FAMILIES, write_family
from support.engine.rank.moving_experts import generate
from support.parallel.gloo_ranks import run_ranks


@pytest.mark.parametrize(
    ("family", "dispatch", "world", "microbatches"),
    [
        ("qwen3_moe", "all_to_all", 2, 1),
        ("qwen3_moe", "all_gather", 3, 2),
        ("deepseek_v3", "all_to_all", 3, 2),
        ("gpt_oss", "all_to_all", 2, 1),
    ],
)
def test_tokens_stay_the_same_while_experts_move(
    family: str, dispatch: str, world: int, microbatches: int, tmp_path: Path
) -> None:
    path = write_family(tmp_path / "model", family)
    still = run_ranks(generate, world, path, family, dispatch, microbatches, False)
    moving = run_ranks(generate, world, path, family, dispatch, microbatches, True)
    assert [tokens for tokens, _ in moving] == [tokens for tokens, _ in still]
    assert all(right for _, right in still + moving)


def test_experts_in_4_bits_move_as_they_are(tmp_path: Path) -> None:
    """Codes, and scales of two kinds."""
    family = "deepseek_v3"
    path, _ = write_pair(tmp_path, FAMILIES[family], "nvfp4")
    still = run_ranks(generate, 2, path, family, "all_to_all", 1, False)
    moving = run_ranks(generate, 2, path, family, "all_to_all", 1, True)
    assert [tokens for tokens, _ in moving] == [tokens for tokens, _ in still]
    assert all(right for _, right in still + moving)
