"""All ranks of a group, simulated at once: the state of many ``SimulatedRank`` at the cost of one.

It is for simulations in virtual time, where the planner should cost more than the ranks. It does
not simulate ranks that disagree, lost messages, or rows that advance by more than a token:
``SimulatedRank`` does. Suffixes: D data indices, S stages of the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..planner.group_plan import GroupPlan
from ..planner.settings import Settings
from ..protocol.arrays import Int64
from ..protocol.bulk import Preload, Unload
from ..protocol.plan import Header, Section
from ..protocol.results import StepResult
from ..protocol.slot_table import SlotTable

_TOKEN = np.ones(1, np.int32).tobytes()
"""The token that every row samples: outputs are hashed, and otherwise unread."""


@dataclass(frozen=True)
class StepWork:
    """Work of a step, each int64 [D].

    decodes: rows that decode. tokens: decoded and prompt tokens. sampled: rows that sample.
    decode_context, prompt_context: positions attended to, summed over decoded and over prompt
    tokens. kv_reads: positions read; a chunk of a prompt reads each position once.
    """

    decodes_D: Int64
    tokens_D: Int64
    sampled_D: Int64
    decode_context_D: Int64
    prompt_context_D: Int64
    kv_reads_D: Int64


@dataclass(frozen=True)
class Executed:
    """An executed step. ``checksums`` [D] are None unless the plan asked for them."""

    header: Header
    work: StepWork
    checksums: tuple[int, ...] | None


class SimulatedGroup:
    """The ranks of one group; plans must come in order."""

    def __init__(self, settings: Settings) -> None:
        mesh, spec = settings.mesh, settings.spec
        assert spec.max_advance == 1, "rows advance by a token"
        self._mesh = mesh
        self._num_slots = spec.max_running
        max_pages = -(-settings.max_len // settings.page_size)
        self._tables = [SlotTable(spec.max_running, max_pages, mesh.num_cohorts) for _ in range(mesh.data)]
        self._cohort = np.tile(np.arange(spec.max_running) % mesh.num_cohorts, mesh.data)
        self._staged: dict[int, int] = {}  # tokens of prompts that wait for their admission

    def stage(self, message: Preload | Unload) -> None:
        """Takes or forgets a prompt. All members of a data index get the same prompts."""
        if isinstance(message, Preload):
            self._staged[message.staged] = len(message.tokens_i32) // 4
        else:
            self._staged.pop(message.staged, None)

    def execute(self, plan: GroupPlan) -> Executed:
        """Applies a plan to all slots and advances their lengths."""
        tables = self._tables
        for data, section in plan.sections.items():
            if _changes(section):
                for admit in tables[data].apply(section, self._staged):
                    del self._staged[admit.staged]
        length = np.concatenate([table.length for table in tables])
        prompt = np.concatenate([table.prompt for table in tables])
        limit = np.concatenate([table.limit for table in tables])
        decodes = np.concatenate([table.active & ~table.held for table in tables])
        decodes &= length >= prompt
        if self._mesh.num_cohorts > 1:
            decodes &= self._cohort == plan.header.cohort
        grow = decodes.astype(np.int64)
        slots, counts = self._extends(plan)
        ends = length[slots] + counts
        sampled = slots[ends >= prompt[slots]]
        grow[slots] += counts
        longer = length + grow
        assert (longer[decodes] < limit[decodes]).all(), "a row decodes past its limit"
        context = counts * length[slots] + counts * (counts + 1) // 2
        work = StepWork(
            decodes_D=self._sum(decodes),
            tokens_D=self._sum(grow),
            sampled_D=self._sum(decodes) + self._add_up(sampled),
            decode_context_D=self._sum(longer * decodes),
            prompt_context_D=self._add_up(slots, context),
            kv_reads_D=self._sum(longer * decodes) + self._add_up(slots, ends),
        )
        for table, own in zip(tables, longer.reshape(len(tables), -1), strict=True):
            table.length[:] = own
        return Executed(
            plan.header, work, tuple(table.checksum() for table in tables) if plan.header.checksum else None
        )

    def results(self, step: Executed, stage: int, own_D: NDArray[np.float64]) -> list[StepResult]:
        """Results of the ranks of ``stage``: each works ``own_D`` seconds, and all wait for the
        slowest.
        """
        mesh, header = self._mesh, step.header
        seconds = float(own_D.max())
        results: list[StepResult] = []
        own = own_D.tolist()
        sampled = step.work.sampled_D.tolist()
        for rank in mesh.stage_ranks(stage):
            data = mesh.data_of_rank(rank)
            result = StepResult(
                group=header.group,
                epoch=header.epoch,
                step=header.step,
                rank=rank,
                tokens_i32=_TOKEN * sampled[data] if mesh.samples(rank) else b"",
                checksum=0 if step.checksums is None else step.checksums[data],
                seconds=seconds,
                waited=seconds - own[data],
            )
            results.append(result)
        return results

    def _extends(self, plan: GroupPlan) -> tuple[Int64, Int64]:
        """Slots whose prompts advance, data-major over all data indices, and their numbers of
        tokens.
        """
        parts = [
            (data, section.extend_pairs) for data, section in plan.sections.items() if section.extend_pairs
        ]
        pairs = (
            np.frombuffer(b"".join([packed for _, packed in parts]), np.int32).reshape(-1, 2).astype(np.int64)
        )
        first = np.repeat(
            [data * self._num_slots for data, _ in parts], [len(packed) // 8 for _, packed in parts]
        )
        return pairs[:, 0] + first.astype(np.int64), pairs[:, 1]

    def _sum(self, of_slots: NDArray[np.bool_] | Int64) -> Int64:
        """Sums [D] over the slots of each data index."""
        sums: Int64 = of_slots.reshape(len(self._tables), -1).sum(axis=1, dtype=np.int64)
        return sums

    def _add_up(self, slots: Int64, values: Int64 | None = None) -> Int64:
        """Sums [D] of values [n] of slots [n]; without values the number of slots."""
        sums = np.bincount(slots // self._num_slots, values, minlength=len(self._tables))
        return sums.astype(np.int64)


def _changes(section: Section) -> bool:
    """Whether a section changes any slot, apart from letting its rows advance."""
    return bool(
        section.rebase
        or section.pages_pairs
        or section.admit
        or section.free_i32
        or section.hold_i32
        or section.resume_i32
    )
