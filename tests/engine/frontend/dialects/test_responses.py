"""/v1/responses as the official client sees it, against a frontend whose model speaks the format of
Qwen3.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, TOOL_TEMPLATE, tiny_tokenizer, turn_ids, write_model

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Weather.",
        "parameters": PARAMETERS,
        "strict": True,
    }
]
PATCH: Any = {"type": "custom", "name": "patch", "description": "Changes files."}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "get_weather", "arguments": {"city": "東京 🙂"}}</tool_call>'
TEXT = f"<think>\nThe user asks.\n</think>\n\nOne moment.\n{CALL}\n{SECOND}\nDone."


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(folder, say(turn_ids(TEXT))) as running:
        yield running


@pytest.fixture
def engine(frontend: RunningFrontend) -> RunningFrontend:
    frontend.engine.script = say(turn_ids(TEXT))
    frontend.engine.num_cached = 0
    frontend.engine.submits.clear()
    return frontend


@pytest.fixture
def client(engine: RunningFrontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def prompt(engine: RunningFrontend) -> str:
    last = list(array("i", engine.engine.submits[-1].prompt_i32))
    return tiny_tokenizer().decode(last, skip_special_tokens=False)


def refusal(engine: RunningFrontend, **fields: Any) -> tuple[str, str | None]:
    answer = engine.http.post("/v1/responses", json={"input": "Hello", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["message"], error["param"]


def test_a_whole_response(client: openai.OpenAI, engine: RunningFrontend) -> None:
    engine.engine.num_cached = 4
    done = client.responses.create(
        model=MODEL, input="Weather?", tools=TOOLS, store=True, metadata={"a": "b"}
    )
    assert (done.object, done.status, done.error, done.incomplete_details) == (
        "response",
        "completed",
        None,
        None,
    )
    assert [item.type for item in done.output] == [
        "reasoning", "message", "function_call", "function_call", "message"
    ]  # fmt: skip
    thought, said, first, second, more = done.output
    assert (thought.content[0].text, thought.summary) == ("The user asks.", [])
    assert (said.content[0].text, more.content[0].text) == ("One moment.", "\nDone.")
    assert done.output_text == "One moment.\nDone."
    assert [json.loads(call.arguments) for call in (first, second)] == [{"city": "Köln"}, {"city": "東京 🙂"}]
    assert first.call_id != second.call_id and first.call_id.startswith("call_")
    assert {item.status for item in done.output} == {"completed"}
    assert len({item.id for item in done.output}) == 5
    assert done.store is False and done.previous_response_id is None and done.metadata == {"a": "b"}
    assert done.tools[0].name == "get_weather" and done.tool_choice == "auto" and done.parallel_tool_calls
    usage = done.usage
    assert usage.input_tokens == len(engine.engine.submits[0].prompt_i32) // 4
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens) == (4, len(turn_ids(TEXT)))
    assert usage.output_tokens_details.reasoning_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_events_come_in_order_and_join_to_the_whole_response(
    client: openai.OpenAI, engine: RunningFrontend, chunk: int
) -> None:
    tokens = turn_ids(TEXT)
    engine.engine.script = lambda submit: [tokens[at : at + chunk] for at in range(0, len(tokens), chunk)]
    whole = client.responses.create(model=MODEL, input="Weather?", tools=TOOLS)
    events = list(client.responses.create(model=MODEL, input="Weather?", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[-1].type == "response.completed"
    check_order(events[2:-1])
    assert plain(events[-1].response.output) == plain(whole.output)
    assert events[-1].response.usage == whole.usage
    if chunk == 1:
        arguments = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(arguments) > 4, "arguments come as they are written"


def plain(output: list[Any]) -> list[dict[str, Any]]:
    return [item.model_dump(exclude={"id", "call_id"}) for item in output]


def check_order(events: list[Any]) -> None:
    """Each item is added, gets its part and deltas, and is done before the next one is added."""
    index, at = 0, 0
    while at < len(events):
        added = events[at]
        assert (added.type, added.output_index) == ("response.output_item.added", index)
        assert added.item.status == "in_progress"
        end = next(i for i in range(at, len(events)) if events[i].type == "response.output_item.done")
        inner, done = events[at + 1 : end], events[end]
        assert done.output_index == index and done.item.id == added.item.id
        assert {event.item_id for event in inner} == {added.item.id}
        assert {event.output_index for event in inner} == {index}
        if added.item.type == "function_call":
            *deltas, last = inner
            assert "".join(event.delta for event in deltas) == last.arguments == done.item.arguments
            assert last.type == "response.function_call_arguments.done"
        else:
            kind = "output_text" if added.item.type == "message" else "reasoning_text"
            part, *deltas, text, part_done = inner
            assert (part.type, part_done.type) == (
                "response.content_part.added",
                "response.content_part.done",
            )
            assert {event.type for event in deltas} == {f"response.{kind}.delta"}
            assert text.type == f"response.{kind}.done"
            joined = "".join(event.delta for event in deltas)
            assert joined == text.text == part_done.part.text == done.item.content[0].text
        index, at = index + 1, end + 1


def test_the_clients_own_stream_helper_understands_it(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Weather?", tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.reasoning_text.delta" in kinds
    assert final.output_text == "One moment.\nDone."


def test_a_custom_tool_takes_text(client: openai.OpenAI, engine: RunningFrontend) -> None:
    source = 'a = "b\\n"\n\tprint("東京 🙂")\n'
    text = '<tool_call>{"name": "patch", "arguments": ' + json.dumps({"input": source}) + "}</tool_call>"
    engine.engine.script = say(turn_ids(text))
    whole = client.responses.create(model=MODEL, input="Change it", tools=[PATCH])
    [call] = whole.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", source)
    events = list(client.responses.create(model=MODEL, input="Change it", tools=[PATCH], stream=True))
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    assert len(deltas) > 3 and "".join(deltas) == source
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert done.input == source
    back: Any = [
        {"role": "user", "content": "Change it"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": source},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
    ]
    client.responses.create(model=MODEL, input=back, tools=[PATCH])
    assert (
        json.loads(prompt(engine).partition('"arguments": ')[2].partition("}</tool_call>")[0])["input"]
        == source
    )


def test_a_forced_custom_call_follows_its_regex_and_a_lark_grammar_is_not_forced(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    regex: Any = PATCH | {"format": {"type": "grammar", "syntax": "regex", "definition": "[a-c]+"}}
    client.responses.create(
        model=MODEL, input="x", tools=[regex], tool_choice={"type": "custom", "name": "patch"}
    )
    assert "[a-c]+" in engine.engine.submits[-1].grammar
    lark = PATCH | {"format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}}
    engine.http.post("/v1/responses", json={"input": "x", "tools": [lark]}).raise_for_status()
    assert "start: " in prompt(engine)
    message, param = refusal(engine, tools=[lark], tool_choice="required")
    assert param == "tools[0].format.syntax" and "lark" in message


def test_a_cut_response_is_incomplete(client: openai.OpenAI, engine: RunningFrontend) -> None:
    cut = len(turn_ids(TEXT.partition("Köln")[0])) - 1
    done = client.responses.create(model=MODEL, input="Weather?", tools=TOOLS, max_output_tokens=cut)
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in done.output] == ["completed", "completed", "incomplete"]
    events = list(
        client.responses.create(
            model=MODEL, input="Weather?", tools=TOOLS, max_output_tokens=cut, stream=True
        )
    )
    assert events[-1].type == "response.incomplete"
    assert plain(events[-1].response.output) == plain(done.output)


def test_a_response_that_breaks_off_fails_by_an_event(client: openai.OpenAI, engine: RunningFrontend) -> None:
    engine.engine.script = lambda submit: [turn_ids("One")[:1], *[None] * 300, Finish.ERROR]
    events = list(client.responses.create(model=MODEL, input="x", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    raw = engine.http.post("/v1/responses", json={"input": "x", "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n")


def test_an_empty_reply_is_an_empty_message(client: openai.OpenAI, engine: RunningFrontend) -> None:
    engine.engine.script = say([IM_END])
    done = client.responses.create(model=MODEL, input="x")
    assert [item.type for item in done.output] == ["message"] and done.output_text == ""


def test_structured_text(client: openai.OpenAI, engine: RunningFrontend) -> None:
    client.responses.create(
        model=MODEL,
        input="x",
        text={"format": {"type": "json_schema", "name": "place", "schema": PARAMETERS}},
    )
    assert '"city"' in engine.engine.submits[-1].grammar
    message, param = refusal(
        engine, text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}
    )
    assert param == "text.format.schema", message


def test_a_forced_call_leaves_no_text_that_could_have_a_format(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    format: Any = {"type": "json_schema", "name": "place", "schema": {"const": "text"}}
    client.responses.create(
        model=MODEL, input="x", tools=TOOLS, tool_choice="required", text={"format": format}
    )
    grammar = engine.engine.submits[-1].grammar
    assert "get_weather" in grammar and '"text"' not in grammar


def test_reasoning_comes_back_from_clients_that_keep_only_encrypted_content(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    first = client.responses.create(model=MODEL, input="x", include=["reasoning.encrypted_content"])
    thought = first.output[0]
    assert thought.encrypted_content
    back: Any = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": thought.encrypted_content},
        {"role": "assistant", "content": "One moment."},
        {"role": "user", "content": "y"},
    ]
    client.responses.create(model=MODEL, input=back)
    assert "<think>The user asks.</think>One moment." in prompt(engine)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "c"}, "conversation", "input"),
        ({"background": True}, "background", "stream"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search'"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]", "'item_reference'"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "user"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "input[0].content[0]",
            "input_image",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "'x'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "maximum context length"),
        ({"include": ["message.output_text.logprobs"]}, "include", "chat/completions"),
        ({"top_logprobs": 2}, "top_logprobs", "chat/completions"),
        ({"n": 2}, "n", "chat/completions"),
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "missing"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ],
)
def test_refusals_name_the_field(engine: RunningFrontend, fields: Any, param: str, says: str) -> None:
    message, named = refusal(engine, **fields)
    assert named == param, message
    assert says in message
    assert not engine.engine.submits


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    done = client.responses.create(
        model=MODEL,
        input=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": "x"}],
        instructions="Be kind.",
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        truncation="auto",
        text={"verbosity": "low"},
        reasoning={"summary": "auto"},
        max_tool_calls=3,
        user="u",
    )
    assert (done.prompt_cache_key, done.safety_identifier, done.truncation) == ("k", "s", "auto")
