"""Tools of which only some may be called, the fields before there were tools, and fields that
change nothing.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import TOOL_TEMPLATE, tiny_tokenizer, turn_ids, write_model

USER: list[Any] = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS: list[Any] = [{"name": name, "parameters": PARAMETERS} for name in ("get_weather", "get_time")]
TOOLS: list[Any] = [{"type": "function", "function": function} for function in FUNCTIONS]
CALLS = "".join(
    f'<tool_call>{{"name": "{name}", "arguments": {{"city": "Köln"}}}}</tool_call>'
    for name in ("get_time", "get_weather")
)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    script = say(turn_ids(CALLS))
    with RunningFrontend(folder, script) as running:
        yield running


@pytest.fixture
def client(frontend: RunningFrontend) -> Iterator[openai.OpenAI]:
    frontend.engine.submits.clear()
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def prompt(frontend: RunningFrontend) -> str:
    last = list(array("i", frontend.engine.submits[-1].prompt_i32))
    return tiny_tokenizer().decode(last, skip_special_tokens=False)


def test_where_none_is_forced_the_model_sees_only_the_allowed(
    client: openai.OpenAI, frontend: RunningFrontend
) -> None:
    choice: Any = allowed("auto", "get_weather")
    client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice)
    assert "get_weather" in prompt(frontend) and "get_time" not in prompt(frontend)


def test_a_required_call_is_one_of_the_allowed(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    choice: Any = allowed("required", "get_weather")
    client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice)
    grammar = frontend.engine.submits[-1].grammar
    assert "get_time" in prompt(frontend), "the prompt keeps its cached prefix"
    assert "get_weather" in grammar and "get_time" not in grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"tool_choice": allowed("auto", "x"), "tools": TOOLS},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"tool_choice": allowed("auto", "x")}, "tool_choice"),
        ({"tool_choice": allowed("auto"), "tools": TOOLS}, "tool_choice.allowed_tools.tools"),
        ({"functions": FUNCTIONS, "tools": TOOLS}, "functions"),
        ({"function_call": {"name": "a"}}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": "auto", "tool_choice": "auto"}, "function_call"),
    ],
)
def test_choices_that_cannot_be_are_refused(frontend: RunningFrontend, fields: Any, param: str) -> None:
    answer = frontend.http.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_functions_are_answered_by_one_function_call(
    client: openai.OpenAI, frontend: RunningFrontend
) -> None:
    done = client.chat.completions.create(model=MODEL, messages=USER, functions=FUNCTIONS)
    choice = done.choices[0]
    assert choice.finish_reason == "function_call" and not choice.message.tool_calls
    assert choice.message.function_call.name == "get_time"
    assert json.loads(choice.message.function_call.arguments) == {"city": "Köln"}
    client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    old, new = (submit.prompt_i32 for submit in frontend.engine.submits)
    assert old == new


def test_a_streamed_function_call_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    name, arguments, reasons = "", "", []
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, functions=FUNCTIONS, stream=True):
        choice = chunk.choices[0]
        assert choice.delta.tool_calls is None
        if (call := choice.delta.function_call) is not None:
            name += call.name or ""
            arguments += call.arguments or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (name, json.loads(arguments), reasons) == ("get_time", {"city": "Köln"}, ["function_call"])


def test_a_named_function_is_forced(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    named: Any = {"name": "get_time"}
    client.chat.completions.create(model=MODEL, messages=USER, functions=FUNCTIONS, function_call=named)
    assert "get_time" in frontend.engine.submits[-1].grammar
    client.chat.completions.create(model=MODEL, messages=USER, functions=FUNCTIONS, function_call="none")
    assert not frontend.engine.submits[-1].grammar


def test_a_cache_key_is_a_hint_for_the_place_alone(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    for key in ("a", "a", "b", ""):
        client.chat.completions.create(model=MODEL, messages=USER, seed=1, prompt_cache_key=key)
    client.responses.create(model=MODEL, input="hi", prompt_cache_key="a")
    *chat, response = frontend.engine.submits
    first, again, other, none = (submit.affinity for submit in chat)
    assert first == again == response.affinity and len({0, first, other}) == 3 and none == 0
    assert len({submit.hashes_h128 for submit in chat}) == 1
    with pytest.raises(openai.BadRequestError, match="prompt_cache_key"):
        client.chat.completions.create(model=MODEL, messages=USER, extra_body={"prompt_cache_key": 5})


def test_fields_that_change_nothing(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    client.chat.completions.create(model=MODEL, messages=USER, seed=1, max_completion_tokens=90)
    client.chat.completions.create(
        model=MODEL,
        messages=USER,
        seed=1,
        max_completion_tokens=90,
        prediction={"type": "content", "content": "x"},
        service_tier="flex",
        metadata={"a": "b"},
        safety_identifier="s",
        verbosity="low",
        store=True,
        user="u",
    )
    plain, full = frontend.engine.submits
    assert (plain.prompt_i32, plain.hashes_h128, plain.limit, plain.sampling) == (
        full.prompt_i32,
        full.hashes_h128,
        full.limit,
        full.sampling,
    )
