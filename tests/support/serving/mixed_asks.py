"""Requests whose tokens are known, to be asked again under load, where they must be the same.

What a request should get is computed by transformers from what the server gave, all at once.
Batches differ in the last bits of float32, so tokens count as certain up to the first position
where a choice is close: of an expert, of the best token, of the tokens that top-k keeps, or of a
draw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.reference.sampling import Purpose, uniform

from ..engine.rank.greedy_prompts import Reference
from .random_checkpoint import random_checkpoint
from .served import Answer, Ask, Body, Served

ROUTER_MARGIN = 1e-5
LOGIT_MARGIN = 1e-4
DRAW_MARGIN = 1e-4
TOP_K = 4


@dataclass(frozen=True)
class Known:
    """A request body and its ``tokens``, as far as they are certain."""

    body: Body
    tokens: list[int]

    def ask(self, num_tokens: int, cut_after: int | None = None, **fields: object) -> Ask:
        """The same request for ``num_tokens``."""
        return Ask(
            self.body | {"max_tokens": num_tokens, "return_token_ids": True} | fields, cut_after=cut_after
        )

    def assert_same(self, answer: Answer, what: str) -> None:
        """``answer`` begins as this request does, as far as both go."""
        sure = min(len(self.tokens), len(answer.tokens))
        assert answer.tokens[:sure] == self.tokens[:sure], f"{what}: not the tokens of {self.body}"


def random_prompt(dice: random.Random, least: int, most: int) -> list[int]:
    return [dice.randrange(5, 1000) for _ in range(dice.randint(least, most))]


def random_bodies(dice: random.Random, num: int, prompts: tuple[int, int]) -> list[Body]:
    """``num`` requests with prompts of a length within ``prompts``; every second one is greedy, the
    others are seeded.
    """
    ways: list[Body] = [
        {"temperature": 1.0, "top_k": TOP_K, "seed": dice.randrange(2**40)}
        if index % 2
        else {"temperature": 0.0}
        for index in range(num)
    ]
    return [{"prompt": random_prompt(dice, *prompts), "ignore_eos": True, **way} for way in ways]


class Oracle:
    """A model by transformers, by default that of ``random_checkpoint``, and what it makes of
    requests.
    """

    def __init__(self, model: Path | None = None) -> None:
        model = model or random_checkpoint()
        self._reference = Reference(model, json.loads((model / "config.json").read_text()))

    def score(self, prompt: list[int]) -> list[float]:
        """Log-probabilities of the tokens of ``prompt`` after its first, as far as no choice of an
        expert before them is close.
        """
        logits_TV, routers_T = self._reference.compute(prompt)
        close = (routers_T[:-1] < ROUTER_MARGIN).numpy()
        num = int(np.argmax(close)) if close.any() else len(close)
        values = logits_TV[:-1].log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
        return [float(value) for value in values[:num]]

    def know(self, served: Served, bodies: Sequence[Body], num_tokens: int, at_once: int = 64) -> list[Known]:
        """Asks each for ``num_tokens`` and compares with the reference; keeps those of which at
        least half is certain.
        """
        known: list[Known] = []
        for start in range(0, len(bodies), at_once):
            asks = [Known(body, []).ask(num_tokens) for body in bodies[start : start + at_once]]
            for ask, answer in zip(asks, served.ok(asks), strict=True):
                assert len(answer.tokens) == num_tokens
                known.append(Known(ask.body, self.certain(ask.body, answer.tokens)))
        kept = [each for each in known if len(each.tokens) >= num_tokens / 2]
        assert len(kept) >= 0.7 * len(bodies), (
            f"only {len(kept)} of {len(bodies)} requests are certain enough"
        )
        return kept

    def certain(self, body: Body, tokens: list[int]) -> list[int]:
        """The leading tokens that leave no doubt. Raises AssertionError where one of them is not
        the reference's.
        """
        prompt = body["prompt"]
        logits_TV, routers_T = self._reference.compute(prompt + tokens[:-1])
        logits_TV = logits_TV[len(prompt) - 1 :]
        choose = _draws if body["temperature"] else _best
        expected, close = choose(logits_TV, body, len(prompt))
        close |= (routers_T < ROUTER_MARGIN).cumsum(0)[len(prompt) - 1 :].bool().numpy()
        num = int(np.argmax(close)) if close.any() else len(tokens)
        assert tokens[:num] == expected[:num], f"not what transformers makes of {body}"
        return tokens[:num]


def _best(logits_TV: Tensor, body: Body, num_prompt: int) -> tuple[list[int], np.ndarray]:
    """The best token at each position, and whether another is close."""
    top_T2, best_T2 = logits_TV.topk(2)
    return best_T2[:, 0].tolist(), (top_T2[:, 0] - top_T2[:, 1] < LOGIT_MARGIN).numpy()


def _draws(logits_TV: Tensor, body: Body, num_prompt: int) -> tuple[list[int], np.ndarray]:
    """The token drawn at each position by inverse CDF in vocabulary order over the top-k, and
    whether another is close.
    """
    positions = np.arange(num_prompt, num_prompt + len(logits_TV))
    draw_T = torch.from_numpy(uniform(np.full(len(positions), body["seed"]), positions, Purpose.SAMPLE))
    top_TK, ids_TK = logits_TV.double().topk(body["top_k"] + 1)
    kept_TK, order_TK = ids_TK[:, :-1].sort(-1)
    cdf_TK = (top_TK[:, :-1] / body["temperature"]).softmax(-1).gather(-1, order_TK).cumsum(-1)
    drawn = kept_TK.gather(
        -1, (cdf_TK <= draw_T[:, None]).sum(-1, keepdim=True).clamp(max=body["top_k"] - 1)
    )[:, 0]
    close = ((cdf_TK - draw_T[:, None]).abs().amin(-1) < DRAW_MARGIN) | (
        top_TK[:, -2] - top_TK[:, -1] < LOGIT_MARGIN
    )
    return drawn.tolist(), close.numpy()
