"""The demo model under grammars: it writes its tags with its own tokens, so that forced calls come
and answers are as right as free ones; texts that read like tags are written to their end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lockstep
from support.serving.served import Ask, Body, Served, serve

MODEL = Path(lockstep.__file__).parent / "recipes" / "demo" / "model"
CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SUMS = ((246, 178), (31, 44), (512, 219), (77, 18), (905, 61), (333, 444))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("trained") / "run", f"model.path={MODEL}") as served:
        yield served


def chat(text: str, thinking: bool, **fields: Any) -> Body:
    return {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 200,
        "chat_template_kwargs": {"enable_thinking": thinking},
        **fields,
    }


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_come_with_and_without_thinking(trained: Served, thinking: bool, choice: Any) -> None:
    body = chat("What is the weather in Paris?", thinking, tools=TOOLS, tool_choice=choice)
    whole, streamed = trained.ok([Ask(body, CHAT), Ask(body | {"stream": True}, CHAT)])
    [shown] = whole.document["choices"]
    [call] = shown["message"]["tool_calls"]
    parts = [
        part["function"]
        for chunk in streamed.chunks
        for each in chunk["choices"]
        for part in each["delta"].get("tool_calls") or ()
    ]
    assert "".join(part.get("arguments") or "" for part in parts) == call["function"]["arguments"]
    assert call["function"]["name"] == parts[0]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    finish = "tool_calls" if choice == "required" else "stop"
    assert (shown["finish_reason"], streamed.finish) == (finish, finish)


def test_sums_under_a_grammar_are_reasoned_about_and_right(trained: Served) -> None:
    form = {"structured_outputs": {"regex": r"The answer is [0-9]{1,4}\."}}
    asks = [Ask(chat(f"What is {a} + {b}?", True, **form), CHAT) for a, b in SUMS]
    for (a, b), answer in zip(SUMS, trained.ok(asks), strict=True):
        message = answer.document["choices"][0]["message"]
        assert message["content"] == f"The answer is {a + b}."
        assert message["reasoning"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", ["sum", "answer", "result", "total"])
def test_sums_as_objects_of_which_nobody_spoke_are_right(trained: Served, key: str, strict: bool) -> None:
    """A client's schema says what the question does not."""
    schema: Body = {"type": "object", "properties": {key: {"type": "integer"}}, "required": [key]}
    if strict:
        schema["additionalProperties"] = False
    form = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": schema, "strict": strict},
        }
    }
    asks = [Ask(chat(f"What is {a} + {b}?", True, **form), CHAT) for a, b in SUMS]
    for (a, b), answer in zip(SUMS, trained.ok(asks), strict=True):
        message = answer.document["choices"][0]["message"]
        assert json.loads(message["content"])[key] == a + b
        assert message["reasoning"]


CONSTANT = {
    "type": "object",
    "properties": {"t": {"const": "a <think> b<|end|>"}},
    "required": ["t"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "<tool_call>[0-9]{2}</tool_call>"}, "<tool_call>[0-9]{2}</tool_call>"),
        ({"choice": ["</think> ok"]}, "</think> ok"),
        ({"choice": ["<think> ok"]}, "<think> ok"),
        ({"choice": ["<|end|>", "<|user|>"]}, r"<\|(end|user)\|>"),
        ({"json": CONSTANT}, r'\{\s*"t"\s*:\s*"a <think> b<\|end\|>"\s*\}'),
    ],
)
def test_texts_that_read_like_tags_are_written_to_their_end(
    trained: Served, wanted: Body, pattern: str
) -> None:
    form = {"structured_outputs": wanted}
    asks = [Ask(chat("What is 31 + 44?", thinking, **form), CHAT) for thinking in (False, True)]
    plain = trained.ask(prompt="hi", max_tokens=60, **form)
    assert plain.finish == "stop"
    assert re.fullmatch(pattern, plain.text)
    for answer in trained.ok(asks):
        [shown] = answer.document["choices"]
        assert shown["finish_reason"] == "stop"
        assert re.fullmatch(pattern, shown["message"]["content"])
