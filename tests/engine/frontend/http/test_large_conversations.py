"""Conversations of thousands of elements: the longest that are taken cost little to validate,
longer ones are refused before any element is looked at.

Times are CPU seconds of this thread, in multiples of a validation of objects that are as plain as
can be, on the same machine.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest, TokenizeChat
from lockstep.engine.frontend.api.strict import MAX_ELEMENTS
from lockstep.engine.frontend.dialects.chat_turns import ChatTurns
from lockstep.engine.frontend.dialects.messages_chat import CountAsked, MessagesAsked
from lockstep.engine.frontend.dialects.responses_chat import ResponsesAsked
from lockstep.engine.frontend.http.bodies import Adapter, parse
from lockstep.engine.frontend.process import COLLECT_EVERY

CHAT: Adapter[Any] = TypeAdapter(ChatRequest)
TOKENIZE: Adapter[Any] = TypeAdapter(TokenizeChat)
USER: dict[str, Any] = {"role": "user", "content": "x"}
PARTS: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "x"}]}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLER = {"role": "assistant", "content": "x", "tool_calls": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "a", "content": "x"}
FUNCTION_CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
FUNCTION_OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]}
TEXT = {"type": "text", "text": "x" * 200}
THOUGHT = {"type": "thinking", "thinking": "x" * 200}
LARGEST: dict[str, tuple[Adapter[Any], str, list[dict[str, Any]]]] = {
    "messages": (CHAT, "messages", [USER] * MAX_ELEMENTS),
    "messages to tokenize": (TOKENIZE, "messages", [USER] * MAX_ELEMENTS),
    "messages of parts": (CHAT, "messages", [PARTS] * (MAX_ELEMENTS // 2)),
    "parts of one message": (CHAT, "messages", [USER | {"content": [TEXT] * (MAX_ELEMENTS - 1)}]),
    "calls and results": (CHAT, "messages", [CALLER, TOOL] * (MAX_ELEMENTS // 4)),
    "items": (ResponsesAsked, "input", [USER] * MAX_ELEMENTS),
    "items of parts": (
        ResponsesAsked,
        "input",
        [USER | {"content": [{"type": "input_text", "text": "x"}]}] * (MAX_ELEMENTS // 2),
    ),
    "items of calls": (ResponsesAsked, "input", [FUNCTION_CALL, FUNCTION_OUTPUT] * (MAX_ELEMENTS // 4)),
    "turns": (MessagesAsked, "messages", [USER] * MAX_ELEMENTS),
    "turns to count": (CountAsked, "messages", [USER] * MAX_ELEMENTS),
    "turns of blocks": (MessagesAsked, "messages", [PARTS] * (MAX_ELEMENTS // 2)),
    "turns of results": (MessagesAsked, "messages", [USER | {"content": [RESULT]}] * (MAX_ELEMENTS // 3)),
    "uses in one turn": (
        MessagesAsked,
        "messages",
        [{"role": "assistant", "content": [USE] * (MAX_ELEMENTS // 2 - 1)}],
    ),
    "texts in one turn": (
        MessagesAsked,
        "messages",
        [{"role": "assistant", "content": [TEXT] * (MAX_ELEMENTS - 1)}],
    ),
    "thoughts in one turn": (
        MessagesAsked,
        "messages",
        [{"role": "assistant", "content": [THOUGHT] * (MAX_ELEMENTS - 1)}],
    ),
}


class Plain(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str


@pytest.fixture(autouse=True)
def as_in_a_frontend() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY, *before[1:])
    yield
    gc.set_threshold(*before)


def seconds(work: Callable[[], object]) -> float:
    """CPU time of the quickest of three."""
    times = []
    for _ in range(3):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.fixture(scope="module")
def unit() -> float:
    """CPU time to validate as many plain objects as a conversation may have elements."""
    plain = TypeAdapter(list[Plain])
    return seconds(lambda: plain.validate_python([USER] * MAX_ELEMENTS))


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_conversation_is_taken_at_little_cost(name: str, unit: float) -> None:
    """An object of a chat costs two plain ones, and a translated one is validated twice."""
    adapter, field, turns = LARGEST[name]
    body = json.dumps({"model": "m", "max_tokens": 1, field: turns}).encode()
    assert len(body) < 8 * 2**20
    used = seconds(lambda: parse(body, adapter))
    print(f"{name}: {used:.3f} s of CPU, {used / unit:.1f} units")
    assert used < 10 * unit


@pytest.mark.parametrize("name", LARGEST)
def test_a_larger_one_is_refused_before_its_elements_are_validated(name: str) -> None:
    adapter, field, turns = LARGEST[name]
    turns = [*turns, *turns[:1], USER]
    with pytest.raises(ApiError, match=rf"{field}: Input should have at most {MAX_ELEMENTS}") as refused:
        parse(json.dumps({"model": "m", "max_tokens": 1, field: turns}).encode(), adapter)
    assert (refused.value.status_code, refused.value.param) == (400, field)


@pytest.mark.parametrize(
    ("adapter", "field", "turns"),
    [
        (CHAT, "messages", [USER, {"role": "assistant", "content": "y"}] * 5000),
        (CHAT, "messages", [PARTS] * 10_000),
        (CHAT, "messages", [CALLER, TOOL] * 5000),
        (ResponsesAsked, "input", [USER] * 10_000),
        (ResponsesAsked, "input", [FUNCTION_CALL, FUNCTION_OUTPUT] * 5000),
        (MessagesAsked, "messages", [PARTS] * 10_000),
    ],
)
def test_histories_of_ten_thousand_messages_are_taken(
    adapter: Adapter[Any], field: str, turns: list[dict[str, Any]]
) -> None:
    parse(json.dumps({"model": "m", "max_tokens": 1, field: turns}).encode(), adapter)


def test_too_many_system_blocks_are_refused_by_their_field() -> None:
    body = {
        "max_tokens": 1,
        "messages": [USER],
        "system": [{"type": "text", "text": "x"}] * (MAX_ELEMENTS + 1),
    }
    with pytest.raises(ApiError, match="system: Input should have at most"):
        parse(json.dumps(body).encode(), MessagesAsked)


@pytest.mark.parametrize("kind", ["content", "reasoning"])
def test_the_parts_of_a_reply_are_joined_in_linear_time(kind: str) -> None:
    """Twice the parts cost about twice as much; joined one by one they would cost four times."""

    def joined(count: int) -> None:
        turns = ChatTurns()
        for _ in range(count):
            if kind == "content":
                turns.content("x" * 400, "", joins=True)
            else:
                turns.reasoning("x" * 400, "")
        assert len(turns.messages[0][kind]) == count * 401 - 1

    assert seconds(lambda: joined(16_000)) < 6 * seconds(lambda: joined(4000)) + 0.002
