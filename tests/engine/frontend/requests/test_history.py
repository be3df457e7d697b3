"""Whatever a reply parser can make of a reply is taken when it comes back as an earlier turn."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.requests.conversation import conversation_text
from lockstep.engine.frontend.requests.habits import Habits, learn_habits
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.replies import NAMES, Said, read, texts, written
from support.engine.frontend.templates import HARMONY, ITEMS, JOINED, NINE, STRINGS
from support.engine.text.tiny_tokenizer import TEMPLATE, TOOL_TEMPLATE, write_model

TEMPLATES = (TEMPLATE, TOOL_TEMPLATE, STRINGS, ITEMS, JOINED, NINE, HARMONY)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Codec, Habits]]:
    return [_loaded(tmp_path_factory.mktemp("model"), template) for template in TEMPLATES]


@cache
def _loaded(path: Path, template: str) -> tuple[str, Codec, Habits]:
    codec = Codec(write_model(path, template=template))
    return template, codec, learn_habits(codec)


def message(said: Said) -> dict[str, Any]:
    """The message as a client stores it, nulls and all."""
    calls = [
        {"id": call["id"], "type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
        for call in said.calls
    ]
    return {
        "role": "assistant",
        "content": said.content or None,
        "reasoning": said.reasoning or None,
        "reasoning_content": said.reasoning or None,
        "tool_calls": calls or None,
        "function_call": None,
        "refusal": None,
    }


def check_comes_back(said: Said, models: list[tuple[str, Codec, Habits]], format: str) -> None:
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "RESULT"}]}
        for call in said.calls
    ]
    user = {"role": "user", "content": "USER"}
    body = {"messages": [user, message(said), *results, user]}
    ask = ChatRequest.model_validate_json(json.dumps(body), strict=True)
    for template, codec, habits in models:
        if template is NINE and any(len(call["id"]) != 9 for call in said.calls):
            continue  # the ids are those of another format
        text = conversation_text(codec, habits, ask)
        assert text.count("USER") == 2
        if template is not TEMPLATE:  # which writes no calls
            assert all(call["name"] in text for call in said.calls)
        assert said.content in text


@settings(max_examples=150, deadline=None)
@given(format=st.sampled_from(NAMES), text=texts, cut=st.integers(0, 200), thinking=st.booleans())
@example("glm4", "<tool_call>f\n<arg_key>ci", 200, False)
@example("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e400}}', 200, False)
@example("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}', 200, False)
def test_any_reply_comes_back(
    models: list[tuple[str, Codec, Habits]], format: str, text: str, cut: int, thinking: bool
) -> None:
    said = read(text[:cut], format, thinking=thinking, finish="length")
    check_comes_back(said, models, format)


@pytest.mark.parametrize("format", NAMES)
def test_a_call_cut_anywhere_comes_back(models: list[tuple[str, Codec, Habits]], format: str) -> None:
    arguments = {"city": 'a"\\\n🙂', "days": -1.5, "note": [None, {"b": True}]}
    text = "<think>r</think>text " + written(format, "get_weather", arguments)
    for end in range(len(text) + 1):
        check_comes_back(read(text[:end], format, finish="length"), models, format)


def test_calls_of_a_template_that_writes_one_a_message_each_come_before_their_result(tmp_path: Path) -> None:
    codec = Codec(write_model(tmp_path, template=HARMONY))
    calls = [
        {"id": f"c{at}", "type": "function", "function": {"name": f"f{at}", "arguments": '{"a": 1}'}}
        for at in range(2)
    ]
    results = [{"role": "tool", "tool_call_id": f"c{at}", "content": f"R{at}"} for at in (1, 0)]
    asked = {"role": "assistant", "content": "C", "reasoning": "T", "tool_calls": calls}
    user = {"role": "user", "content": "U"}
    ask = ChatRequest.model_validate({"messages": [user, asked, *results, user]})
    text = conversation_text(codec, learn_habits(codec), ask)
    start = "<|start|>assistant"
    assert text == (
        "<|start|>user<|message|>U<|end|>"
        f"{start}<|channel|>final<|message|>C<|end|>"
        f'{start} to=functions.f0<|channel|>commentary json<|message|>{{"a": 1}}<|call|>'
        "<|start|>functions.f0 to=assistant<|channel|>commentary<|message|>R0<|end|>"
        f'{start} to=functions.f1<|channel|>commentary json<|message|>{{"a": 1}}<|call|>'
        "<|start|>functions.f1 to=assistant<|channel|>commentary<|message|>R1<|end|>"
        f"<|start|>user<|message|>U<|end|>{start}"
    )
    alone = {"role": "assistant", "content": None, "reasoning": "T", "tool_calls": calls[:1]}
    ask = ChatRequest.model_validate({"messages": [user, alone, results[1]]})
    text = conversation_text(codec, learn_habits(codec), ask)
    assert f"{start}<|channel|>analysis<|message|>T<|end|>{start} to=functions.f0" in text
