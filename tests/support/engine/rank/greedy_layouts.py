"""A rank that shows that its layout does not change greedy tokens."""

from __future__ import annotations

from pathlib import Path

from lockstep.parallel.collectives import Collectives

from ...parallel.gloo_ranks import meet
from .greedy_prompts import NUM_NEW, load_prompts
from .hand_plans import Driver, Request, build_executor

NUM_STEPS = 100  # enough for what is planned below


def continue_prompts(
    collectives: Collectives, paths: dict[str, Path], dispatch: str, microbatches: int = 1
) -> dict[str, list[list[int]]]:
    """The tokens of this rank's share of every family's prompts; ``paths`` are the families'
    checkpoints. Half of the prompts start whole in the first step, the others one by one in chunks,
    while the first ones decode.

    Ranks take prompts in turn but the last one takes none, so that it takes part without ever
    having a token.
    """
    holders = max(collectives.size - 1, 1)
    found = {}
    for family, path in paths.items():
        mine = (
            [entry.prompt for entry in load_prompts(family)[collectives.index :: holders]]
            if collectives.index < holders
            else []
        )
        executor = build_executor(path, collectives, dispatch)
        found[family] = Driver(executor, _alternating(mine), _capacity, microbatches=microbatches).run(
            NUM_STEPS
        )
    return found


def continue_split(
    collectives: Collectives, paths: dict[str, Path], tensor: int, microbatches: int = 1
) -> dict[str, list[list[int]]]:
    """As ``continue_prompts`` where every ``tensor`` neighbouring ranks split layers and have the
    same prompts. Ranks that do not sample have -1 for every token.
    """
    data, index = divmod(collectives.index, tensor)
    holders = collectives.size // tensor
    group = meet(f"layers of data {data}", index, tensor, collectives)
    found = {}
    for family, path in paths.items():
        prompts = [entry.prompt for entry in load_prompts(family)[data::holders]]
        executor = build_executor(path, collectives, "all_gather", tensor=group)
        driver = Driver(executor, _alternating(prompts), _capacity, microbatches=microbatches)
        found[family] = driver.run(NUM_STEPS)
    return found


def _alternating(prompts: list[list[int]]) -> list[Request]:
    """Half of the prompts start whole in the first step, the others one by one in chunks."""
    return [
        Request(prompt, NUM_NEW, start=i, chunk=9 + i) if i % 2 else Request(prompt, NUM_NEW)
        for i, prompt in enumerate(prompts)
    ]


def _capacity(step: int) -> int:
    """Bounds the tokens of a rank: eight prompts of 79 tokens at most, then chunks beside rows that
    decode, then those alone.
    """
    return 640 if step == 0 else 144 if step < 26 else 16
