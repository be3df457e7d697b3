"""A rank that shows that its layout does not change greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store

from lockstep.engine.protocol.message import Sampling
from lockstep.parallel.collectives import Collectives, Pending

from ...parallel.gloo_ranks import DEADLINE, meet
from .greedy_prompts import NUM_NEW, load_prompts
from .hand_plans import GREEDY, Driver, Request, build_executor

NUM_STEPS = 100  # enough for what is planned below
ASKED = [
    Sampling(temperature=0.9, top_p=0.95, seed=3),
    Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=4),
    Sampling(temperature=1.0, seed=5, num_logprobs=1),
    Sampling(temperature=0.0, num_logprobs=2),
    Sampling(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.3),
    Sampling(temperature=0.0, allowed_i32=np.array([10, 90], np.int32).tobytes()),
    Sampling(temperature=0.0, min_tokens=4, stop_i32=np.arange(60, dtype=np.int32).tobytes()),
    Sampling(
        temperature=0.0,
        bias_ids_i32=np.array([7], np.int32).tobytes(),
        bias_values_f32=np.array([50.0], np.float32).tobytes(),
    ),
]


def continue_prompts(
    collectives: Collectives,
    paths: dict[str, Path],
    dispatch: str,
    microbatches: int = 1,
    as_device: bool = False,
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
        executor = build_executor(path, collectives, dispatch, as_device=as_device)
        found[family] = Driver(executor, _alternating(mine), _capacity, microbatches=microbatches).run(
            NUM_STEPS
        )
    return found


def continue_split(
    collectives: Collectives,
    paths: dict[str, Path],
    tensor: int,
    microbatches: int = 1,
    as_device: bool = False,
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
        executor = build_executor(path, collectives, "all_gather", tensor=group, as_device=as_device)
        driver = Driver(executor, _alternating(prompts), _capacity, microbatches=microbatches)
        found[family] = driver.run(NUM_STEPS)
    return found


def continue_mixed(
    collectives: Collectives, path: Path, as_device: bool = False
) -> tuple[list[list[int]], list[list[int]], set[int]]:
    """Rows that ask for all kinds of sampling, and plain greedy ones that stay when the others have
    ended: tokens where all ranks split layers, by the executor of a device or not; those of a rank
    alone on its CPU; and the numbers of columns that ranks gathered once only plain ones were left.
    """
    group = Counted("layers", collectives.index, collectives.size, collectives.store)
    group.build(0)
    prompts = [entry.prompt for entry in load_prompts("qwen3_moe")]
    asked = [*ASKED, *[GREEDY] * 3]
    found = []
    for tensor in (group, None):
        on_device = as_device and tensor is not None
        executor = build_executor(
            path, collectives if tensor else None, "all_gather", tensor=tensor, as_device=on_device
        )
        requests = [
            Request(prompt, 6 if sampling is not GREEDY else 14, sampling=sampling)
            for prompt, sampling in zip(prompts, asked, strict=False)
        ]
        driver = Driver(executor, requests, _capacity)
        for step in range(14):
            group.columns = set() if step == 8 else group.columns
            driver.step(step)
        found.append([request.tokens for request in requests])
        if tensor is None:
            break
        columns = group.columns
    return found[0], found[1], columns


class Counted(Collectives):
    """Collectives that note how many columns are gathered of a split layer."""

    def __init__(self, name: str, index: int, size: int, store: Store | None) -> None:
        super().__init__(name, index, size, store, DEADLINE, torch.device("cpu"))
        self.columns: set[int] = set()

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        if what == "the columns of a split layer":
            self.columns.add(rows.shape[1])
        return super().all_gather(rows, what, fill)


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
