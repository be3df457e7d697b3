"""Ranks that generate while their experts move."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from msgspec import structs

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.protocol.plan import Header, StepPlan, Transfer
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.executor import Executor
from lockstep.engine.rank.expert_slots import ExpertSlots, StagePlace
from lockstep.moe.balance.placement import EMPTY, Placement
from lockstep.moe.experts import read_slot
from lockstep.parallel.collectives import Collectives

from ...parallel.gloo_ranks import meet
from .greedy_prompts import load_prompts
from .hand_plans import Driver, Request, build_executor

COMMIT_AFTER = 3
"""Steps from the start of moves to their commit: they land within."""


class Mover:
    """An executor whose plans start moves in step 2, and commit them when they have landed."""

    def __init__(self, executor: Executor, moves: Transfer | None, collectives: Collectives) -> None:
        self._executor, self._moves, self._collectives = executor, moves, collectives
        self.samples = executor.samples
        self.stage = executor.stage
        self.commits: list[int] = []

    def take(self) -> StepResult | None:
        return self._executor.take()

    def submit(self, plan: StepPlan) -> None:
        header: Header = plan.header
        if self._moves is not None and header.step == 2:
            header = structs.replace(header, moves=(self._moves,))
        if self._moves is not None and header.step == 2 + COMMIT_AFTER:
            # As a planner does: only once all ranks have named them.
            slots = self._executor._parts.slots
            assert slots is not None
            for arriving in slots._arriving.values():
                if arriving.pending is not None:
                    # Once: gloo does not return from a second wait for a large message.
                    arriving.rows, arriving.pending = slots._group.wait(arriving.pending), None
            slots.landed()
            header = structs.replace(header, commits=(self._moves.id,))
            self.commits.append(header.step)
        self._executor.submit(StepPlan(header, plan.section))


def with_slots(executor: Executor, collectives: Collectives, path: Path, name: str = "moves") -> Executor:
    """The same executor, packed, whose experts may move, in a group called ``name``."""
    parts = executor._parts
    parts.model.pack()
    placement = parts.dispatcher.placement
    layers = range(placement.num_layers)
    group = meet(name, collectives.index, collectives.size, collectives)
    place = StagePlace(0, collectives.index, layers)
    slots = ExpertSlots(parts.model, parts.dispatcher, placement, place, group, CheckpointReader(path))
    executor._parts = dataclasses.replace(parts, slots=slots)
    return executor


def rotated(placement: Placement, number: int) -> tuple[Transfer, Placement]:
    """Every slot gets the expert of the same slot on the rank before; in layer 0 the first two
    slots only.
    """
    before_LWS = placement.experts_LWS
    after_LWS = np.roll(before_LWS, 1, axis=1)
    after_LWS[0, :, 2:] = before_LWS[0, :, 2:]
    rows = [
        (layer, after_LWS[layer, rank, slot], (rank - 1) % placement.num_ranks, rank, slot)
        for layer, rank, slot in np.argwhere(after_LWS != before_LWS).tolist()
        if after_LWS[layer, rank, slot] != EMPTY
    ]
    emptied = [
        (layer, EMPTY, EMPTY, rank, slot)
        for layer, rank, slot in np.argwhere((after_LWS == EMPTY) & (before_LWS != EMPTY)).tolist()
    ]
    moves_i32 = np.array(rows + emptied, np.int32).tobytes()
    return Transfer(number, 0, moves_i32), Placement(after_LWS, placement.num_experts)


def generate(
    collectives: Collectives, path: Path, family: str, dispatch: str, microbatches: int, moving: bool
) -> tuple[list[list[int]], bool]:
    """This rank's tokens, and whether its slots and placement are at last as they should be."""
    executor = with_slots(build_executor(path, collectives, dispatch), collectives, path)
    placement = executor._parts.dispatcher.placement
    moves, after = rotated(placement, 5)
    mover = Mover(executor, moves if moving else None, collectives)
    prompts = [entry.prompt for entry in load_prompts(family)[collectives.index :: collectives.size][:2]]
    requests = [Request(prompt, 12, start=3 * number) for number, prompt in enumerate(prompts)]
    driver = Driver(mover, requests, lambda step: 640, microbatches=microbatches)  # type: ignore[arg-type]
    driver.run(24)
    tokens = [request.tokens for request in requests]
    slots = executor._parts.slots
    assert slots is not None
    if not moving:
        return tokens, slots.version == 0
    # The same placement, read from the checkpoint.
    fresh = with_slots(build_executor(path, collectives, dispatch), collectives, path, "fresh")
    loaded = fresh._parts.slots
    assert loaded is not None
    loaded.place(5, slots.placement_i32)
    held = _held(after, collectives)
    same = all(
        bool((read_slot(moved, slot) == read_slot(read, slot)).all())
        for moved, read in zip(executor.model.experts(), fresh.model.experts(), strict=True)
        for slot in held
    )
    shown = bool((executor._parts.dispatcher.placement.experts_LWS == after.experts_LWS).all())
    return tokens, same and shown and slots.version == loaded.version == 5


def _held(placement: Placement, collectives: Collectives) -> list[int]:
    """The slots of this rank that have an expert in every layer."""
    own_LS = placement.experts_LWS[:, collectives.index]
    return np.flatnonzero((own_LS != EMPTY).all(axis=0)).tolist()
