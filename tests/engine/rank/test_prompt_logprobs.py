"""Log-probabilities of prompts as a rank computes them are transformers', however the work is cut
and whatever runs beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.message import Sampling, encode
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import PromptLogprobs
from lockstep.engine.rank import prompt_logprobs as prompt_scores
from lockstep.parallel.collectives import Collectives
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import PAGE_SIZE, Driver, Request, build_executor
from support.engine.rank.run_step import run_step
from support.engine.rank.scored_prompts import assert_told, prompts, reference, score_share, scored, tell
from support.parallel.gloo_ranks import run_ranks

CONFIGS = {"qwen3_moe": qwen3_moe_config(), "deepseek_v3": deepseek_v3_config()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scores")
    return {family: write_checkpoint(folder / family, config) for family, config in CONFIGS.items()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("world", "dispatch", "split"), [(1, "local", False), (2, "all_to_all", False), (2, "all_gather", True)]
)
def test_they_are_those_of_transformers(
    checkpoints: dict[str, Path], family: str, world: int, dispatch: str, split: bool
) -> None:
    path = checkpoints[family]
    alone = Collectives("alone", 0, 1, None, 1.0, torch.device("cpu"))
    if world == 1:
        shares = [score_share(alone, path, dispatch)]
    else:
        shares = run_ranks(score_share, world, path, dispatch, split)
    if split:
        assert all(not told for _, told in shares.pop()), "the first rank of a tensor group says them"
    found = [each for share in shares for each in share]
    expected = reference(path, [prompt for prompt, _ in found])
    for (prompt, told), logprobs_TV in zip(found, expected, strict=True):
        assert_told(told, prompt, logprobs_TV, 4)


def test_logits_are_made_a_slice_at_a_time(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints["qwen3_moe"]
    executor = build_executor(path)
    monkeypatch.setattr(prompt_scores, "_SLICE_BYTES", 4 * 320 * 3 + 7)
    widths, logits = [], executor.model.logits
    monkeypatch.setattr(
        executor.model, "logits", lambda hidden_RD: (widths.append(len(hidden_RD)), logits(hidden_RD))[1]
    )
    [prompt] = prompts(1, 6)
    driver = Driver(executor, [Request(prompt, 1, scored(2))])
    driver.run()
    assert max(widths) == 3 and sum(widths) == len(prompt) - 1 + 1
    assert_told(tell(driver)[0], prompt, reference(path, [prompt])[0], 2)


def test_what_was_emitted_is_no_prompt_and_what_is_cached_is_left_out(checkpoints: dict[str, Path]) -> None:
    """Admitted again with a page that is there and three tokens sampled before, at a limit that
    leaves nothing to sample.
    """
    path = checkpoints["qwen3_moe"]
    tokens = prompts(1, 9)[0][:1] + list(range(40, 70))
    executor = build_executor(path)
    driver = Driver(executor, [Request(tokens, 1, scored(1))])
    driver.run()
    executor.stage(9, np.asarray(tokens, np.int32).tobytes())
    [shared] = driver.requests[0].pages[:1]
    pages = np.asarray([shared, *(page for page in range(200, 210) if page != shared)], np.int32).tobytes()
    admit = Admit(3, 9, PAGE_SIZE, 3, len(tokens), pages, scored(1))
    extend = np.array([3, len(tokens) - PAGE_SIZE], np.int32).tobytes()
    result = run_step(
        executor,
        StepPlan(
            Header(0, 0, 0, -1, Mode.MIXED, 512), Section(rebase=True, admit=(admit,), extend_pairs=extend)
        ),
    )
    assert (result.tokens_i32, result.counts_u8) == (b"", b"\0")
    [again] = result.prompt_logprobs
    assert again.position == PAGE_SIZE + 1
    known = [chosen for _, chosen, *_ in tell(driver)[0]]
    assert np.allclose(
        np.frombuffer(again.chosen_f32, np.float32), known[PAGE_SIZE : len(tokens) - 3 - 1], atol=1e-4
    )


def test_the_size_that_is_documented() -> None:
    line = PromptLogprobs(3, 1000, bytes(4 * 512), bytes(4 * 5 * 512), bytes(4 * 5 * 512))
    assert len(encode(line)) == 22_551
    assert "22,551" in (PromptLogprobs.__doc__ or "")


def test_one_token_and_no_request_for_them_say_nothing(checkpoints: dict[str, Path]) -> None:
    executor = build_executor(checkpoints["qwen3_moe"])
    driver = Driver(
        executor, [Request([7], 2, scored(2)), Request(prompts(1, 4)[0], 2, Sampling(num_logprobs=3))]
    )
    driver.run()
    assert tell(driver) == [[], []]
