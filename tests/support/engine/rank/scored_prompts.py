"""Log-probabilities of prompt tokens, from executors driven by hand-made plans and from
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.engine.protocol.message import Sampling
from lockstep.parallel.collectives import Collectives

from ...parallel.gloo_ranks import meet
from ..models.reference_models import load_reference
from .hand_plans import GREEDY, Driver, Request, build_executor

Told = list[tuple[int, float, list[int], list[float]]]
"""Per position of a prompt: the position, the log-probability of its token, and ids and values of
the likeliest.
"""


def scored(top: int) -> Sampling:
    return Sampling(
        temperature=0.7, seed=5, repetition_penalty=1.5, num_logprobs=top, num_prompt_logprobs=top
    )


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(2, 320, int(length)).tolist() for length in draw.integers(2, longest, count)]


def tell(driver: Driver) -> list[Told]:
    """The log-probabilities reported for every request of a driver that has run."""
    told: list[Told] = [[] for _ in driver.requests]
    owner: dict[int, int] = {}
    for plan, result in zip(driver.plans, driver.results, strict=True):
        owner |= {admit.slot: admit.staged for admit in plan.section.admit}
        slots = np.frombuffer(plan.section.extend_pairs, np.int32)[::2].tolist()
        for item in result.prompt_logprobs:
            chosen = np.frombuffer(item.chosen_f32, np.float32)
            ids = np.frombuffer(item.top_ids_i32, np.int32).reshape(len(chosen), -1).tolist()
            values = np.frombuffer(item.top_f32, np.float32).reshape(len(chosen), -1).tolist()
            positions = range(item.position, item.position + len(chosen))
            told[owner[slots[item.of]]] += zip(positions, chosen.tolist(), ids, values, strict=True)
    return told


def score_share(
    collectives: Collectives, path: Path, dispatch: str, split: bool = False
) -> list[tuple[list[int], Told]]:
    """This rank's prompts, whole and in chunks, beside requests that are not scored; what it said
    of those that are. ``split``: all ranks have the same prompts, and parts of the layers.
    """
    share = 0 if split else collectives.index
    layers = meet("layers", collectives.index, collectives.size, collectives) if split else None
    mine = prompts(5, 10 + share)
    requests = [
        Request(prompt, 3, scored(4), start=index, chunk=11 if index % 2 else 1000)
        for index, prompt in enumerate(mine)
    ]
    requests += [
        Request(prompt, 12, GREEDY, start=index) for index, prompt in enumerate(prompts(3, 20 + share))
    ]
    driver = Driver(build_executor(path, collectives, dispatch, tensor=layers), requests, lambda step: 640)
    driver.run(40)
    return list(zip(mine, tell(driver), strict=False))


@torch.inference_mode()
def reference(path: Path, sequences: Sequence[list[int]]) -> list[Tensor]:
    """transformers' log-probabilities [T, V] after each token of every sequence."""
    model = load_reference(path, torch.float32)
    return [model(torch.tensor([tokens])).logits[0].log_softmax(-1) for tokens in sequences]


def assert_told(told: Told, prompt: list[int], logprobs_TV: Tensor, top: int) -> None:
    """Every position of ``prompt`` but the first, once and in order, with the reference's
    numbers.
    """
    assert [position for position, *_ in told] == list(range(1, len(prompt)))
    for position, chosen, ids, values in told:
        expected_V = logprobs_TV[position - 1]
        assert abs(chosen - float(expected_V[prompt[position]])) < 1e-4
        assert np.allclose(values, expected_V[ids], atol=1e-4) and len(set(ids)) == top
        assert np.allclose(values, expected_V.topk(top).values, atol=1e-4)
