"""The sequence slots of one rank: applies sections and gives the rows that a step computes.

A rank keeps one ``SlotTable`` as the host copy of its state; the planner keeps the same facts for
all ranks as arrays. Both must agree after every step, which ``checksum`` compares. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .arrays import Int32, Int64, add64, ragged
from .checksum import length_terms, page_terms
from .plan import Admit, Header, Section


@dataclass(frozen=True)
class Rows:
    """The rows of one step, in result order: decoding slots ascending, then extends as given.

    slots [R]: the slot of each row. starts [R]: its length before the step. counts [R]: tokens that
    it computes. ends [R]: starts + counts. samples [R]: whether it samples (decoding rows, and
    extends that reach the end of their prompt).
    """

    slots: Int64
    starts: Int64
    counts: Int64
    samples: NDArray[np.bool_]
    num_decode: int

    @cached_property
    def ends(self) -> Int64:
        return self.starts + self.counts


class SlotTable:
    """Slots [0, num_slots) with page tables of up to ``max_pages`` entries.

    ``length`` counts tokens whose KV has been computed, ``prompt`` the tokens of the preloaded
    prompt. A slot with length < prompt waits for ``extend``; otherwise it decodes one token in
    every step of its cohort, unless held.
    """

    def __init__(self, num_slots: int, max_pages: int, num_cohorts: int = 1) -> None:
        self.num_slots = num_slots
        self.num_cohorts = num_cohorts
        self.active = np.zeros(num_slots, np.bool_)
        self.held = np.zeros(num_slots, np.bool_)
        self.length = np.zeros(num_slots, np.int64)
        self.prompt = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.num_pages = np.zeros(num_slots, np.int64)
        self.pages = np.zeros((num_slots, max_pages), np.int32)
        self._cohort = np.arange(num_slots) % num_cohorts

    def apply(self, section: Section, prompt_lengths: dict[int, int]) -> list[Admit]:
        """Applies all fields but ``extend``; ``prompt_lengths`` are tokens of preloaded prompts.

        Returns the admissions, for the owner to set up tensors. Raises AssertionError on a plan
        that contradicts the state: a bug of the planner or of the chain.
        """
        if section.rebase:
            self.active[:] = False
            self.held[:] = False
            self.num_pages[:] = 0
        if section.free_i32:
            self._free(np.frombuffer(section.free_i32, np.int32))
        if section.hold_i32 or section.resume_i32:
            self.held[np.frombuffer(section.hold_i32, np.int32)] = True
            self.held[np.frombuffer(section.resume_i32, np.int32)] = False
        for admit in section.admit:
            self._admit(admit, prompt_lengths[admit.staged])
        if section.pages_pairs:
            self._append_pages(np.frombuffer(section.pages_pairs, np.int32).reshape(-1, 2))
        return list(section.admit)

    def rows(self, header: Header, section: Section) -> Rows:
        """The rows that this step computes, after ``apply``."""
        ready = self.length >= self.prompt
        ready &= self.active
        ready &= ~self.held
        if self.num_cohorts > 1:
            ready &= self._cohort == header.cohort
        decode = ready.nonzero()[0]
        if not section.extend_pairs:
            ones = np.ones(len(decode), np.int64)
            return Rows(decode, self.length[decode], ones, ones.astype(np.bool_), len(decode))
        pairs = np.frombuffer(section.extend_pairs, np.int32).reshape(-1, 2).astype(np.int64)
        slots = np.concatenate([decode, pairs[:, 0]])
        counts = np.concatenate([np.ones(len(decode), np.int64), pairs[:, 1]])
        starts = self.length[slots]
        samples = starts + counts >= self.prompt[slots]
        return Rows(slots, starts, counts, samples, len(decode))

    def advance(self, rows: Rows, emitted: Int64) -> None:
        """Moves lengths past a step. emitted [R]: sampled tokens per row, 0 for rows that do not
        sample.

        The length of a decoding row grows by its emitted tokens (1, or more when drafts are
        accepted, 0 at its limit), that of an extend by the prompt tokens it computed.
        """
        grow = rows.counts.copy()
        grow[: rows.num_decode] = emitted[: rows.num_decode]
        self.length[rows.slots] += grow

    def checksum(self) -> int:
        """Checksum over active slots, lengths and page tables."""
        slots = np.nonzero(self.active)[0].astype(np.int64)
        total = length_terms(slots, self.length[slots]).sum(dtype=np.uint64)
        owners, indices = ragged(self.num_pages[slots])
        owners = slots[owners]
        terms = page_terms(owners, indices, self.pages[owners, indices].astype(np.int64))
        return add64(int(total), int(terms.sum(dtype=np.uint64)))

    def _append_pages(self, pairs: Int32) -> None:
        for slot, page in pairs.tolist():
            assert self.active[slot], f"page for inactive slot {slot}"
            self.pages[slot, self.num_pages[slot]] = page
            self.num_pages[slot] += 1

    def _free(self, slots: Int32) -> None:
        assert self.active[slots].all(), f"free of inactive slots {slots.tolist()}"
        self.active[slots] = False
        self.held[slots] = False
        self.num_pages[slots] = 0

    def _admit(self, admit: Admit, prompt_length: int) -> None:
        slot = admit.slot
        assert not self.active[slot], f"admit into active slot {slot}"
        pages = np.frombuffer(admit.pages_i32, np.int32)
        self.active[slot] = True
        self.held[slot] = False
        self.length[slot] = admit.num_cached
        self.prompt[slot] = prompt_length
        self.limit[slot] = admit.limit
        self.num_pages[slot] = len(pages)
        self.pages[slot, : len(pages)] = pages
