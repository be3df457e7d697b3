"""The planner against simulated ranks: every request gets its tokens, under any faults of the
network and any pressure.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from msgspec import structs

from lockstep.engine.protocol.frontends import Rejected
from lockstep.engine.protocol.message import Finish
from lockstep.engine.protocol.results import RowError, StepResult
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import World


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def assert_served(world: World) -> None:
    """Every request has ended with exactly its tokens, and no row, page or prompt is left."""
    for handle in world.requests:
        if handle in world.rejected:
            continue
        finish = world.finish[handle]
        if finish == Finish.ABORT:
            assert world.tokens[handle] == world.expected(handle)[: len(world.tokens[handle])]
            continue
        assert world.tokens[handle] == world.expected(handle), f"request {handle}"
        assert world.scores[handle] == world.expected_scores(handle)
        assert finish == (
            Finish.STOP
            if world.tokens[handle][-1:] == [0] and world.requests[handle].sampling.stop_i32
            else Finish.LENGTH
        )
    world.planner.check()
    assert int(world.planner.group.kv.used().sum()) == 0
    assert not world.planner.group.rows.state.any()
    assert all(rank.num_staged == 0 for rank in world.ranks if rank.rank not in world.dead), (
        "a preloaded prompt is left on a rank"
    )


def test_one_request() -> None:
    world = World(Mesh(data=2), pages=32, page_size=4, max_len=64)
    handle = world.submit(prompt(1, 10), 12)
    world.run()
    assert world.finish[handle] == Finish.LENGTH
    assert len(world.tokens[handle]) == 12
    assert_served(world)


def test_a_length_limit_wastes_no_position() -> None:
    world = World(Mesh(data=1), pages=32, page_size=4, max_len=64)
    world.submit(prompt(1, 5), 7)
    world.run()
    assert world.num_admits == 1
    assert world.num_plans == 7  # one prefill that samples, six decodes


def test_an_end_of_sequence_wastes_at_most_the_depth() -> None:
    world = World(Mesh(data=1), pages=64, page_size=4, max_len=200, end_every=10)
    handle = world.submit(prompt(3, 5), 190)
    world.run()
    assert world.finish[handle] == Finish.STOP
    assert world.num_plans <= len(world.tokens[handle]) + world.planner.group.mesh.depth
    assert_served(world)


@pytest.mark.parametrize(
    "mesh", [Mesh(data=1), Mesh(data=3), Mesh(data=2, pipeline=2), Mesh(data=2, tensor=2)]
)
@pytest.mark.parametrize("advance", [1, 4])
def test_many_requests(mesh: Mesh, advance: int) -> None:
    world = World(mesh, pages=40, page_size=4, max_len=96, advance=advance, end_every=20)
    for index in range(40):
        world.submit(prompt(index, 1 + index % 50), 1 + index % 40, stop=index % 3 > 0)
    world.run()
    assert 40 <= world.num_admits <= 40 + world.planner.group.counters.preemptions
    assert_served(world)


def test_pressure_preempts_and_loses_nothing() -> None:
    world = World(Mesh(data=2), pages=24, page_size=4, max_len=96)
    for index in range(24):
        world.submit(prompt(100 * index, 12), 60, stop=False)
    world.run()
    assert world.planner.group.counters.preemptions > 0
    assert_served(world)
    told = [starts[-1].preemptions for starts in world.starts.values()]
    assert sum(told) == world.planner.group.counters.preemptions
    for starts in world.starts.values():  # each admission is told of, with what came before it
        assert [start.preemptions for start in starts] == list(range(len(starts)))


def test_a_request_that_waits_for_a_block_is_counted_as_deferred() -> None:
    world = World(Mesh(data=1), pages=64, page_size=4, max_len=64, max_batch_tokens=4)
    for last in (100, 101, 102):
        world.submit([*prompt(1, 20), last], 2)
    world.planner.tidy()
    group = world.planner.group
    assert (group.num_deferred, len(group.queue)) == (2, 2)
    world.run()
    assert group.num_deferred == 0
    assert_served(world)


def test_a_prefix_sent_again_is_not_computed_again() -> None:
    world = World(Mesh(data=2), pages=200, page_size=4, max_len=256)
    world.submit(prompt(1, 200), 4)
    world.run()
    before = world.computed_prompt_tokens
    world.submit(prompt(1, 200) + [7, 8], 4)
    world.run()
    assert world.computed_prompt_tokens - before <= 2 + 4
    assert_served(world)


def test_equal_prefixes_at_once_are_computed_once_per_data_index() -> None:
    world = World(Mesh(data=2), pages=600, page_size=4, max_len=128, max_running=64, max_batch_tokens=32)
    for index in range(100):
        world.submit([*prompt(1, 100), 1000 + index], 3)
    world.run()
    assert world.computed_prompt_tokens <= 2 * 100 + 100 * 4
    assert_served(world)


def test_requests_of_one_affinity_gather_where_that_costs_little() -> None:
    def homes(world: World, *asks: tuple[list[int], int]) -> set[int]:
        """The data indices that reserve pages for prompts with their affinities."""
        before = world.planner.group.kv.used()
        for tokens, affinity in asks:
            world.submit(tokens, 3, affinity=affinity)
        world.planner.tidy()
        return set((world.planner.group.kv.used() - before).nonzero()[0].tolist())

    world = World(Mesh(data=4), pages=200, page_size=4, max_len=128)
    for affinity in range(1, 9):
        assert homes(world, (prompt(affinity, 50), affinity)) == {affinity % 4}
        world.run()
    same = prompt(20, 50)
    assert homes(world, (same, 6)) == {2}
    world.run()
    assert homes(world, (same, 7)) == {2}, "its pages are cached elsewhere"
    world.run()
    crowd = [(prompt(30 + number, 50), 5) for number in range(12)]
    assert len(homes(world, *crowd)) > 2, "others wait less"
    world.run()
    assert_served(world)


def test_a_scored_prompt_is_computed_whole_and_cached() -> None:
    world = World(Mesh(data=1), pages=200, page_size=4, max_len=256)
    world.submit(prompt(1, 100), 4)
    world.run()
    for tail, computed in (([], 100), ([7, 8], 102)):
        before = world.computed_prompt_tokens
        world.submit(prompt(1, 100) + tail, 3, scored=2)
        world.run()
        assert world.computed_prompt_tokens - before == computed
    before = world.computed_prompt_tokens
    world.submit([*prompt(1, 100), 7, 8, 9, 10, 11], 3)
    world.run()
    assert world.computed_prompt_tokens - before <= 1 + 4, "blocks computed for scores are not in the cache"
    world.submit(prompt(500, 100), 3, scored=0)
    world.submit(prompt(500, 100), 3)
    before = world.computed_prompt_tokens
    world.run()
    assert world.computed_prompt_tokens - before <= 100 + 4, "a neighbour did not wait for the same blocks"
    assert_served(world)


def test_a_request_may_sample_nothing() -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    handles = [world.submit(prompt(10 * index, 1 + 7 * index), 0, scored=index % 3) for index in range(8)]
    world.submit(prompt(5, 20), 30, stop=False)
    world.run()
    assert all(world.finish[handle] == Finish.LENGTH and world.tokens[handle] == [] for handle in handles)
    assert world.planner.group.counters.generation_tokens == 30
    assert_served(world)


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_log_probabilities_of_prompts_fit_a_step(top: int) -> None:
    """Eight prompts of 600 tokens, which one step may compute: results stay below 16 kB, which
    ``World`` checks.
    """
    world = World(Mesh(data=1), pages=2000, page_size=4, max_len=640, max_batch_tokens=8192, max_running=16)
    for index in range(8):
        world.submit(prompt(1000 * index, 600), 2, scored=top)
    world.submit(prompt(9000, 600), 2)
    world.run()
    assert_served(world)
    assert world.num_plans <= 4 + 8 * 600 * (4 + 8 * top) / 10_000


def test_a_request_that_runs_again_is_scored_from_the_first_unknown_position() -> None:
    world = World(Mesh(data=2), pages=128, page_size=4, max_len=128, max_batch_tokens=16)
    for index in range(6):
        world.submit(prompt(100 * index, 80), 20, stop=False, scored=1)
    for _ in range(8):
        world.round()
    group = world.planner.group
    kept = [request.scored for request in group.open.values() if 0 <= request.row < group.rows.num_slots]
    assert sum(kept) > 80 and 0 < sum(map(len, world.scores.values())) < 6 * 79
    emitted = sum(map(len, world.tokens.values()))
    before = world.computed_prompt_tokens
    world.replace(1)
    world.run()
    assert_served(world)
    # Whole pages are kept; two plans may be in flight.
    left = 6 * 80 - sum(kept) + 4 * len(kept) + emitted + 2 * 6
    assert world.computed_prompt_tokens - before <= left < 6 * 80, "the survivor's pages were computed again"


def test_preempted_requests_are_scored_once() -> None:
    world = World(Mesh(data=2), pages=24, page_size=4, max_len=96)
    for index in range(24):
        world.submit(prompt(100 * index, 12), 60, stop=False, scored=index % 3 - 1)
    world.run()
    assert world.planner.group.counters.preemptions > 0
    assert_served(world)


def test_sampled_blocks_are_found_by_the_next_turn() -> None:
    world = World(Mesh(data=1), pages=200, page_size=4, max_len=256)
    first = world.submit(prompt(1, 21), 40, stop=False)
    world.run()
    before = world.computed_prompt_tokens
    world.submit(prompt(1, 21) + world.tokens[first] + [5, 6], 4)
    world.run()
    assert world.computed_prompt_tokens - before <= 2 + 4 + 1


def test_a_full_queue_answers_at_once() -> None:
    world = World(Mesh(data=1), pages=32, page_size=4, max_len=64, max_queue=5)
    for index in range(20):
        world.submit(prompt(index, 5), 5)
    assert len(world.rejected) == 20 - 5 - 8  # five wait beside the eight for which there are rows
    assert all(r.status == 503 and r.retry_after >= 1 for r in world.rejected.values())
    assert {r.reason for r in world.rejected.values()} == {
        "The queue is full: 5 requests may wait (scheduler.max_queue)"
    }
    world.run()
    assert_served(world)


def test_a_request_longer_than_the_limit_is_refused() -> None:
    world = World(Mesh(data=1), pages=32, page_size=4, max_len=64)
    handle = world.submit(prompt(1, 60), 5)
    assert world.rejected[handle].status == 400
    assert "65" in world.rejected[handle].reason and "64" in world.rejected[handle].reason


def test_the_death_of_a_rank_is_a_pause() -> None:
    world = World(Mesh(data=3), pages=64, page_size=4, max_len=96)
    for index in range(12):
        world.submit(prompt(10 * index, 20), 30, stop=False)
    for _ in range(6):
        world.plan()
        for rank in range(3):
            world.stage(rank)
            world.execute(rank)
            world.deliver(rank)
    world.kill(1)
    world.run()
    assert world.planner.group.steps.epoch == 1
    assert_served(world)
    for starts in world.starts.values():
        assert [start.epoch for start in starts[:2]] == [0, 1]
        assert all(start.data != 1 for start in starts if start.epoch == 1)


def test_new_ranks_join_a_group_that_went_on_without_theirs() -> None:
    world = World(Mesh(data=3), pages=64, page_size=4, max_len=96)
    for index in range(12):
        world.submit(prompt(10 * index, 20), 30, stop=False)
    world.plan()
    world.kill(1)
    for _ in range(4):
        world.round()
    assert world.planner.group.steps.vacant == (1,)
    world.rejoin(1)
    for index in range(12, 24):
        world.submit(prompt(10 * index, 20), 30, stop=False)
    world.run()
    assert world.planner.group.steps.vacant == ()
    assert_served(world)
    assert {start.data for starts in world.starts.values() for start in starts if start.epoch == 2} == {
        0,
        1,
        2,
    }


def test_a_grammar_that_a_rank_cannot_compile_ends_its_request_alone() -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    handles = [world.submit(prompt(10 * index, 20), 6, stop=False) for index in range(6)]
    world.impossible = {handles[1], handles[4]}
    world.run()
    assert [handle for handle in handles if world.finish[handle] == Finish.ERROR] == [handles[1], handles[4]]
    assert world.tokens[handles[1]] == []
    for handle in world.impossible:
        del world.requests[handle]
    assert_served(world)


def test_a_row_that_cannot_go_on_ends_with_the_reason_and_alone() -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    handles = [world.submit(prompt(10 * index, 20), 12, stop=False) for index in range(6)]
    while min(len(world.tokens[handle]) for handle in handles) < 4:
        world.round()
    while not world.results[0]:
        world.plan()
        world.execute(0)
    result = world.results[0][0]
    assert isinstance(result, StepResult)
    group = world.planner.group
    flight = group.steps.flights[result.step]
    broken = int(group.rows.handle[flight.rows[flight.span(0)][1]])
    had = list(world.tokens[broken])
    world.results[0][0] = structs.replace(result, errors=(RowError(1, "no token follows the grammar here"),))
    world.run()
    assert world.rejected == {broken: Rejected(broken, 500, "no token follows the grammar here")}
    assert (world.tokens[broken], world.finish[broken]) == (had, Finish.ERROR)
    assert_served(world)


def test_a_replaced_rank_starts_empty_and_the_others_keep_their_pages() -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    for index in range(8):
        world.submit(prompt(10 * index, 40), 30, stop=False)
    for _ in range(6):
        world.round()
    before = world.computed_prompt_tokens
    world.replace(1)
    world.run()
    assert_served(world)
    assert world.computed_prompt_tokens - before < 8 * 40 + 4 * 30, "survivors computed their prompts again"


def test_a_lost_plan_starts_a_new_epoch() -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    world.submit(prompt(1, 20), 30, stop=False)
    for _ in range(4):
        world.plan()
        for rank in range(2):
            world.stage(rank)
            world.execute(rank)
            world.deliver(rank)
    world.plan()
    world.drop_plan(0)
    world.run()
    assert world.planner.group.steps.epoch == 1
    assert_served(world)


@pytest.mark.parametrize("known", [1, 3, 4, 9, 11])
def test_a_request_goes_on_after_the_tokens_that_its_frontend_has(known: int) -> None:
    world = World(Mesh(data=2), pages=64, page_size=4, max_len=96)
    first = world.submit(prompt(1, 10), 12, stop=False)
    world.run()
    tokens = world.tokens[first]
    again = structs.replace(
        world.requests[first],
        handle=1,
        request_id="1",
        grammar="grammar 1",
        emitted_i32=np.array(tokens[:known], np.int32).tobytes(),
    )
    world.requests[1], world.tokens[1], world.scores[1] = again, tokens[:known], []
    world.planner.submit(0, again)
    world.run()
    assert world.tokens[1] == tokens and world.finish[1] == Finish.LENGTH
    assert_served(world)


def test_a_request_whose_frontend_has_all_tokens_ends_at_once() -> None:
    world = World(Mesh(data=1), pages=64, page_size=4, max_len=96)
    first = world.submit(prompt(1, 10), 5, stop=False)
    world.run()
    tokens = world.tokens[first]
    again = structs.replace(world.requests[first], handle=1, emitted_i32=np.array(tokens, np.int32).tobytes())
    world.requests[1], world.tokens[1], world.scores[1] = again, tokens, []
    world.planner.submit(0, again)
    world.receive()
    assert world.finish[1] == Finish.LENGTH and world.planner.idle()


def test_a_held_request_sits_out_and_resumes() -> None:
    world = World(Mesh(data=1), pages=64, page_size=4, max_len=96)
    first, second = world.submit(prompt(1, 4), 40, stop=False), world.submit(prompt(50, 4), 40, stop=False)
    for _ in range(5):
        world.plan()
        while world.stage(0) or world.execute(0) or world.deliver(0):
            pass
    world.planner.hold(0, first, held=True)
    for _ in range(200):
        world.plan()
        while world.stage(0) or world.execute(0) or world.deliver(0):
            pass
    assert second in world.finish and first not in world.finish
    world.planner.hold(0, first, held=False)
    world.run()
    assert_served(world)


def test_identical_events_give_identical_plans() -> None:
    def plans() -> list[object]:
        world = World(Mesh(data=2), pages=24, page_size=4, max_len=96)
        seen: list[object] = []
        for index in range(12):
            world.submit(prompt(7 * index, 12), 40)
        for _ in range(120):
            world.plan()
            seen += [plan for queue in world.plans for plan in queue]
            for rank in range(2):
                world.stage(rank)
                world.execute(rank)
                world.deliver(rank)
        return seen

    assert plans() == plans()


FAULTS = [
    "abort",
    "hold",
    "resume",
    "twice",
    "drop result",
    "drop plan",
    "kill",
    "replace",
    "rejoin",
    "controller",
]
OPERATIONS = st.sampled_from(
    ["submit"] * 6 + ["round"] * 8 + ["plan", "stage", "execute", "deliver"] * 2 + FAULTS
)


def perform(world: World, operation: str, value: int) -> None:
    rank = value % len(world.ranks)
    if operation == "submit":
        shared = prompt(0, (value >> 4) % 40)
        scored = (-1, -1, 0, 3)[(value >> 10) % 4]
        most = 0 if scored >= 0 and (value >> 12) % 3 == 0 else 1 + value % 40
        world.submit(
            [*shared, *prompt(value % 3, 1 + value % 7)],
            most,
            seed=value % 2,
            stop=value % 2 > 0,
            scored=scored,
        )
    elif operation in ("plan", "round"):
        getattr(world, operation)()
    elif operation in ("stage", "execute"):
        getattr(world, operation)(rank)
    elif operation in ("deliver", "twice"):
        world.deliver(rank, twice=operation == "twice")
    elif operation == "abort" and world.requests:
        world.abort(value % len(world.requests))
    elif operation in ("hold", "resume") and world.requests:
        world.planner.hold(0, value % len(world.requests), held=operation == "hold")
    elif operation == "drop result":
        world.drop_result(rank)
    elif operation == "drop plan":
        world.drop_plan(rank)
    elif operation == "kill" and int(np.sum(world.planner.group.steps.alive)) > 1 and rank not in world.dead:
        world.kill(rank)
    elif operation == "replace" and rank not in world.dead:
        world.replace(rank)
    elif operation == "rejoin" and rank in world.dead:
        world.rejoin(world.mesh.data_of_rank(rank))
    elif operation == "controller":
        world.replace_controller()


# No shrinking: schedules are long, and the first failing one is already readable.
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    data=st.integers(1, 3),
    pipeline=st.integers(1, 2),
    tensor=st.integers(1, 2),
    advance=st.integers(1, 4),
    end_every=st.sampled_from([0, 8]),
    pages=st.sampled_from([26, 60]),
    script=st.lists(st.tuples(OPERATIONS, st.integers(0, 1 << 16)), min_size=30, max_size=120),
)
def test_any_schedule(
    data: int,
    pipeline: int,
    tensor: int,
    advance: int,
    end_every: int,
    pages: int,
    script: list[tuple[str, int]],
) -> None:
    """Late, lost and repeated messages, aborts, holds and deaths: checksums agree in every step,
    every row reads its own tokens from its pages, published hashes are true, a mirror of the block
    index follows it, and every client gets exactly its tokens and its prompt's log-probabilities.
    """
    world = World(
        Mesh(data=data, pipeline=pipeline, tensor=tensor),
        pages=pages,
        page_size=4,
        max_len=96,
        advance=advance,
        end_every=end_every,
    )
    for operation, value in script:
        perform(world, operation, value)
        world.planner.check()
        world.follow_index()
    for handle in world.requests:
        world.planner.hold(0, handle, held=False)
    world.run()
    if world.settings.epoch:  # the next section of each data index drops what an earlier planner sent ahead
        world.submit(prompt(9, 5), 3)
        world.run()
    assert_served(world)
