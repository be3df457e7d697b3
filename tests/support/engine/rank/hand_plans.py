"""An executor over a checkpoint, driven by plans made by hand: what a planner would send, but in
every order it may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from llguidance import LLTokenizer

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.models.config import load_config
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.models.shape import read_shape
from lockstep.engine.models.weights import load_weights
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.graphs import GraphRecorder
from lockstep.engine.rank.executor import Executor
from lockstep.engine.rank.grammars import Grammars
from lockstep.engine.rank.page_pool import KVPool, entries_of
from lockstep.engine.rank.parts import Parts
from lockstep.engine.rank.warm_up import Pages, warm_up
from lockstep.kernels.formats.kv_format import KvFormat
from lockstep.kernels.table import Column
from lockstep.moe.balance.placement import contiguous
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.dense import split_as_attention, split_over
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.tensor import UNSPLIT, TensorGroup
from support.engine.rank.run_step import run_step
from support.moe.dispatchers import dispatcher_of

GREEDY = Sampling(temperature=0.0)
PAGE_SIZE = 8
NUM_SLOTS = 20
NUM_PAGES = 256
CPU = torch.device("cpu")


def build_executor(
    path: Path,
    collectives: Collectives | None = None,
    dispatch: str = "local",
    max_len: int = 256,
    kv_format: KvFormat = "fp32",
    column: Column = "cpu",
    tensor: Collectives | None = None,
    dense: Collectives | None = None,
    stages: Collectives | None = None,
    tokens: Collectives | None = None,
    as_device: bool = False,
    recorder: GraphRecorder | None = None,
    num_slots: int = NUM_SLOTS,
    device: torch.device = CPU,
    keep_fp8: bool = False,
    vocabulary: LLTokenizer | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Executor:
    """An executor in float32 over the checkpoint ``path``; alone without ``collectives``, which are
    those of the experts. ``tensor``: the ranks that split layers; ``dense``: those that split dense
    blocks, if others do; ``stages``: those of a pipeline, and ``tokens`` they again.
    ``as_device``: the executor of a device, with a ``recorder`` if given; on this CPU unless
    ``device`` is another. ``keep_fp8``: in the FP8 of the checkpoint. ``vocabulary``: of grammars.
    ``tell`` as in ``Parts``.
    """
    alone = Collectives("alone", 0, 1, None, 1.0, device)
    collectives, tensor = collectives or alone, tensor or alone
    turns = Turns()
    split = UNSPLIT if tensor.size == 1 else TensorGroup(tensor, turns.give)
    config = load_config(path)
    stages = stages or alone
    stage = read_shape(path).stages(stages.size)[stages.index]
    placement = contiguous(stage.num_moe, config.moe.num_experts, collectives.size)
    splits = split_as_attention(split) if dense is None else split_over(dense, split, turns.give)
    dispatcher = dispatcher_of(dispatch, placement, collectives, turns, device, column)
    part = ModelPart(stage, splits)
    model = build_model(config, dispatcher, torch.float32, device, column, keep_fp8, part)
    load_weights(
        model,
        CheckpointReader(path),
        lambda layer: placement.experts_of(collectives.index, layer),
        lambda fraction: None,
    )
    entries = entries_of(config, stage.layers, split.size, kv_format)
    pool = KVPool(entries, NUM_PAGES, PAGE_SIZE, kv_format, device)
    if column == "cpu":
        warm_up(
            config,
            torch.float32,
            Pages(kv_format, PAGE_SIZE),
            functools.partial(dispatcher_of, dispatch),
            print,
        )
    parts = Parts(
        rank=collectives.index,
        model=model,
        dispatcher=dispatcher,
        groups=RankGroups(collectives, tensor, stages, *filter(None, (tokens, dense))),
        splits=splits,
        links=PipelineLinks(stages, tokens or stages, stage, device),
        turns=turns,
        samples=tensor.index == 0 and stage.last,
        tell=tell,
        pool=pool,
        device=device,
        grammars=None if vocabulary is None else Grammars(vocabulary),
    )
    if as_device:
        return DeviceExecutor(parts, num_slots, max_len, 1, 1024, recorder)
    return Executor(parts, num_slots, max_len, 1)


@dataclass
class Request:
    """A request and when it does what: admitted in step ``start``, prefilled in chunks, held in the
    steps ``held``.
    """

    prompt: list[int]
    num_new: int
    sampling: Sampling = GREEDY
    start: int = 0
    chunk: int = 10_000
    held: frozenset[int] = frozenset()
    slot: int = -1
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    is_held: bool = False

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.num_new


class Driver:
    """Plans the steps of one rank, each with the ``capacity`` of its number. Slots and pages are
    handed out in a scrambled order; results are in ``results``.
    """

    def __init__(
        self,
        executor: Executor,
        requests: Sequence[Request],
        capacity: Callable[[int], int] = lambda step: 512,
        seed: int = 0,
        microbatches: int = 1,
        num_slots: int = NUM_SLOTS,
    ) -> None:
        self.executor = executor
        self.requests = list(requests)
        self.results: list[StepResult] = []
        self.plans: list[StepPlan] = []
        self.trace = False
        self._capacity = capacity
        self._microbatches = microbatches
        self._slots = np.random.default_rng(seed).permutation(num_slots).tolist()
        self._pages = np.random.default_rng(seed).permutation(NUM_PAGES).tolist()
        self._free: list[int] = []

    def run(self, num_steps: int | None = None) -> list[list[int]]:
        """Steps until all requests are done, or ``num_steps`` times; the tokens of every
        request.
        """
        step = 0
        while (
            step < num_steps if num_steps is not None else not all(request.done for request in self.requests)
        ):
            self.step(step)
            step += 1
            assert step < 2000, "requests never finish"
        assert all(request.done for request in self.requests)
        return [request.tokens for request in self.requests]

    def step(self, step: int) -> StepResult:
        """One step: everything that is due joins it."""
        section, sampling = self._section(step)
        mode = Mode.MIXED if section.extend_pairs else Mode.DECODE
        shape = mode, self._capacity(step), self._microbatches
        header = Header(0, 0, step, step - 1, *shape, checksum=True, counts=True, trace=self.trace)
        plan = StepPlan(header, section)
        result = run_step(self.executor, plan)
        tokens = np.frombuffer(result.tokens_i32, np.int32).tolist()
        if not self.executor.samples:
            assert not tokens, f"step {step}: {len(tokens)} tokens of a rank that does not sample"
            tokens = [-1] * len(sampling)
        assert len(tokens) == len(sampling), f"step {step}: {len(tokens)} tokens for {len(sampling)} rows"
        for request, token in zip(sampling, tokens, strict=True):
            request.tokens.append(token)
            if request.done:
                self._free.append(request.slot)
                self._slots.insert(0, request.slot)
                self._pages = request.pages + self._pages
                request.slot = -1
        self.plans.append(plan)
        self.results.append(result)
        return result

    def _section(self, step: int) -> tuple[Section, list[Request]]:
        free, self._free = self._free, []
        hold, resume = self._holds(step)
        admit = [
            self._admit(request)
            for request in self.requests
            if request.slot < 0 and not request.done and step >= request.start
        ]
        running = sorted(
            (request for request in self.requests if request.slot >= 0 and not request.is_held),
            key=lambda r: r.slot,
        )
        decoding = [request for request in running if request.length >= len(request.prompt)]
        pages, extend = [], []
        sampling = list(decoding)
        for request in decoding:
            pages += self._grow(request, 1)
        for request in running:
            if request.length < len(request.prompt) and request not in decoding:
                count = min(request.chunk, len(request.prompt) - request.length)
                pages += self._grow(request, count)
                extend.append((request.slot, count))
                if request.length == len(request.prompt):
                    sampling.append(request)
        if not (free or hold or resume or admit or pages or extend):
            return Section(), sampling
        section = Section(
            free_i32=_i32(free),
            hold_i32=_i32(hold),
            resume_i32=_i32(resume),
            admit=tuple(admit),
            pages_pairs=_i32(pages),
            extend_pairs=_i32(extend),
        )
        return section, sampling

    def _holds(self, step: int) -> tuple[list[int], list[int]]:
        hold, resume = [], []
        for request in self.requests:
            if request.slot >= 0 and request.is_held != (step in request.held):
                request.is_held = not request.is_held
                (hold if request.is_held else resume).append(request.slot)
        return hold, resume

    def _admit(self, request: Request) -> Admit:
        staged = self.requests.index(request)
        self.executor.stage(staged, _i32(request.prompt))
        request.slot = self._slots.pop()
        first = [page for _, page in self._take(request, min(request.chunk, len(request.prompt)))]
        limit = len(request.prompt) + request.num_new
        return Admit(request.slot, staged, 0, 0, limit, _i32(first), request.sampling)

    def _grow(self, request: Request, count: int) -> list[tuple[int, int]]:
        """Pages (slot, page) that ``count`` more tokens need; the request's length moves on."""
        pairs = self._take(request, count)
        request.length += count
        return pairs

    def _take(self, request: Request, count: int) -> list[tuple[int, int]]:
        pairs = []
        while len(request.pages) * PAGE_SIZE < request.length + count:
            request.pages.append(self._pages.pop())
            pairs.append((request.slot, request.pages[-1]))
        return pairs


def _i32(values: Sequence[int] | Sequence[tuple[int, int]]) -> bytes:
    return np.asarray(values, np.int32).tobytes()
