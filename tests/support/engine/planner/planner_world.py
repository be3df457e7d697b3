"""A planner and simulated ranks, with a network in between that tests make late, lossy and
repetitive.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
from msgspec import structs

from lockstep.engine.controller.inheritance import Inheritance
from lockstep.engine.kv.hashing import chain_hashes, hash_root
from lockstep.engine.planner.index_changes import BlocksRemoved
from lockstep.engine.planner.outbox import Start
from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.arrays import Int32, Int64
from lockstep.engine.protocol.bulk import Preload, Preloaded, Published, RankHello
from lockstep.engine.protocol.chain import Verdict
from lockstep.engine.protocol.frontends import Abort, Rejected, Started, Submit, TokenBatch
from lockstep.engine.protocol.message import Finish, Sampling, encode
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import PromptLogprobs, Refused, StepResult
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.rank.published_blocks import PublishedBlocks
from lockstep.engine.simulation.simulated_rank import SimulatedRank
from lockstep.parallel.mesh import Mesh

ROOT = hash_root("model", "bf16")
STOP = np.array([0], np.int32).tobytes()
MAX_STEP_BYTES = 16 << 10


class CheckedRank(SimulatedRank):
    """A simulated rank with page contents: every row must find exactly its own tokens in its
    pages.
    """

    def __init__(
        self,
        rank: int,
        num_slots: int,
        max_pages: int,
        *,
        pool: int,
        page_size: int,
        num_cohorts: int,
        samples: bool,
    ) -> None:
        super().__init__(rank, num_slots, max_pages, num_cohorts=num_cohorts, samples=samples)
        self.page_size = page_size
        self.content = np.full((pool, page_size, 2), -1, np.int64)
        self.history: list[list[int]] = [[] for _ in range(num_slots)]
        self.blocks: dict[bytes, list[int]] = {}
        self.published = PublishedBlocks(pool, page_size)

    def execute(self, plan: StepPlan) -> StepResult | Refused | None:
        if self._chain.judge(plan) is Verdict.NEXT:
            self.published.overwrite(plan.section)
        result = super().execute(plan)
        if isinstance(result, StepResult):
            self.published.publish(plan.section)
            pages = np.frombuffer(plan.section.publish_i32, np.int32).tolist()
            for index, page in enumerate(pages):
                block = plan.section.publish_h128[16 * index : 16 * index + 16]
                wrong = f"rank {self.rank}: page {page} is published under a wrong hash"
                assert self.content[page, :, 0].tolist() == self.blocks[block], wrong
        return result

    def _begin(self, slot: int, prompt: Int32) -> None:
        self.history[slot] = prompt.tolist()

    def _compute(self, rows: Rows) -> tuple[Int32, Int64]:
        for slot, start, count in zip(
            rows.slots.tolist(), rows.starts.tolist(), rows.counts.tolist(), strict=True
        ):
            self._read(slot, start)
            self._write(slot, start, start + count)
        tokens, counts = super()._compute(rows)
        ends = np.cumsum(counts).tolist()
        for slot, end, count in zip(rows.slots[rows.samples].tolist(), ends, counts.tolist(), strict=True):
            length = int(self.table.length[slot])
            self.history[slot] += tokens[end - count : end].tolist()
            if count > 1:
                self._write(slot, length + 1, length + count)
        return tokens, counts

    def _places(self, slot: int, start: int, end: int) -> tuple[Int64, Int64]:
        positions = np.arange(start, end)
        return self.table.pages[slot, positions // self.page_size].astype(
            np.int64
        ), positions % self.page_size

    def _read(self, slot: int, length: int) -> None:
        pages, offsets = self._places(slot, 0, length)
        wrong = f"rank {self.rank}: slot {slot} reads tokens that are not its own"
        assert self.content[pages, offsets, 0].tolist() == self.history[slot][:length], wrong
        assert (self.content[pages, offsets, 1] == np.arange(length)).all()

    def _write(self, slot: int, start: int, end: int) -> None:
        pages, offsets = self._places(slot, start, end)
        assert pages.size == 0 or int(self.table.num_pages[slot]) * self.page_size >= end, (
            f"slot {slot} writes past its pages"
        )
        self.content[pages, offsets, 0] = self.history[slot][start:end]
        self.content[pages, offsets, 1] = np.arange(start, end)


class World:
    """Planner, ranks, and everything that each client has received so far."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        pages: int,
        page_size: int,
        max_len: int,
        advance: int = 1,
        end_every: int = 0,
        **spec: object,
    ) -> None:
        settings = {
            "max_running": 8,
            "max_batch_tokens": 64,
            "checksum_every": 1,
            "max_advance": advance,
        } | spec
        scheduler = SchedulerSpec(**settings)  # type: ignore[arg-type]
        self.settings = Settings(mesh, scheduler, [pages] * mesh.data, page_size, max_len, tell_changes=True)
        self.planner = Planner(self.settings)
        self.mesh, self.page_size = mesh, page_size
        group = self.planner.group
        self.ranks = [
            CheckedRank(
                rank,
                group.spec.max_running,
                -(-max_len // page_size),
                pool=pages,
                page_size=page_size,
                num_cohorts=mesh.pipeline,
                samples=group.mesh.samples(rank),
            )
            for rank in range(mesh.world)
        ]
        for rank in self.ranks:
            rank.max_advance, rank.end_every = advance, end_every
        self.plans: list[deque[StepPlan]] = [deque() for _ in self.ranks]
        self.bulk: list[deque[object]] = [deque() for _ in self.ranks]
        self.results: list[deque[StepResult | Refused]] = [deque() for _ in self.ranks]
        self.dead: set[int] = set()
        self.aborted: set[int] = set()
        self.requests: dict[int, Submit] = {}
        self.tokens: dict[int, list[int]] = {}
        self.starts: dict[int, list[Start]] = {}
        self.scores: dict[int, list[float]] = {}  # log-probabilities of prompt tokens but the first
        self.finish: dict[int, Finish] = {}
        self.rejected: dict[int, Rejected] = {}
        self.impossible: set[int] = set()  # handles whose grammars ranks cannot compile
        self.computed_prompt_tokens = 0
        self.num_plans = 0
        self.num_admits = 0
        self.mirror: Counter[bytes] = Counter()  # data indices that hold each block, as a router knows it

    # ------------------------------------------------------------- clients

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        seed: int = 0,
        stop: bool = True,
        scored: int = -1,
        affinity: int = 0,
    ) -> int:
        """Submits a request. ``scored``: top alternatives wanted at every prompt token, -1 for no
        log-probabilities of the prompt.
        """
        handle = len(self.requests)
        tokens = np.array(prompt, np.int32).tobytes()
        submit = Submit(
            handle=handle,
            request_id=str(handle),
            prompt_i32=tokens,
            hashes_h128=chain_hashes(ROOT, tokens, self.page_size),
            limit=len(prompt) + max_tokens,
            sampling=Sampling(seed=seed, stop_i32=STOP if stop else b"", num_prompt_logprobs=scored),
            grammar=f"grammar {handle}",
            affinity=affinity,
        )
        self.requests[handle] = submit
        self.tokens[handle], self.scores[handle] = [], []
        self._know_blocks(prompt + self.expected(handle))
        self.planner.submit(0, submit)
        self.receive()
        return handle

    def _know_blocks(self, tokens: list[int]) -> None:
        hashes = chain_hashes(ROOT, np.array(tokens, np.int32).tobytes(), self.page_size)[16:]
        for index in range(len(hashes) // 16):
            block = tokens[index * self.page_size : (index + 1) * self.page_size]
            for rank in self.ranks:
                rank.blocks[hashes[16 * index : 16 * index + 16]] = block

    def abort(self, handle: int) -> None:
        self.aborted.add(handle)
        self.planner.abort(0, Abort(handle))
        self.receive()

    def expected(self, handle: int) -> list[int]:
        """The tokens a request must have when it ends by itself."""
        submit = self.requests[handle]
        key, num_prompt = self._key(submit)
        positions = np.arange(num_prompt, submit.limit)
        tokens = self.ranks[0].token(np.full(len(positions), key), positions).tolist()
        if submit.sampling.stop_i32 and 0 in tokens:
            tokens = tokens[: tokens.index(0) + 1]
        return list(tokens)

    def expected_scores(self, handle: int) -> list[float]:
        """The prompt log-probabilities that a request must have before its first token."""
        submit = self.requests[handle]
        key, num_prompt = self._key(submit)
        if submit.sampling.num_prompt_logprobs < 0:
            return []
        return [float(value) for value in SimulatedRank.logprob(key, np.arange(1, num_prompt))]

    @staticmethod
    def _key(submit: Submit) -> tuple[np.uint64, int]:
        prompt = np.frombuffer(submit.prompt_i32, np.int32)
        return SimulatedRank.request_key(prompt, submit.sampling.seed), len(prompt)

    def receive(self) -> None:
        """Delivers the planner's messages for frontends."""
        for _, message in self.planner.take_output():
            if isinstance(message, Rejected):
                self.rejected[message.handle] = message
            elif isinstance(message, PromptLogprobs):
                self._receive_scores(message)
            elif isinstance(message, TokenBatch):
                self._receive_batch(message)
            elif isinstance(message, Started):
                self._receive_starts(message)

    def _receive_starts(self, message: Started) -> None:
        packed = (message.cached_i32, message.data_i32, message.preemptions_i32, message.epochs_i32)
        columns = [np.frombuffer(column, np.int32).tolist() for column in packed]
        handles = np.frombuffer(message.handles_i64, np.int64).tolist()
        for handle, *start in zip(handles, *columns, strict=True):
            self.starts.setdefault(handle, []).append(Start(handle, *start))

    def _receive_scores(self, message: PromptLogprobs) -> None:
        values = np.frombuffer(message.chosen_f32, np.float32).tolist()
        known, top = self.scores[message.of], self.requests[message.of].sampling.num_prompt_logprobs
        assert 1 <= message.position <= len(known) + 1, (
            f"request {message.of}: position {message.position}, has {len(known)}"
        )
        assert len(message.top_ids_i32) == len(message.top_f32) == 4 * top * len(values)
        known += values[len(known) + 1 - message.position :]

    def _receive_batch(self, batch: TokenBatch) -> None:
        tokens = np.frombuffer(batch.tokens_i32, np.int32).tolist()
        counts = np.frombuffer(batch.counts_i32, np.int32).tolist()
        positions = np.frombuffer(batch.positions_i32, np.int32).tolist()
        finishes = np.frombuffer(batch.finish_u8, np.uint8).tolist()
        start = 0
        handles = np.frombuffer(batch.handles_i64, np.int64).tolist()
        for handle, position, count, finish in zip(handles, positions, counts, finishes, strict=True):
            assert handle not in self.finish, f"request {handle} speaks after its end"
            if count or finish < Finish.ABORT:
                assert self.scores[handle] == self.expected_scores(handle), (
                    f"request {handle}: has tokens before its prompt's log-probabilities"
                )
            assert position == len(self.tokens[handle]), (
                f"request {handle}: position {position}, has {len(self.tokens[handle])}"
            )
            self.tokens[handle] += tokens[start : start + count]
            start += count
            if finish:
                self.finish[handle] = Finish(finish)

    # ------------------------------------------------------------- the network

    def plan(self) -> bool:
        plan = self.planner.plan()
        if plan is not None:
            self.num_plans += 1
            for data, section in plan.sections.items():
                pairs = np.frombuffer(section.extend_pairs, np.int32).reshape(-1, 2)
                self.num_admits += len(section.admit)
                self.computed_prompt_tokens += int(pairs[:, 1].sum())
                for rank in self.planner.group.mesh.members(data):
                    self.plans[rank].append(StepPlan(plan.header, section))
        self.tidy()
        return plan is not None

    def follow_index(self) -> None:
        """Mirrors the block index by its changes: they name true tokens, and only blocks that are
        there leave.
        """
        for change in self.planner.take_changes():
            if isinstance(change, BlocksRemoved):
                for key in change.keys:
                    assert self.mirror[key.tobytes()] > 0, "a block leaves that was not there"
                    self.mirror[key.tobytes()] -= 1
            else:
                assert not change.parent or change.parent in self.ranks[0].blocks
                hashes = chain_hashes(change.parent or ROOT, change.tokens_i32, self.page_size)[16:]
                assert hashes == change.hashes_h128, "blocks are told with other tokens or another parent"
                self.mirror.update(hashes[start : start + 16] for start in range(0, len(hashes), 16))
        index = Counter(key.tobytes() for key in self.planner.group.kv.told())
        assert index == +self.mirror, "the mirror differs from the index"

    def tidy(self) -> None:
        self.planner.tidy()
        for rank, message in self.planner.take_staging():
            self.bulk[rank].append(message)
        self.receive()

    def stage(self, rank: int) -> bool:
        """Delivers one bulk message to a rank and its acknowledgement back."""
        if not self.bulk[rank]:
            return False
        message = self.bulk[rank].popleft()
        self.ranks[rank].stage(message)  # type: ignore[arg-type]
        if isinstance(message, Preload):
            self._check_grammar(message)
            if rank not in self.dead:
                handle = int(message.grammar.split()[1])
                self.planner.staged(
                    Preloaded(rank, message.staged, "no such word" if handle in self.impossible else "")
                )
        return True

    def _check_grammar(self, message: Preload) -> None:
        """A prompt comes with its request's grammar and the number of tokens that follow it
        already.
        """
        submit = self.requests[int(message.grammar.split()[1])]
        assert message.grammar == submit.grammar
        assert len(message.tokens_i32) // 4 - message.num_emitted == len(submit.prompt_i32) // 4
        assert message.tokens_i32.startswith(submit.prompt_i32)

    def execute(self, rank: int) -> bool:
        """Lets a rank execute its next plan."""
        if not self.plans[rank] or rank in self.dead:
            return False
        result = self.ranks[rank].execute(self.plans[rank].popleft())
        assert len(encode(result)) <= MAX_STEP_BYTES
        if result is not None:
            self.results[rank].append(result)
        return True

    def deliver(self, rank: int, *, twice: bool = False) -> bool:
        """Hands a rank's oldest undelivered result to the planner."""
        if not self.results[rank]:
            return False
        result = self.results[rank].popleft()
        for _ in range(2 if twice else 1):
            if isinstance(result, Refused):
                self.planner.refused(result)
            else:
                self.planner.results([result])
        self.tidy()
        return True

    def drop_result(self, rank: int) -> None:
        if self.results[rank]:
            self.results[rank].popleft()

    def drop_plan(self, rank: int) -> None:
        if self.plans[rank]:
            self.plans[rank].popleft()

    def kill(self, rank: int) -> None:
        """A rank dies; the group goes on without its data index."""
        data = self.planner.group.mesh.data_of_rank(rank)
        self.dead.update(self.planner.group.mesh.members(data))
        self.planner.begin_epoch(absent=self._absent())
        self.tidy()

    def rejoin(self, data: int) -> None:
        """New ranks take the places of those of a data index that has been away."""
        members = self.planner.group.mesh.members(data)
        self.dead.difference_update(members)
        for rank in members:
            self._renew(rank)
        self.planner.begin_epoch(absent=self._absent())
        self.tidy()

    def replace(self, rank: int) -> None:
        """A rank dies and another takes its place, without pages; the others keep theirs."""
        self._renew(rank)
        self.planner.begin_epoch(emptied=[self.planner.group.mesh.data_of_rank(rank)], absent=self._absent())
        self.tidy()

    def _absent(self) -> list[int]:
        return sorted({self.mesh.data_of_rank(rank) for rank in self.dead})

    def _renew(self, rank: int) -> None:
        old = self.ranks[rank]
        new = CheckedRank(
            rank,
            old.table.num_slots,
            old.table.pages.shape[1],
            pool=len(old.content),
            page_size=self.page_size,
            num_cohorts=self.mesh.pipeline,
            samples=old.samples,
        )
        new.max_advance, new.end_every, new.blocks = old.max_advance, old.end_every, old.blocks
        self.ranks[rank] = new
        self.plans[rank].clear()
        self.bulk[rank].clear()
        self.results[rank].clear()

    def replace_controller(self) -> None:
        """Another planner takes over from what ranks and clients have. Results are still on their
        way; messages to ranks are thrown away with the connection.
        """
        mesh, inheritance = self.mesh, Inheritance(self.settings.epoch)
        for number, rank in enumerate(self.ranks):
            inheritance.published(Published(number, *rank.published.all()))
            epoch = rank._chain.epoch
            hello = RankHello(number, "", number, 0, self.page_size, 0, 0, 0, "simulated", epoch=epoch)
            inheritance.hello(hello)
            rank._chain.abandon()
            self.plans[number].clear()
            self.bulk[number].clear()
        self.settings = structs.replace(self.settings, epoch=inheritance.first_epoch)
        self.planner = Planner(self.settings)
        self.mirror.clear()
        inheritance.hand_over(mesh, self.settings.num_pages, self.planner)
        self.planner.begin_epoch(absent=self._absent())
        for handle, submit in self.requests.items():
            if handle in self.finish or handle in self.rejected:
                continue
            if handle in self.aborted:
                self.finish[handle] = Finish.ABORT
                continue
            emitted = np.array(self.tokens[handle], np.int32).tobytes()
            self.planner.submit(0, structs.replace(submit, emitted_i32=emitted))
        self.receive()

    def round(self) -> None:
        """One plan, then one message each way for every rank."""
        self.plan()
        for rank in range(len(self.ranks)):
            while self.stage(rank):
                pass
            self.execute(rank)
            self.deliver(rank)

    def run(self, limit: int = 20_000) -> None:
        """Runs an orderly network until nothing moves; a rank that is overdue is set back."""
        for _ in range(limit):
            moved = self.plan()
            for rank in range(len(self.ranks)):
                while self.stage(rank):
                    moved = True
                moved |= self.execute(rank)
                moved |= self.deliver(rank)
            if moved:
                continue
            if self.planner.idle():
                return
            group = self.planner.group
            overdue = [d for d in range(group.mesh.data) if group.steps.alive[d] and self._overdue(d)]
            waiting, states = len(group.queue), group.rows.state.tolist()
            assert overdue, f"stuck: {len(group.open)} open, {waiting} waiting, states {states}"
            for data in overdue:
                self.planner.resync(data)
            self.tidy()
        raise AssertionError(f"not done after {limit} rounds")

    def _overdue(self, data: int) -> bool:
        group = self.planner.group
        return any(
            group.steps.acknowledged[rank] < group.steps.last_step for rank in group.mesh.members(data)
        )
