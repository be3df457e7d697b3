"""OpenRequests and Generation without HTTP: the effect of each message from the engine."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, strategies as st

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.metrics.metrics import Metrics
from lockstep.engine.frontend.open_requests import OpenRequests
from lockstep.engine.frontend.requests.generation import MAX_RUNS, Generation
from lockstep.engine.frontend.requests.stops import StopRule
from lockstep.engine.protocol.frontends import Abort, Rejected, Started, Submit
from lockstep.engine.protocol.message import Finish, Sampling
from lockstep.engine.text.detokenizer import ByteDetokenizer
from lockstep.engine.text.pieces import BytePieces
from support.engine.frontend.scripted_controller import batch, started

STOP_ID = 7
LETTERS = BytePieces(lambda token: chr(token) if 33 <= token < 127 else None)
PROMPT = [1, 2, 3]


class Recorder:
    """A sink that collects text and errors."""

    def __init__(self) -> None:
        self.text = ""
        self.errors: list[ApiError] = []

    def advance(self, generation: Generation) -> None:
        self.text += generation.take_text()

    def fail(self, generation: Generation, error: ApiError) -> None:
        self.errors.append(error)


class World:
    def __init__(
        self, stops: tuple[str, ...] = (), max_tokens: int = 100, min_tokens: int = 0, include: bool = False
    ) -> None:
        self.sent: list[object] = []
        self.sink = Recorder()
        self.requests = OpenRequests(
            "f", self.sent.append, Metrics("m"), lambda: ApiError(503, "ended"), clock=lambda: 1.0
        )
        stop = StopRule(frozenset({STOP_ID}), frozenset(), stops, include)
        submit = Submit(
            handle=self.requests.new_handle(),
            request_id=self.requests.new_request_id(),
            prompt_i32=array("i", PROMPT).tobytes(),
            hashes_h128=b"",
            limit=len(PROMPT) + max_tokens,
            sampling=Sampling(min_tokens=min_tokens, stop_i32=stop.packed_i32()),
        )
        self.generation = Generation(
            submit=submit,
            index=0,
            sink=self.sink,
            prompt=PROMPT,
            detokenizer=ByteDetokenizer(LETTERS),
            stop=stop,
            matcher=stop.matcher(),
        )
        self.requests.submit(self.generation)

    def tokens(self, position: int, text: str | list[int], finish: Finish = Finish.NONE) -> None:
        tokens = list(map(ord, text)) if isinstance(text, str) else text
        self.requests.on_tokens(batch(1, [(self.generation.handle, position, tokens, finish)]))

    @property
    def aborts(self) -> int:
        return sum(isinstance(message, Abort) for message in self.sent)


def test_tokens_become_text_and_the_finish_closes() -> None:
    world = World()
    world.tokens(0, "ab")
    world.tokens(2, "c", Finish.LENGTH)
    assert (world.sink.text, world.generation.finish, len(world.requests)) == ("abc", "length", 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_repeated_tokens_are_dropped_by_position(repeats: list[tuple[int, int]]) -> None:
    world, text = World(), "abcdefghij"
    world.tokens(0, text[:5])
    for back, count in repeats:
        position = world.generation.num_received - min(back, world.generation.num_received)
        world.tokens(position, text[position : position + count])
    world.tokens(world.generation.num_received, text[world.generation.num_received :])
    assert world.sink.text == text
    assert world.generation.tokens == list(map(ord, text))


def test_after_a_gap_the_request_goes_on_from_the_tokens_it_has() -> None:
    world = World()
    world.tokens(0, "a")
    first = world.generation.handle
    world.tokens(2, "c")
    aborted, again = world.sent[-2:]
    assert aborted == Abort(first) and isinstance(again, Submit)
    assert (again.handle, again.emitted_i32) == (world.generation.handle, array("i", [ord("a")]).tobytes())
    world.requests.on_tokens(batch(1, [(first, 3, [ord("x")], Finish.NONE), (first, 4, [], Finish.ABORT)]))
    world.tokens(1, "bc", Finish.LENGTH)
    assert (world.sink.text, world.generation.finish, world.sink.errors) == ("abc", "length", [])
    assert len(world.requests) == 0


def test_gaps_again_and_again_are_an_error() -> None:
    world = World()
    for _ in range(9):
        assert not world.sink.errors
        world.tokens(1, "b")
    assert world.sink.errors[0].status_code == 500
    assert "Output tokens 0 to 0 were lost" in world.sink.errors[0].detail
    assert (world.aborts, len(world.requests)) == (9, 0)


def test_everything_open_is_submitted_again_and_every_abort_repeated() -> None:
    world = World()
    world.tokens(0, "ab")
    world.requests.submit_again()
    again = world.sent[-1]
    assert isinstance(again, Submit)
    assert (again.handle, again.emitted_i32) == (
        world.generation.handle,
        array("i", map(ord, "ab")).tobytes(),
    )
    world.tokens(2, "c")
    world.requests.abort(world.generation)
    world.requests.submit_again()
    assert world.sent[-1] == Abort(world.generation.handle) and len(world.requests) == 0
    assert world.sink.text == "abc"


def test_a_stop_string_aborts_and_later_tokens_do_not_count() -> None:
    world = World(stops=("cd",))
    world.tokens(0, "abc")
    assert world.sink.text == "ab"
    world.tokens(3, "dxx")
    assert (world.sink.text, world.generation.finish, world.generation.stop_reason) == ("ab", "stop", "cd")
    assert len(world.generation.tokens) == 4, "the token that completes the stop string counts"
    assert (world.aborts, len(world.requests)) == (1, 1), "the entry stays until the engine's end"
    world.tokens(6, "yy")
    world.tokens(8, [], Finish.ABORT)
    assert (world.sink.text, world.aborts, len(world.requests)) == ("ab", 1, 0)


def test_no_abort_when_the_engine_ends_with_the_stop_string() -> None:
    world = World(stops=("cd",), max_tokens=4)
    world.tokens(0, "abcd", Finish.LENGTH)
    assert (world.generation.finish, world.aborts) == ("stop", 0)


def test_held_back_text_is_given_out_at_the_end() -> None:
    world = World(stops=("cd",), max_tokens=3)
    world.tokens(0, "abc", Finish.LENGTH)
    assert (world.sink.text, world.generation.finish) == ("abc", "length")


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abcd")])
def test_include_stop_str_in_output(include: bool, text: str) -> None:
    world = World(stops=("cd",), include=include)
    world.tokens(0, "abcd")
    assert world.sink.text == text


def test_a_stop_string_counts_only_behind_min_tokens() -> None:
    world = World(stops=("ab",), min_tokens=3)
    world.tokens(0, "abcab")
    assert (world.sink.text, world.generation.finish) == ("abc", "stop")


def test_a_stop_id_counts_as_a_token_and_is_the_stop_reason() -> None:
    world = World()
    world.tokens(0, [ord("a"), STOP_ID], Finish.STOP)
    assert (world.sink.text, world.generation.stop_reason, len(world.generation.tokens)) == ("a", STOP_ID, 2)


@given(st.text(alphabet="abc", min_size=1, max_size=20), st.lists(st.integers(1, 6), min_size=1), st.data())
def test_the_text_does_not_depend_on_how_steps_group_the_tokens(
    text: str, groups: list[int], data: st.DataObject
) -> None:
    stops = tuple(data.draw(st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=2)))
    results = []
    for sizes in ([1] * len(text), groups * len(text)):
        world, position = World(stops=stops, max_tokens=len(text)), 0
        for size in sizes:
            part = text[position : position + size]
            if part:
                world.tokens(
                    position, part, Finish.LENGTH if position + len(part) == len(text) else Finish.NONE
                )
            position += size
        generation = world.generation
        results.append((world.sink.text, generation.finish, generation.stop_reason, generation.tokens))
    assert results[0] == results[1]


def test_a_rejection_carries_its_status_and_retry_after() -> None:
    world = World()
    world.requests.on_rejected(Rejected(world.generation.handle, 503, "queue full", 2.5))
    error = world.sink.errors[0]
    assert (error.status_code, error.detail, error.headers) == (503, "queue full", {"Retry-After": "3"})
    assert len(world.requests) == 0


def test_an_engine_error_fails_the_request() -> None:
    world = World()
    world.tokens(0, "a", Finish.ERROR)
    assert [(error.status_code, error.detail) for error in world.sink.errors] == [(503, "ended")]


def test_started_books_the_cached_tokens_and_unknown_handles_are_ignored() -> None:
    world = World()
    world.requests.on_started(started([world.generation.handle, 12345], 2))
    world.requests.on_tokens(
        batch(1, [(99, 0, [65], Finish.NONE), (world.generation.handle, 0, [65], Finish.NONE)])
    )
    assert (world.generation.num_cached, world.sink.text) == (2, "A")


def test_a_request_that_runs_again_keeps_its_first_runs_and_counts_all() -> None:
    """Preemptions and epochs may put it back any number of times; its story stays small."""
    world = World()
    generation = world.generation
    for number in range(MAX_RUNS + 8):
        columns = [array("i", [value]).tobytes() for value in (16 * number, number % 2, number, 3 + number)]
        world.requests.on_started(Started(array("q", [generation.handle]).tobytes(), *columns))
        world.tokens(number, "a")
    assert (generation.num_runs, len(generation.runs)) == (MAX_RUNS + 8, MAX_RUNS)
    assert (generation.num_cached, generation.num_preemptions) == (0, MAX_RUNS + 7)
    second = generation.runs[1]
    assert (second.data, second.epoch, second.num_cached, second.preemptions) == (1, 4, 16, 1)
    assert second.num_tokens == 1


def test_abort_is_sent_once() -> None:
    world = World()
    world.requests.abort(world.generation)
    world.requests.abort(world.generation)
    world.tokens(0, "a")
    assert (world.aborts, world.sink.text, len(world.requests)) == (1, "", 1)


def test_losing_the_controller_fails_everything_and_forgets_it() -> None:
    world = World()
    world.requests.fail_all(ApiError(500, "lost"))
    assert ([error.detail for error in world.sink.errors], len(world.requests)) == (["lost"], 0)
    world.tokens(0, "a")
    assert world.sink.text == ""


def test_a_broken_answer_does_not_cost_the_others_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = World(), World()
    second.requests.submit(first.generation)

    def broken(generation: Generation) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(first.sink, "advance", broken)
    rows = [(world.generation.handle, 0, [65], Finish.NONE) for world in (first, second)]
    second.requests.on_tokens(batch(1, rows))
    assert second.sink.text == "A"
    assert first.sink.errors[0].status_code == 500
    assert second.aborts == 1
