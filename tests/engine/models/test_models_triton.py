"""Whole models through the Triton column of the op table, step by step as through the column of the
CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.kernels.table import Column
from support.engine.models.checkpoints import write_checkpoint
from support.engine.models.family_configs import CONFIGS
from support.engine.models.local_model import Stepper, load_local

PROMPTS = {0: list(range(40, 59)), 1: [7, 8, 9]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "kimi_k2"])
def test_columns_agree(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", CONFIGS[family](num_hidden_layers=2))
    columns: tuple[Column, ...] = ("triton", "cpu")
    steppers = [Stepper(load_local(path, torch.float32, column), torch.float32) for column in columns]
    # Two prompts; one of them decodes while the other extends over what is cached; both decode.
    for rows, num_decode in ((PROMPTS, 0), ({1: [11], 0: [60, 61]}, 1), ({0: [3], 1: [12]}, 2)):
        got, expected = (stepper.step(rows, num_decode) for stepper in steppers)
        for sequence in rows:
            torch.testing.assert_close(got[sequence], expected[sequence], rtol=1e-4, atol=1e-4)
    for got_layer, expected_layer in zip(steppers[0].cache, steppers[1].cache, strict=True):
        for part, expected_part in zip(got_layer, expected_layer, strict=True):
            torch.testing.assert_close(part, expected_part, rtol=1e-4, atol=1e-4)
            assert part.any()
