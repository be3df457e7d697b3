"""A rank's protocol without a model.

``SimulatedRank`` keeps a real rank's ``SlotTable``, and follows or refuses the chain as a real rank
does. Its tokens depend only on the request and the position, so that a replay gives the same text.
Its seconds come from a cost model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...kernels.splitmix import mix64
from ..planner.cost_model import Cost
from ..protocol.arrays import Int32, Int64
from ..protocol.bulk import Disband, Preload, SetPlacement, Unload
from ..protocol.chain import Chain, Verdict
from ..protocol.plan import StepPlan
from ..protocol.results import PromptLogprobs, Refused, StepResult
from ..protocol.slot_table import Rows, SlotTable


class SimulatedRank:
    """One rank's side of the protocol. One token in ``end_every`` is the end-of-sequence id 0; an
    ``end_every`` of 0 means none.
    """

    def __init__(
        self, rank: int, num_slots: int, max_pages: int, *, num_cohorts: int = 1, samples: bool = True
    ) -> None:
        self.rank = rank
        self.table = SlotTable(num_slots, max_pages, num_cohorts)
        self.vocabulary = 1000
        self.end_every = 0
        self.max_advance = 1
        self.cost = Cost()
        self.samples = samples
        self._chain = Chain()
        self._prompts: dict[int, Int32] = {}
        self._key = np.zeros(num_slots, np.uint64)
        self._stops = np.zeros(num_slots, np.bool_)
        # Number of log-probabilities wanted for a prompt, its proper length, and whether its ranks
        # are wanted.
        self._scored = np.zeros((num_slots, 3), np.int64)

    def stage(self, message: Preload | Unload | SetPlacement | Disband) -> None:
        """Takes or forgets a prompt; nothing here depends on where experts are."""
        if isinstance(message, Preload):
            self._prompts[message.staged] = np.frombuffer(message.tokens_i32, np.int32)
        elif isinstance(message, Unload):
            self._prompts.pop(message.staged, None)

    @property
    def num_staged(self) -> int:
        """Number of prompts that wait for their admission."""
        return len(self._prompts)

    def execute(self, plan: StepPlan) -> StepResult | Refused | None:
        """Returns the result of a plan: ``Refused`` on a gap in the chain, None for a plan that was
        executed before.
        """
        header, section = plan.header, plan.section
        verdict = self._chain.judge(plan)
        if verdict is Verdict.OLD:
            return None
        if verdict is Verdict.GAP:
            return Refused(header.group, header.epoch, self.rank, self._chain.last_step, header.step)
        self._chain.enter(header.epoch)
        self._chain.executed(header.step)
        if section.rebase:
            self._prompts = {
                staged: tokens for staged, tokens in self._prompts.items() if staged >= section.staged_from
            }
        lengths = {staged: len(tokens) for staged, tokens in self._prompts.items()}
        for admit in self.table.apply(section, lengths):
            prompt = self._prompts.pop(admit.staged)
            self._begin(admit.slot, prompt)
            self._key[admit.slot] = self.request_key(
                prompt[: len(prompt) - admit.num_emitted], admit.sampling.seed
            )
            self._stops[admit.slot] = bool(admit.sampling.stop_i32)
            asked = admit.sampling
            own = len(prompt) - admit.num_emitted
            self._scored[admit.slot] = asked.num_prompt_logprobs, own, asked.prompt_ranks
        rows = self.table.rows(header, section)
        tokens, counts = self._compute(rows)
        scores = self._score(rows)
        emitted = np.zeros(len(rows.slots), np.int64)
        emitted[rows.samples] = counts
        self.table.advance(rows, emitted)
        ended = self._ended(tokens, counts, rows.slots[rows.samples])
        num_tokens = int(rows.counts.sum())
        kv = int(rows.ends[: rows.num_decode].sum())
        context = int((rows.counts * rows.starts)[rows.num_decode :].sum())
        return StepResult(
            group=header.group,
            epoch=header.epoch,
            step=header.step,
            rank=self.rank,
            tokens_i32=tokens.tobytes() if self.samples else b"",
            counts_u8=b"" if not self.samples or (counts == 1).all() else counts.astype(np.uint8).tobytes(),
            ended_i32=ended.astype(np.int32).tobytes() if self.samples else b"",
            checksum=self.table.checksum() if header.checksum else 0,
            seconds=self.cost.fixed
            + self.cost.token * num_tokens
            + self.cost.kv * kv
            + self.cost.context * context,
            prompt_logprobs=scores if self.samples else (),
        )

    @staticmethod
    def request_key(prompt: Int32, seed: int) -> np.uint64:
        """Key of a request; it and the position determine each token."""
        return np.uint64(int(prompt.astype(np.uint64).sum()) * 1_000_003 + len(prompt)) ^ np.uint64(seed)

    def token(self, keys: NDArray[np.uint64], positions: Int64) -> Int32:
        """Tokens [n] of the requests with keys [n] at positions [n]; 0 ends a sequence."""
        mixed = mix64(keys ^ (positions.astype(np.uint64) << np.uint64(20)))
        tokens = 1 + (mixed % np.uint64(self.vocabulary - 1)).astype(np.int32)
        if self.end_every:
            tokens[mixed // np.uint64(7919) % np.uint64(self.end_every) == 0] = 0
        return tokens

    @staticmethod
    def logprob(key: np.uint64, positions: Int64) -> NDArray[np.float32]:
        """Log-probability of each prompt token, by its position [n]; its top-k alternatives get the
        same value.
        """
        return -(mix64(key ^ positions.astype(np.uint64)) % np.uint64(4096)).astype(np.float32)

    def _score(self, rows: Rows) -> tuple[PromptLogprobs, ...]:
        """Log-probabilities of the prompt tokens that follow each position computed now, for the
        requests that asked.
        """
        found: list[PromptLogprobs] = []
        for number, row in enumerate(range(rows.num_decode, len(rows.slots))):
            top, own, ranked = self._scored[rows.slots[row]].tolist()
            positions = np.arange(int(rows.starts[row]) + 1, min(int(rows.ends[row]) + 1, own))
            if top >= 0 and len(positions):
                values = self.logprob(self._key[rows.slots[row]], positions)
                ids = positions.astype(np.int32).repeat(top)
                tops = values.repeat(top)
                ranks = np.ones(len(positions) * ranked, np.int32)
                parts = (values.tobytes(), ids.tobytes(), tops.tobytes(), ranks.tobytes())
                found.append(PromptLogprobs(number, int(positions[0]), *parts))
        return tuple(found)

    def _begin(self, slot: int, prompt: Int32) -> None:
        """A prompt moves into a slot."""

    def _compute(self, rows: Rows) -> tuple[Int32, Int64]:
        """Does the model's part of a step: ragged tokens and counts of the rows that sample."""
        return self._sample(rows)

    def _ended(self, tokens: Int32, counts: Int64, slots: Int64) -> Int64:
        if not len(tokens):
            return np.zeros(0, np.int64)
        return np.flatnonzero((tokens[np.cumsum(counts) - 1] == 0) & (counts > 0) & self._stops[slots])

    def _sample(self, rows: Rows) -> tuple[Int32, Int64]:
        """Ragged tokens and counts of the rows that sample; a row at its limit has none."""
        slots = rows.slots[rows.samples]
        positions = rows.ends[rows.samples]
        decode = np.flatnonzero(rows.samples) < rows.num_decode
        left = np.maximum(self.table.limit[slots] - positions, 0)
        counts = np.minimum(left, 1)
        keys = self._key[slots]
        if self.max_advance > 1:
            accepted = 1 + (mix64(keys ^ positions.astype(np.uint64)) % np.uint64(self.max_advance)).astype(
                np.int64
            )
            counts[decode] = np.minimum(accepted, left)[decode]
        if (counts == 1).all():
            return self.token(keys, positions), counts
        return self._sample_ragged(slots, keys, positions, counts)

    def _sample_ragged(
        self, slots: Int64, keys: NDArray[np.uint64], positions: Int64, counts: Int64
    ) -> tuple[Int32, Int64]:
        pieces: list[Int32] = []
        for index in range(len(slots)):
            span = positions[index] + np.arange(counts[index])
            tokens = self.token(np.full(len(span), keys[index]), span)
            ends = np.flatnonzero(tokens == 0)
            if ends.size and self._stops[slots[index]]:
                tokens = tokens[: ends[0] + 1]
                counts[index] = len(tokens)
            pieces.append(tokens)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32), counts
