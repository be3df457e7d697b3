"""/v1/messages as Anthropic's client and plain HTTP see it, against a frontend whose model speaks
the format of Qwen3.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from lockstep.engine.protocol.frontends import Rejected
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.frontend.sse import Event, events_of
from support.engine.text.tiny_tokenizer import TOOL_TEMPLATE, tiny_tokenizer, turn_ids, write_model

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "get_weather", "description": "Weather.", "input_schema": PARAMETERS}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "get_weather", "arguments": {"city": "東京 🙂"}}</tool_call>'
TEXT = f"<think>\nThe user asks.\n</think>\n\nOne moment.\n{CALL}\n{SECOND}\nDone."
USER = {"role": "user", "content": "Weather?"}
KEY = {"x-api-key": "k1"}


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(folder, say(turn_ids(TEXT)), api_keys=("k1",)) as running:
        running.http.headers.update(KEY)
        yield running


@pytest.fixture
def engine(frontend: RunningFrontend) -> RunningFrontend:
    frontend.engine.script = say(turn_ids(TEXT))
    frontend.engine.num_cached = 0
    frontend.engine.submits.clear()
    return frontend


def ask(engine: RunningFrontend, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 200, "messages": [USER], **fields}
    answer = engine.http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(engine: RunningFrontend, **fields: Any) -> list[Event]:
    body = {"max_tokens": 200, "messages": [USER], "stream": True, **fields}
    return events_of(engine.http.post("/v1/messages", json=body))


def refused(engine: RunningFrontend, **fields: Any) -> str:
    answer = engine.http.post("/v1/messages", json={"max_tokens": 9, "messages": [USER], **fields})
    assert answer.status_code == 400, answer.text
    document = answer.json()
    assert (document["type"], document["error"]["type"]) == ("error", "invalid_request_error")
    message: str = document["error"]["message"]
    return message


def prompt(engine: RunningFrontend) -> str:
    last = list(array("i", engine.engine.submits[-1].prompt_i32))
    return tiny_tokenizer().decode(last, skip_special_tokens=False)


def test_a_whole_message(engine: RunningFrontend) -> None:
    engine.engine.num_cached = 4
    done = ask(
        engine, tools=TOOLS, system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "x"}}]
    )
    assert (done["type"], done["role"], done["model"]) == ("message", "assistant", MODEL)
    assert (done["stop_reason"], done["stop_sequence"]) == ("tool_use", None)
    thought, said, first, second, more = done["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "The user asks.") and thought["signature"]
    assert (said, more) == ({"type": "text", "text": "One moment."}, {"type": "text", "text": "\nDone."})
    assert [(call["type"], call["name"], call["input"]) for call in (first, second)] == [
        ("tool_use", "get_weather", {"city": "Köln"}),
        ("tool_use", "get_weather", {"city": "東京 🙂"}),
    ]
    usage = done["usage"]
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] + 4 == len(engine.engine.submits[0].prompt_i32) // 4
    assert usage["output_tokens"] == len(turn_ids(TEXT))
    assert "system\nBe kind.<|im_end|>" in prompt(engine)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_events_come_in_order_and_join_to_the_whole_message(engine: RunningFrontend, chunk: int) -> None:
    tokens = turn_ids(TEXT)
    engine.engine.script = lambda submit: [tokens[at : at + chunk] for at in range(0, len(tokens), chunk)]
    whole = ask(engine, tools=TOOLS)
    events = stream(engine, tools=TOOLS)
    assert all(event.name == event.data["type"] for event in events)
    assert [event.name for event in events[:2]] == ["message_start", "ping"]
    assert [event.name for event in events[-2:]] == ["message_delta", "message_stop"]
    start = events[0].data["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert events[-2].data["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2].data["usage"]["output_tokens"] == len(tokens)
    assert without_ids(joined(events[2:-2])) == without_ids(whole["content"])


def without_ids(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in block.items() if name != "id"} for block in content]


def joined(events: list[Event]) -> list[dict[str, Any]]:
    """The blocks of a stream, each of which ends before the next one begins."""
    blocks: list[dict[str, Any]] = []
    is_open, arguments = False, ""
    for event in events:
        data = event.data
        if event.name == "content_block_start":
            assert not is_open and data["index"] == len(blocks)
            blocks.append(dict(data["content_block"]))
            is_open, arguments = True, ""
            continue
        assert is_open and data["index"] == len(blocks) - 1
        if event.name == "content_block_stop":
            is_open = False
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(arguments)
            continue
        delta = data["delta"]
        match delta["type"]:
            case "input_json_delta":
                arguments += delta["partial_json"]
            case "text_delta":
                blocks[-1]["text"] += delta["text"]
            case "thinking_delta":
                blocks[-1]["thinking"] += delta["thinking"]
            case "signature_delta":
                blocks[-1]["signature"] = delta["signature"]
    assert not is_open
    return blocks


def test_a_conversation_with_results_comes_back(engine: RunningFrontend) -> None:
    ask(
        engine,
        max_tokens=50,
        tools=TOOLS,
        messages=[
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Köln"}},
                    {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "Bonn"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": "sunny"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "b",
                        "content": [{"type": "text", "text": "no such place"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
                ],
            },
        ],
    )
    shown = prompt(engine)
    assert "<think>Hm.</think>One moment.<tool_call>" in shown
    assert "tool\nsunny<|im_end|>\n<|im_start|>tool\nError: no such place<|im_end|>" in shown
    assert shown.endswith("user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")


def test_a_last_message_of_the_assistant_is_continued(engine: RunningFrontend) -> None:
    ask(engine, messages=[USER, {"role": "assistant", "content": "It is"}])
    assert prompt(engine).endswith("<|im_start|>assistant\nIt is")


def test_tool_choices(engine: RunningFrontend) -> None:
    ask(engine, tools=TOOLS, tool_choice={"type": "any"})
    assert engine.engine.submits[-1].grammar
    ask(engine, tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    assert engine.engine.submits[-1].grammar
    done = ask(engine, tools=TOOLS, tool_choice={"type": "none"})
    assert [block["type"] for block in done["content"]] == ["thinking", "text"]
    done = ask(engine, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["type"] for block in done["content"]] == ["thinking", "text", "tool_use"]
    assert done["stop_reason"] == "tool_use"


def test_stop_reasons(engine: RunningFrontend) -> None:
    done = ask(engine, stop_sequences=["moment"])
    assert (done["stop_reason"], done["stop_sequence"]) == ("stop_sequence", "moment")
    events = stream(engine, stop_sequences=["moment"])
    assert events[-2].data["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "moment"}
    assert ask(engine, max_tokens=5)["stop_reason"] == "max_tokens"
    engine.engine.script = say(turn_ids("Hello"))
    assert ask(engine)["stop_reason"] == "end_turn"


def test_a_call_that_is_cut_has_the_start_of_its_input(engine: RunningFrontend) -> None:
    cut = len(turn_ids(TEXT.partition("ln")[0])) - 1
    done = ask(engine, tools=TOOLS, max_tokens=cut)
    assert done["stop_reason"] == "max_tokens"
    assert done["content"][-1]["input"] == {"city": "Kö"}


def test_thinking_is_switched_by_the_template(engine: RunningFrontend) -> None:
    ask(engine, thinking={"type": "disabled"})
    assert prompt(engine).endswith("<think>\n</think>\n\neffort none")
    ask(engine, thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt(engine).endswith("<think>\n")
    ask(engine, output_config={"effort": "max"})
    assert prompt(engine).endswith("effort xhigh")


def test_structured_text(engine: RunningFrontend) -> None:
    format = {"type": "json_schema", "schema": PARAMETERS}
    for fields in ({"output_config": {"format": format}}, {"output_format": format}):
        ask(engine, **fields)
        assert '"city"' in engine.engine.submits[-1].grammar


def test_tokens_are_counted_as_they_are_sent(engine: RunningFrontend) -> None:
    body = {"messages": [USER], "tools": TOOLS, "system": "Be kind."}
    answer = engine.http.post("/v1/messages/count_tokens", json=body)
    ask(engine, **body)
    assert answer.json() == {"input_tokens": len(engine.engine.submits[-1].prompt_i32) // 4}
    answer = engine.http.post("/v1/messages/count_tokens", json=body | {"model": "other"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name 'x'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        (
            {"tools": [{"name": "a", "input_schema": {"type": 5}}], "tool_choice": {"type": "any"}},
            "input_schema",
        ),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "maximum context length"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"n": 2}, "n is not supported here"),
    ],
)
def test_refusals_name_the_field(engine: RunningFrontend, fields: Any, says: str) -> None:
    assert says in refused(engine, **fields)
    assert not engine.engine.submits


def test_every_error_has_the_dialects_shape(engine: RunningFrontend) -> None:
    engine.engine.script = lambda submit: [Rejected(submit.handle, 503, "The queue is full", 3.0)]
    body = {"max_tokens": 9, "messages": [USER]}
    full = engine.http.post("/v1/messages", json=body)
    assert full.headers["retry-after"] == "3"
    engine.engine.script = lambda submit: [Finish.ERROR]
    answers = [
        (529, "overloaded_error", full),
        (500, "api_error", engine.http.post("/v1/messages", json=body)),
        (
            401,
            "authentication_error",
            engine.http.post("/v1/messages", json=body, headers={"x-api-key": "no"}),
        ),
        (404, "not_found_error", engine.http.post("/v1/messages", json=body | {"model": "other"})),
        (404, "not_found_error", engine.http.post("/v1/messages/batches", json=body)),
        (405, "invalid_request_error", engine.http.get("/v1/messages")),
        (400, "invalid_request_error", engine.http.post("/v1/messages", content=b"{")),
        (413, "request_too_large", engine.http.post("/v1/messages", content=b" " * (8 * 2**20 + 1))),
    ]
    for status, kind, answer in answers:
        document = answer.json()
        assert (answer.status_code, document["type"], document["error"]["type"]) == (status, "error", kind)
        assert document["request_id"] == answer.headers["x-request-id"]


def test_a_stream_that_breaks_off_ends_with_an_error(engine: RunningFrontend) -> None:
    engine.engine.script = lambda submit: [turn_ids("One")[:1], *[None] * 300, Finish.ERROR]
    events = stream(engine)
    assert events[0].name == "message_start"
    assert (events[-1].name, events[-1].data["error"]["type"]) == ("error", "api_error")


def test_a_key_comes_as_either_header(engine: RunningFrontend) -> None:
    body = {"max_tokens": 9, "messages": [USER]}
    for headers in ({"x-api-key": "", "authorization": "Bearer k1"}, KEY):
        assert engine.http.post("/v1/messages?beta=true", json=body, headers=headers).status_code == 200
    headers = {"x-api-key": "k1", "authorization": "Bearer no"}
    assert engine.http.post("/v1/messages", json=body, headers=headers).status_code == 401
