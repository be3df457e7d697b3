"""Tools and reasoning as the official client sees them, against a frontend whose model speaks the
format of Qwen3.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from support.engine.frontend.running_frontend import MODEL, RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import TOOL_TEMPLATE, tiny_tokenizer, turn_ids, write_model

USER = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS},
    }
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SHORT_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "東京 🙂"}}</tool_call>'
TEXT = f"<think>\nThe user asks.\nSo I call.\n</think>\n\nOne moment.\n{CALL}\n{SHORT_CALL}"


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    with RunningFrontend(
        write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE), say(turn_ids(TEXT))
    ) as running:
        yield running


@pytest.fixture
def engine(frontend: RunningFrontend) -> RunningFrontend:
    frontend.engine.script = say(turn_ids(TEXT))
    frontend.engine.submits.clear()
    frontend.engine.aborts.clear()
    return frontend


@pytest.fixture
def client(engine: RunningFrontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


class Joined:
    """The message of a stream, joined by a client that trusts the order of its parts."""

    def __init__(self, chunks: Any) -> None:
        self.content = self.reasoning = self.reasoning_content = ""
        self.calls: list[dict[str, str]] = []
        self.reasons: list[str] = []
        self.sizes: list[int] = []
        for chunk in chunks:
            choice = chunk.choices[0]
            delta = choice.delta
            self.content += delta.content or ""
            self.reasoning += getattr(delta, "reasoning", "") or ""
            self.reasoning_content += getattr(delta, "reasoning_content", "") or ""
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(self.calls)
                    assert call.type == "function"
                    self.calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                else:
                    assert call.function.name is None
                self.calls[call.index]["arguments"] += call.function.arguments
                self.sizes.append(len(call.function.arguments))
            self.reasons += [choice.finish_reason] if choice.finish_reason else []


def prompt(engine: RunningFrontend) -> str:
    return tiny_tokenizer().decode(
        list(array("i", engine.engine.submits[-1].prompt_i32)), skip_special_tokens=False
    )


def test_a_whole_reply(client: openai.OpenAI, engine: RunningFrontend) -> None:
    done = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    message = done.choices[0].message
    assert (message.reasoning, message.reasoning_content) == ("The user asks.\nSo I call.",) * 2
    assert message.content == "One moment."
    assert [(call.type, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("function", "get_weather", '{"city": "Köln"}'),
        ("function", "get_weather", '{"city": "東京 🙂"}'),
    ]
    assert len({call.id for call in message.tool_calls}) == 2
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.usage.completion_tokens == len(turn_ids(TEXT)), "ids are counted, not text"
    assert json.dumps(TOOLS[0]) in prompt(engine)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "extra",
    [{}, {"logprobs": True}, {"extra_body": {"stream_interval": 5}}],
    ids=["plain", "logprobs", "interval"],
)
def test_the_stream_joins_to_the_whole_reply(
    client: openai.OpenAI, engine: RunningFrontend, chunk: int, extra: dict[str, Any]
) -> None:
    tokens = turn_ids(TEXT)
    engine.engine.script = lambda submit: [
        tokens[start : start + chunk] for start in range(0, len(tokens), chunk)
    ]
    whole = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
    joined = Joined(
        client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True, **extra)
    )
    assert (joined.content, joined.reasoning) == (whole.message.content, whole.message.reasoning)
    assert joined.reasoning_content == joined.reasoning
    assert [(call["name"], call["arguments"]) for call in joined.calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]
    assert joined.reasons == [whole.finish_reason] == ["tool_calls"]
    if chunk == 1 and extra == {}:
        assert len(joined.sizes) > 4, "arguments come as they are written"


def test_the_clients_own_stream_helper_understands_it(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"city": "Köln"},
        {"city": "東京 🙂"},
    ]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.")


def test_several_choices_are_parsed_apart(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, n=2)
    assert [len(choice.message.tool_calls) for choice in done.choices] == [2, 2]
    assert len({call.id for choice in done.choices for call in choice.message.tool_calls}) == 4


def test_without_tools_tags_of_calls_are_text(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat.completions.create(model=MODEL, messages=USER, **options).choices[0]
        assert choice.message.content == f"One moment.\n{CALL}\n{SHORT_CALL}"
        assert (choice.message.tool_calls, choice.finish_reason) == ([], "stop")


def test_a_call_that_is_cut_off_finishes_with_length(client: openai.OpenAI, engine: RunningFrontend) -> None:
    cut = len(turn_ids(TEXT[: TEXT.index("Köln") + 2])) - 1
    choice = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, max_tokens=cut).choices[
        0
    ]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Kö'
    cut = len(turn_ids("<think>\nThe user asks.")) - 1
    choice = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, max_tokens=cut).choices[
        0
    ]
    assert (choice.finish_reason, choice.message.content, choice.message.reasoning) == (
        "length",
        None,
        "The user asks.",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_tool_calls_false_ends_with_the_first(
    client: openai.OpenAI, engine: RunningFrontend, stream: bool
) -> None:
    options = {"model": MODEL, "messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
    if stream:
        joined = Joined(client.chat.completions.create(stream=True, **options))
        assert (len(joined.calls), joined.reasons) == (1, ["tool_calls"])
    else:
        choice = client.chat.completions.create(**options).choices[0]
        assert (len(choice.message.tool_calls), choice.finish_reason) == (1, "tool_calls")
    wait_until(lambda: engine.engine.aborts, "the engine is told to end the request")


def test_stop_strings_apply_to_the_text_as_it_is_written(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=USER, tools=TOOLS, stop="\n" + SHORT_CALL[:20]
    ).choices[0]
    assert (len(choice.message.tool_calls), choice.finish_reason) == (1, "tool_calls")
    choice = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stop="Köln").choices[0]
    assert (choice.message.tool_calls[0].function.arguments, choice.finish_reason) == ('{"city": "', "stop")


def test_reasoning_may_be_left_out_of_the_answer(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": USER, "extra_body": {"include_reasoning": False}}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.message.reasoning is choice.message.reasoning_content is None
    assert choice.message.content.startswith("One moment.")
    joined = Joined(client.chat.completions.create(stream=True, **options))
    assert (joined.reasoning, joined.content) == ("", choice.message.content)


def test_the_template_opens_or_closes_the_reasoning(client: openai.OpenAI, engine: RunningFrontend) -> None:
    def ask(text: str, **fields: Any) -> Any:
        engine.engine.script = say(turn_ids(text))
        return (
            client.chat.completions.create(model=MODEL, messages=USER, extra_body=fields).choices[0].message
        )

    opened = ask("Hm.\n</think>\n\nYes", chat_template_kwargs={"enable_thinking": True})
    assert prompt(engine).endswith("assistant\n<think>\n")
    assert (opened.reasoning, opened.content) == ("Hm.", "Yes")
    closed = ask("Hm.\n</think>\n\nYes", chat_template_kwargs={"enable_thinking": False})
    assert prompt(engine).endswith("<think>\n</think>\n\n")
    assert closed.content == "Hm.\n</think>\n\nYes"
    ask("Yes", reasoning_effort="low")
    assert prompt(engine).endswith("effort low")


def test_a_conversation_with_calls_and_reasoning_is_rendered(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    first = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0].message
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in first.tool_calls]
    engine.engine.script = say(turn_ids("Cold."))
    messages = [*USER, first.model_dump(exclude_none=True), *answers]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    assert last.content == "Cold."
    text = prompt(engine)
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>' in text
    assert "<think>The user asks.\nSo I call.</think>One moment." in text
    assert text.count("<|im_start|>tool\n12 °C<|im_end|>") == 2
    either = [{"role": "assistant", "content": "a", "reasoning": "why"}]
    client.chat.completions.create(model=MODEL, messages=[*USER, *either, *USER])
    assert "<think>why</think>a" in prompt(engine)


def test_a_continued_message_may_stand_in_its_reasoning(engine: RunningFrontend) -> None:
    engine.engine.script = say(turn_ids(" more</think>b"))
    body = {
        "messages": [*USER, {"role": "assistant", "content": "<think>so"}],
        "continue_final_message": True,
    }
    answer = engine.http.post("/v1/chat/completions", json={**body, "add_generation_prompt": False}).json()
    assert prompt(engine).endswith("<think>so")
    assert answer["choices"][0]["message"]["reasoning"] == " more"
    assert answer["choices"][0]["message"]["content"] == "b"


def test_the_parsers_can_be_set(engine: RunningFrontend, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(path, say(turn_ids(TEXT)), tool_parser="off", reasoning_parser="off") as running:
        refused = running.http.post("/v1/chat/completions", json={"messages": USER, "tools": TOOLS})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
        assert "frontend.tool_parser" in refused.json()["error"]["message"]
        answer = running.http.post("/v1/chat/completions", json={"messages": USER}).json()
        message = answer["choices"][0]["message"]
        assert {name: value for name, value in message.items() if value} == {
            "role": "assistant",
            "content": TEXT,
        }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")],
)
def test_a_forced_call_comes_with_a_grammar(
    client: openai.OpenAI, engine: RunningFrontend, choice: Any, reason: str, stream: bool
) -> None:
    engine.engine.script = say(turn_ids(SHORT_CALL))
    options = {"model": MODEL, "messages": USER, "tools": TOOLS, "tool_choice": choice}
    if stream:
        joined = Joined(client.chat.completions.create(stream=True, **options))
        found = (joined.calls[0]["name"], joined.calls[0]["arguments"], joined.reasons)
    else:
        [answer] = client.chat.completions.create(**options).choices
        [call] = answer.message.tool_calls
        found = (call.function.name, call.function.arguments, [answer.finish_reason])
    assert found == ("get_weather", '{"city": "東京 🙂"}', [reason])
    text = engine.engine.submits[-1].grammar
    assert "get_weather" in text
    assert '"required":["city"]' in text
    assert text.startswith('start: ("<think>"'), "the model may think before it calls"


def test_the_clients_own_parse_helper_gets_its_type(client: openai.OpenAI, engine: RunningFrontend) -> None:
    class City(pydantic.BaseModel):
        name: str
        people: int

    engine.engine.script = say(turn_ids('<think>big</think>\n\n{"name": "東京", "people": 14000000}'))
    done = client.chat.completions.parse(model=MODEL, messages=USER, response_format=City)
    assert done.choices[0].message.parsed == City(name="東京", people=14_000_000)
    assert done.choices[0].message.reasoning == "big"
    assert '"people"' in engine.engine.submits[-1].grammar


@pytest.mark.parametrize("text", ['<tool_call>{"name": "get_weather", "arguments": {"', CALL[:-20], CALL])
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_was_cut_off_goes_on(
    client: openai.OpenAI, engine: RunningFrontend, text: str, stream: bool
) -> None:
    tokens = turn_ids("<think>Hm.\n" + text)[:-1]
    engine.engine.script = lambda submit: [[token] for token in tokens]
    options = {"model": MODEL, "messages": USER, "tools": TOOLS, "max_tokens": len(tokens)}
    if stream:
        joined = Joined(client.chat.completions.create(stream=True, **options))
        [call] = joined.calls
        function = {"name": call["name"], "arguments": call["arguments"]}
        said = {
            "role": "assistant",
            "content": joined.content,
            "reasoning": joined.reasoning,
            "tool_calls": [{"index": 0, "id": call["id"], "type": None, "function": function}],
        }
        assert joined.reasons == ["length"]
    else:
        [choice] = client.chat.completions.create(**options).choices
        said, function = choice.message.model_dump(), choice.message.tool_calls[0].function.model_dump()
        assert choice.finish_reason == "length"
    assert (said["reasoning"], function["name"]) == ("Hm.", "get_weather"), "a call ends open reasoning"
    assert function["arguments"].startswith('{"')
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "error: bad arguments"}
    engine.engine.script = say(turn_ids("Sorry."))
    last = client.chat.completions.create(
        model=MODEL, messages=[*USER, said, result, *USER], tools=TOOLS
    ).choices[0]
    assert last.message.content == "Sorry."
    assert "get_weather" in prompt(engine)


def test_reasoning_effort_is_checked(engine: RunningFrontend) -> None:
    def ask(effort: str) -> Any:
        body = {"messages": USER, "reasoning_effort": effort}
        return engine.http.post("/v1/chat/completions", json=body)

    wrong = ask("banana")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "reasoning_effort")
    assert "'none', 'minimal', 'low', 'medium', 'high' or 'xhigh'" in wrong.json()["error"]["message"]
    assert ask("none").status_code == 200
    assert "<think>\n</think>" in prompt(engine)


def test_no_thinking_needs_a_template_that_can_say_so(tmp_path: Any) -> None:
    path = write_model(tmp_path)  # a template without a switch
    body = {"messages": USER, "reasoning_effort": "none"}
    with RunningFrontend(path, say(turn_ids("Yes")), reasoning_parser="think") as running:
        refused = running.http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")
        assert "no switch for thinking" in refused.json()["error"]["message"]
    with RunningFrontend(path, say(turn_ids("Yes"))) as running:  # a model that does not reason
        assert running.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("parser", ["hermes", "glm4"])
def test_a_malformed_schema_of_a_forced_call_is_refused_by_its_place(
    tmp_path_factory: pytest.TempPathFactory, parser: str
) -> None:
    path = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(path, say(turn_ids("Yes")), tool_parser=parser) as running:
        for parameters in (
            {"properties": None},
            {"required": None},
            {"properties": {"x": {"enum": None}}},
            5,
        ):
            function = {"name": "f", "parameters": parameters}
            body = {"messages": USER, "tools": [{"type": "function", "function": function}]}
            refused = running.http.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == "tools[0].function.parameters"
            free = running.http.post("/v1/chat/completions", json=body)
            assert free.status_code == (400 if parameters == 5 else 200)


PATCH: Any = {"type": "custom", "custom": {"name": "patch", "description": "Changes files."}}


def patch_by(syntax: str, definition: str) -> Any:
    grammar = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": PATCH["custom"] | {"format": grammar}}


def test_a_custom_tool_takes_text(client: openai.OpenAI, engine: RunningFrontend) -> None:
    source = 'a = "b\\n"\n\tprint("東京 🙂")\n'
    arguments = json.dumps({"input": source}, ensure_ascii=False)
    text = f'<tool_call>{{"name": "patch", "arguments": {arguments}}}</tool_call>'
    engine.engine.script = say(turn_ids(text))
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [PATCH]}
    choice = client.chat.completions.create(**asked).choices[0]
    [call] = choice.message.tool_calls
    assert (call.type, call.custom.name, call.custom.input) == ("custom", "patch", source)
    assert choice.finish_reason == "tool_calls"
    tokens = turn_ids(text)
    engine.engine.script = lambda submit: [[token] for token in tokens]
    parts = [
        part
        for chunk in client.chat.completions.create(**asked, stream=True)
        for part in chunk.choices[0].delta.model_dump()["tool_calls"] or ()
    ]
    assert [(part["type"], part["custom"].get("name")) for part in parts if part.get("id")] == [
        ("custom", "patch")
    ]
    assert len(parts) > 3 and "".join(part["custom"]["input"] for part in parts) == source

    back = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": source}}
    turns = [
        {"role": "assistant", "tool_calls": [back]},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    ]
    client.chat.completions.create(**asked | {"messages": [*USER, *turns]})
    arguments = prompt(engine).partition('"arguments": ')[2].partition("}</tool_call>")[0]
    assert json.loads(arguments)["input"] == source


def test_a_custom_call_that_is_forced_follows_its_regex(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    named = {"type": "custom", "custom": {"name": "patch"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    tools = [*TOOLS, patch_by("regex", "[a-c]+")]
    for choice in (named, allowed):
        client.chat.completions.create(model=MODEL, messages=USER, tools=tools, tool_choice=choice)
        assert "[a-c]+" in engine.engine.submits[-1].grammar
        assert "get_weather" not in engine.engine.submits[-1].grammar


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([*TOOLS, patch_by("lark", 'start: "a"')], "required", "tools[1].custom.format.grammar.syntax"),
        ([patch_by("ebnf", "x")], "auto", "tools[0].custom.format.grammar.syntax"),
        ([PATCH], {"type": "custom", "custom": {"name": "x"}}, "tool_choice.custom.name"),
        ([{"type": "custom"}], "auto", "tools[0].custom"),
    ],
)
def test_a_custom_tool_is_refused_by_the_name_of_its_field(
    engine: RunningFrontend, tools: list[Any], choice: Any, param: str
) -> None:
    body = {"model": MODEL, "messages": USER, "tools": tools, "tool_choice": choice}
    answer = engine.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_lark_grammar_is_shown(engine: RunningFrontend) -> None:
    body = {"model": MODEL, "messages": USER, "tools": [patch_by("lark", 'start: "a"')]}
    engine.http.post("/v1/chat/completions", json=body).raise_for_status()
    assert "start: " in prompt(engine)
