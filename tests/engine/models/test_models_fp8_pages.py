"""Whole models over FP8 pages: their loss, and chunks that read their own keys from the pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels.table import Column
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.models.family_configs import CONFIGS as ALL, deepseek_v32_config
from support.engine.models.local_model import Stepper, load_local

CONFIGS = [qwen3_moe_config, deepseek_v3_config]
FAMILIES = pytest.mark.parametrize("config_of", CONFIGS)


def prompts(count: int, length: int = 80) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(7)
    return {i: torch.randint(0, 320, (length,), generator=generator).tolist() for i in range(count)}


def logits(path: Path, pages: torch.dtype, count: int = 6) -> Tensor:
    stepper = Stepper(load_local(path, torch.float32), pages)
    return torch.cat(list(stepper.step(prompts(count)).values()))


@FAMILIES
def test_the_loss_of_logits(config_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Random weights, three layers, float32 except the pages. The median error of a position's
    logits is 1.9 % of their norm, 0.12 % with pages in bf16; it is larger where a router turns to
    another expert. Nine of ten best tokens stay.
    """
    path = write_checkpoint(tmp_path / "m", config_of(), seed=3)
    exact = logits(path, torch.float32)
    eight, sixteen = (
        (logits(path, pages) - exact).norm(dim=-1) / exact.norm(dim=-1)
        for pages in (torch.uint8, torch.bfloat16)
    )
    assert 0.01 < eight.median() < 0.03 and 0.0005 < sixteen.median() < 0.002
    assert eight.mean() < 0.08
    assert (logits(path, torch.uint8).argmax(-1) == exact.argmax(-1)).float().mean() > 0.85


@pytest.mark.parametrize("family", sorted(set(ALL) - {"qwen3_moe", "deepseek_v3"}))
def test_every_other_family_loses_as_little(family: str, tmp_path: Path) -> None:
    """Two prompts. The sharper the attention, the larger the loss: YaRN doubles the scores of
    mistral4, and its queries grow. In deepseek_v32 and glm_moe_dsa positions change places at the
    threshold of the 16 that are chosen; with 64 chosen of 80 the loss of the first is 0.023.
    """
    path = write_checkpoint(tmp_path / "m", ALL[family](), seed=3)
    exact, eight = (logits(path, pages, count=2) for pages in (torch.float32, torch.uint8))
    loss = ((eight - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
    assert 0.001 < loss < {"mistral4": 0.06, "deepseek_v32": 0.2, "glm_moe_dsa": 0.2}.get(family, 0.04)


@pytest.mark.parametrize("config_of", [*CONFIGS, deepseek_v32_config])
def test_a_chunk_reads_what_the_pages_return(
    config_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """If a chunk read its own keys before rounding, prompts cut differently would differ by the
    loss of FP8: by 2 %.
    """
    path = write_checkpoint(tmp_path / "m", config_of(), seed=3)
    model, asked = load_local(path, torch.float32), prompts(4)
    whole = Stepper(model, torch.uint8).step(asked)
    for sizes in ((80,), (3, 1, 17, 19, 40), (1,) * 80):
        stepper, done, parts = Stepper(model, torch.uint8, seed=5), 0, []
        for size in sizes:
            rows = {i: tokens[done : done + size] for i, tokens in asked.items()}
            parts.append(stepper.step(rows, num_decode=4 if size == 1 and done else 0))
            done += size
        for i, expected in whole.items():
            error = (torch.cat([part[i] for part in parts]) - expected).norm(dim=-1) / expected.norm(dim=-1)
            # Sums in another order: now and then a key is rounded to the next eight bits, and that
            # moves later positions a little.
            assert error.median() < 5e-4 and error.max() < 5e-3, f"chunks of {sizes}, prompt {i}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
@FAMILIES
def test_columns_agree(config_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", config_of(num_hidden_layers=2))
    columns: tuple[Column, ...] = ("triton", "cpu")
    steppers = [Stepper(load_local(path, torch.float32, column), torch.uint8) for column in columns]
    start = {0: list(range(40, 59)), 1: [7, 8, 9]}
    for rows, num_decode in ((start, 0), ({1: [11], 0: [60, 61]}, 1), ({0: [3], 1: [12]}, 2)):
        got, expected = (stepper.step(rows, num_decode) for stepper in steppers)
        for sequence in rows:
            error = (got[sequence] - expected[sequence]).norm(dim=-1) / expected[sequence].norm(dim=-1)
            # The interpreter cuts bf16, which the rotated part of a latent is kept in, instead of
            # rounding it.
            assert error.median() < 1e-2 and error.max() < 2e-2
