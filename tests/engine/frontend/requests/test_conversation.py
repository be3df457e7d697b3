"""The habits of a chat template are found by probes, and messages are given to it in its shape."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.requests.conversation import conversation_text
from lockstep.engine.frontend.requests.earlier_calls import call_arguments_for
from lockstep.engine.frontend.requests.habits import Beside, Habits, Thinking, learn_habits
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.templates import ITEMS, JOINED, NINE, STRINGS
from support.engine.text.tiny_tokenizer import TEMPLATE, TOOL_TEMPLATE, write_model

USER = {"role": "user", "content": "x"}

SWITCH = Thinking(("enable_thinking",), reads_none=True)


@pytest.mark.parametrize(
    ("template", "habits"),
    [
        (TEMPLATE, Habits()),
        (TOOL_TEMPLATE, Habits(shows_tools=True, thinking=SWITCH)),
        (ITEMS, Habits(shows_tools=True)),
        (JOINED, Habits(text_arguments=True, null_content=True, raw_arguments=True, beside=Beside.APART)),
        (STRINGS, Habits(shows_tools=True, raw_arguments=True)),
        (NINE, Habits(shows_tools=True, beside=Beside.APART)),
        ("{{ raise_exception('no') }}", Habits()),
    ],
    ids=["plain", "hermes", "items", "joined", "strings", "nine", "refusing"],
)
def test_habits(template: str, habits: Habits, tmp_path: Path) -> None:
    assert learn_habits(Codec(write_model(tmp_path, template=template))) == habits


def test_calls_are_written_in_the_way_of_the_template(tmp_path: Path) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    ask = ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    for template, expected in (
        (JOINED, 'function f\n{"a":  1}'),
        (ITEMS, "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>"),
    ):
        codec = Codec(write_model(tmp_path, template=template))
        assert conversation_text(codec, learn_habits(codec), ask) == expected


def rendered(tmp_path: Path, template: str, *messages: dict[str, Any], **fields: Any) -> str:
    codec = Codec(write_model(tmp_path, template=template))
    ask = ChatRequest.model_validate({"messages": [*messages], **fields})
    return conversation_text(codec, learn_habits(codec), ask)


def calling(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


@pytest.mark.parametrize(
    ("given", "as_object"),
    [
        ("", {}),
        ("  ", {}),
        (None, {}),
        ('{"', {"": None}),
        ('{"ci', {"ci": None}),
        ('{"a": tr', {"a": True}),
        ('{"a": -', {"a": 0}),
        ('{"a": "x\\', {"a": "x\\"}),
        ('{"a": "\\u12', {"a": "\u1200"}),
        ('{"a": [1, {"b": "c"', {"a": [1, {"b": "c"}]}),
        ('{"a": 1,', {"a": 1}),
        ('{"a": 1e400}', {"a": "1e400"}),
        ('{"a": ' + "9" * 5000 + "}", {"a": "9" * 5000}),
        ('{"a": "\\ud800"}', {"arguments": '{"a": "\\ud800"}'}),
        ("[]", {"arguments": "[]"}),
        ("ci", {"arguments": "ci"}),
        ('{"a": oops}', {"arguments": '{"a": oops}'}),
        ('{"a": 1} x', {"arguments": '{"a": 1} x'}),
        ('{"a": {"b": null}}', {"a": {"b": None}}),
        ({"a": None}, {"a": None}),
    ],
)
def test_any_arguments_of_an_earlier_turn_are_taken(given: Any, as_object: Any, tmp_path: Path) -> None:
    text = given if isinstance(given, str) and given.strip() else "{}"
    shown = json.dumps(as_object, ensure_ascii=False)
    for template in (ITEMS, TOOL_TEMPLATE):
        assert call_arguments_for(habits_of(tmp_path, template), given) == as_object
    assert rendered(tmp_path, TOOL_TEMPLATE, calling(given)).count(shown) == 1
    if not isinstance(given, dict):
        assert rendered(tmp_path, JOINED, calling(given)) == "function f\n" + text
    if isinstance(given, str) and given.strip() and "null" not in given:
        assert given in rendered(tmp_path, STRINGS, calling(given)), "as it is where the template shows text"


@cache
def learnt(path: Path, template: str) -> Habits:
    return learn_habits(Codec(write_model(path, template=template)))


def habits_of(tmp_path: Path, template: str) -> Habits:
    return learnt(tmp_path, template)


@pytest.mark.parametrize("depth", [50, 100, 400, 60_000])
@pytest.mark.parametrize("template", [TOOL_TEMPLATE, ITEMS, STRINGS, JOINED, NINE])
def test_deep_arguments_are_taken(template: str, depth: int, tmp_path: Path) -> None:
    for text in ('{"a": ' * depth, '{"a": ' * depth + "1" + "}" * depth, "[" * depth):
        assert "f" in rendered(tmp_path, template, calling(text))


def test_null_means_left_out(tmp_path: Path) -> None:
    call = {"id": "1", "type": None, "index": None, "function": {"name": "f", "arguments": "{}", "x": None}}
    message = {"role": "assistant", "content": None, "reasoning": None, "refusal": None, "audio": None}
    plain = rendered(tmp_path, JOINED, {**message, "tool_calls": [call], "function_call": None})
    assert plain == "function f\n{}"
    alone = rendered(tmp_path, TEMPLATE, {**message, "tool_calls": None})
    assert "None" not in alone
    tool = {"role": "tool", "tool_call_id": "1", "name": None, "content": [{"type": "text", "text": "12 °C"}]}
    assert "12 °C" in rendered(tmp_path, TOOL_TEMPLATE, USER, calling("{}"), tool)


def test_the_older_fields_for_a_call(tmp_path: Path) -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "function", "name": "f", "content": "12"}
    text = rendered(tmp_path, TOOL_TEMPLATE, USER, old, result)
    assert '{"name": "f", "arguments": {"a": 1}}' in text
    assert "12" in text


def test_text_beside_calls_is_kept(tmp_path: Path) -> None:
    for template in (TOOL_TEMPLATE, STRINGS, ITEMS, JOINED, NINE):
        text = rendered(tmp_path, template, USER, calling('{"key": 1}', content="Let me see.", reasoning="r"))
        assert "Let me see." in text, template
        assert "key" in text, template


def test_a_template_that_cannot_show_text_beside_calls_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('alternate') }}{% endif %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    habits = learn_habits(Codec(write_model(tmp_path, template=alone)))
    assert habits.beside is Beside.CALLS_ALONE
    assert len(caplog.records) == 1
    assert "probe" not in rendered(tmp_path, alone, calling("{}", content="text"))


def test_parts_that_are_text(tmp_path: Path) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]
    refusal = {"type": "refusal", "refusal": "no"}
    assert "a\nb\nno" in rendered(tmp_path, TEMPLATE, {"role": "user", "content": [*parts, refusal]})
    with pytest.raises(ApiError, match=r"messages\[0\]\.content: only text parts"):
        rendered(tmp_path, TEMPLATE, {"role": "user", "content": [{"type": "image_url"}]})


# --------------------------------------------------------------------------- thinking


def test_reasoning_effort(tmp_path: Path) -> None:
    thoughtful = "{% if reasoning_effort %}{{ reasoning_effort }}!{% endif %}"
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    other = "{% if thinking %}<think>{% else %}</think>{% endif %}"
    for template, effort, text in (
        (thoughtful, "none", "none!"),
        (thoughtful, "low", "low!"),
        (thoughtful + switch, "none", "none!<think></think>"),
        (switch, "none", "<think></think>"),
        (switch, "high", ""),
        (other, "none", "</think>"),
        (other, "low", "<think>"),
        (other + thoughtful, "low", "<think>low!"),
    ):
        assert rendered(tmp_path, template, USER, reasoning_effort=effort) == text, template
    quiet = rendered(tmp_path, other, USER, reasoning_effort="low", chat_template_kwargs={"thinking": False})
    assert quiet == "</think>"
    kept = rendered(
        tmp_path, switch, USER, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}
    )
    assert kept == "", "the template's own variable wins"
    with pytest.raises(ValidationError, match="'none', 'minimal', 'low', 'medium', 'high' or 'xhigh'"):
        rendered(tmp_path, switch, USER, reasoning_effort="banana")
