from __future__ import annotations

from hypothesis import given, strategies as st

from lockstep.engine.frontend.requests.stops import StopAutomaton, StopMatcher

texts = st.text(alphabet="abc", max_size=24)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def run(pieces: list[str], stop: list[str], include: bool) -> tuple[str, str | None]:
    matcher, out = StopMatcher(StopAutomaton(stop), include), ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.finish(), None


def reference(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter: the first stop string to complete, of several the longest."""
    for end in range(1, len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end if include else end - len(candidate)], candidate
    return text, None


@given(texts, stops, st.booleans(), st.data())
def test_any_chunking_gives_the_reference_text(
    text: str, stop: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, stop, include) == reference(text, stop, include)


@given(texts, stops)
def test_nothing_of_a_stop_string_is_given_out_before_it_is_decided(text: str, stop: list[str]) -> None:
    matcher, out = StopMatcher(StopAutomaton(stop), include=False), ""
    final, _ = reference(text, stop, include=False)
    for letter in text:
        out += matcher.push(letter)
        assert final.startswith(out)
        if matcher.matched is not None:
            break


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopMatcher(StopAutomaton(["stop"]), include=False)
    assert matcher.push("a st") == "a "
    assert matcher.push("ep") == "step"


@given(texts, texts, stops)
def test_a_stop_string_that_completes_before_min_tokens_does_not_count(
    early: str, late: str, stop: list[str]
) -> None:
    matcher = StopMatcher(StopAutomaton(stop), include=False)
    out = matcher.push(early, armed=False)
    assert matcher.matched is None
    out += matcher.push(late)
    out += matcher.finish() if matcher.matched is None else ""
    expected = early + late
    for end in range(len(early) + 1, len(expected) + 1):
        found = [candidate for candidate in stop if expected[:end].endswith(candidate)]
        if found:
            expected = expected[: end - len(max(found, key=len))]
            break
    assert out == expected


def test_a_thousand_stop_strings_cost_no_more_steps_than_one() -> None:
    """Counts the states visited, which no machine makes faster."""

    class Counted(StopAutomaton):
        visits = 0

        def advance(self, state: int, char: str) -> int:
            Counted.visits += 1
            return super().advance(state, char)

    text = "a" * 3 + "b" * 1000
    visits = []
    for strings in (
        ["aac"],
        ["a" * length + "c" for length in range(1, 16)] + [f"z{n}" for n in range(1000)],
    ):
        automaton = Counted(strings)
        Counted.visits = 0
        matcher = StopMatcher(automaton, include=False)
        assert "".join(map(matcher.push, text)) + matcher.finish() == text
        visits.append(Counted.visits)
    assert visits[1] <= visits[0] + 8
