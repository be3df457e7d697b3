"""Ranks that split dense layers and shared experts over more ranks than attention."""

from __future__ import annotations

from pathlib import Path

from lockstep.engine.protocol.message import Sampling
from lockstep.parallel.collectives import Collectives

from ...parallel.gloo_ranks import meet
from .greedy_prompts import load_prompts
from .hand_plans import GREEDY, Driver, Request, build_executor

NUM_PROMPTS, NUM_NEW, NUM_STEPS = 6, 12, 24


def requests(family: str) -> list[Request]:
    """Greedy and seeded ones: half start whole in the first step, the others one by one in
    chunks.
    """
    prompts = [entry.prompt for entry in load_prompts(family)[:NUM_PROMPTS]]
    return [
        Request(
            prompt,
            NUM_NEW,
            sampling=Sampling(temperature=0.9, top_p=0.95, seed=number) if number % 3 else GREEDY,
            start=number % 2,
            chunk=40 if number % 2 else 10_000,
        )
        for number, prompt in enumerate(prompts)
    ]


def continue_dense(
    collectives: Collectives,
    paths: dict[str, Path],
    tensor: int,
    dense: int,
    dispatch: str,
    as_device: bool = False,
) -> dict[tuple[str, int], list[list[int]]]:
    """The tokens of this data index, by family and number of microbatches. Every ``dense``
    neighbouring ranks split dense blocks, every ``tensor`` all other layers. The last data index
    has no request, if there are two or more; the first has the most.
    """
    data, index = divmod(collectives.index, tensor)
    holders = max(collectives.size // tensor - 1, 1)
    layers = meet(f"layers of data {data}", index, tensor, collectives) if tensor > 1 else None
    number, place = divmod(collectives.index, dense)
    blocks = meet(f"dense blocks {number}", place, dense, collectives)
    found = {}
    for family, path in paths.items():
        executor = build_executor(
            path, collectives, dispatch, tensor=layers, dense=blocks, as_device=as_device
        )
        for microbatches in (1, 2):
            mine = requests(family)[data::holders] if data < holders else []
            driver = Driver(executor, mine, _capacity, microbatches=microbatches)
            found[family, microbatches] = driver.run(NUM_STEPS)
    return found


def _capacity(step: int) -> int:
    """Bounds the tokens of a rank: prompts of 79 tokens at most, then rows that decode."""
    return 512 if step < 4 else 16
