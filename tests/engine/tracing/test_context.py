"""W3C Trace Context: headers that are taken, and those that are ignored."""

from __future__ import annotations

import pytest

from lockstep.engine.tracing.context import TraceContext, context_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def read(*parents: str, states: tuple[str, ...] = ()) -> TraceContext | None:
    headers = [(b"traceparent", parent.encode()) for parent in parents]
    return context_of([*headers, *((b"tracestate", state.encode()) for state in states)])


@pytest.mark.parametrize("flags, sampled", [("00", False), ("01", True), ("02", False), ("03", True)])
def test_a_caller_is_read_and_written_again(flags: str, sampled: bool) -> None:
    found = read(f"00-{TRACE}-{SPAN}-{flags}", states=("a=1", "b=2"))
    assert found == TraceContext(TRACE, SPAN, sampled, "a=1,b=2")
    assert found.traceparent.decode() == f"00-{TRACE}-{SPAN}-{int(sampled):02x}"


def test_a_later_version_may_have_more_parts() -> None:
    assert read(f"cc-{TRACE}-{SPAN}-01-what-ever") == TraceContext(TRACE, SPAN, True)


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}-{SPAN}-01\u00e9",
    ],
)
def test_an_invalid_parent_is_ignored(parent: str) -> None:
    assert read(parent) is None


def test_two_parents_are_ignored() -> None:
    assert read(f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01") is None


def test_a_state_beyond_every_bound_is_dropped_alone() -> None:
    assert read(f"00-{TRACE}-{SPAN}-01", states=("a=" + "x" * 9000,)) == TraceContext(TRACE, SPAN, True)
