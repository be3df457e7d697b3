"""What a rank does to show that its layout does not change greedy tokens."""

from __future__ import annotations

from pathlib import Path

from lockstep.parallel.collectives import Collectives

from .greedy_prompts import NUM_NEW, load_prompts
from .hand_plans import Driver, Request, build_executor

NUM_STEPS = 100  # enough for every way below


def continue_prompts(collectives: Collectives, path: Path, family: str, dispatch: str) -> dict[str, list[list[int]]]:
    """The tokens of this rank's share of the prompts, by the way they were planned: all at once, in chunks, and one by one.

    Ranks take prompts in turn but the last one takes none, so that it takes part without ever having a token.
    """
    holders = max(collectives.size - 1, 1)
    mine = [entry.prompt for entry in load_prompts(family)[collectives.index :: holders]] if collectives.index < holders else []
    ways = {
        "batched": [Request(prompt, NUM_NEW) for prompt in mine],
        "chunked": [Request(prompt, NUM_NEW, start=i, chunk=9 + i) for i, prompt in enumerate(mine)],
    }
    found = {}
    for seed, (name, requests) in enumerate(ways.items()):
        executor = build_executor(path, collectives, dispatch)
        found[name] = Driver(executor, requests, capacity=1024, seed=seed).run(NUM_STEPS)
    return found
