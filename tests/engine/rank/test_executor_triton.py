"""An executor whose model computes with the Triton column samples by it too: the tokens of the CPU
column, however they are drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.message import Sampling
from lockstep.kernels.table import Column
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import Driver, Request, build_executor

SAMPLING = (
    Sampling(temperature=0.0, stop_i32=np.array([5], np.int32).tobytes(), min_tokens=2, num_logprobs=2),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=4, presence_penalty=1.5, repetition_penalty=1.3),
    Sampling(
        temperature=0.0,
        bias_ids_i32=np.array([77], np.int32).tobytes(),
        bias_values_f32=np.array([100.0], np.float32).tobytes(),
    ),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
def test_columns_draw_the_same_tokens(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=1))
    columns: tuple[Column, ...] = ("triton", "cpu")
    tokens, tops = [], []
    for column in columns:
        requests = [Request([7 * row + 2, 9], 2, sampling) for row, sampling in enumerate(SAMPLING)]
        driver = Driver(build_executor(path, column=column), requests)
        tokens.append(driver.run())
        tops.append([line.chosen for result in driver.results for line in result.logprobs])
    assert tokens[0] == tokens[1]
    assert tokens[0][2] == [77] * 2
    np.testing.assert_allclose(tops[0], tops[1], rtol=1e-3)
    assert len(tops[0]) == 2
