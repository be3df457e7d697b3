"""One conversation in three dialects: the same prompt tokens, the same answer, and every split of
the stream gives the unsplit one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from lockstep.engine.protocol.frontends import Submit
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.sse import events_of
from support.engine.text.tiny_tokenizer import TOOL_TEMPLATE, turn_ids, write_model

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
NAMES = ("look", "act")
WORDS = st.text(st.sampled_from("ab 東é\n"), min_size=1, max_size=6).filter(str.strip)
ARGUMENTS = st.fixed_dictionaries({"x": WORDS})
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), max_size=2)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation as a chat has it, which ends with the user or with results of calls."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    messages.append({"role": "user", "content": draw(WORDS)})
    for turn in range(draw(st.integers(0, 2))):
        calls = draw(CALLS)
        message: dict[str, Any] = {"role": "assistant", "content": draw(WORDS)}
        if draw(st.booleans()):
            message["reasoning"] = draw(WORDS)
        if calls:
            if draw(st.booleans()):
                message["content"] = None
            message["tool_calls"] = [
                {
                    "id": f"call_{turn}_{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                }
                for number, (name, arguments) in enumerate(calls)
            ]
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": f"call_{turn}_{number}", "content": draw(WORDS)}
            for number in range(len(calls))
        ]
        if not calls or draw(st.booleans()):
            messages.append({"role": "user", "content": draw(WORDS)})
    return messages


def as_responses(messages: list[dict[str, Any]]) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            output = {"call_id": message["tool_call_id"], "output": message["content"]}
            items.append({"type": "function_call_output", **output})
            continue
        if "reasoning" in message:
            content = [{"type": "reasoning_text", "text": message["reasoning"]}]
            items.append({"type": "reasoning", "summary": [], "content": content})
        if message["content"] is not None and message["role"] != "system":
            items.append({"role": message["role"], "content": message["content"]})
        for call in message.get("tool_calls", ()):
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    tools = [{"type": "function", "name": name, "parameters": SCHEMA} for name in NAMES]
    body: dict[str, Any] = {"input": items, "tools": tools}
    return body | ({"instructions": messages[0]["content"]} if messages[0]["role"] == "system" else {})


def as_messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        blocks: list[dict[str, Any]] = []
        if message["role"] == "tool":
            result = {"tool_use_id": message["tool_call_id"], "content": message["content"]}
            turns.append({"role": "user", "content": [{"type": "tool_result", **result}]})
            continue
        if "reasoning" in message:
            blocks.append({"type": "thinking", "thinking": message["reasoning"], "signature": "s"})
        if message["content"] is not None and message["role"] != "system":
            blocks.append({"type": "text", "text": message["content"]})
        for call in message.get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"])
            use = {"id": call["id"], "name": call["function"]["name"], "input": arguments}
            blocks.append({"type": "tool_use", **use})
        if blocks:
            turns.append({"role": message["role"], "content": blocks})
    tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
    body: dict[str, Any] = {"messages": turns, "tools": tools, "max_tokens": 300}
    return body | ({"system": messages[0]["content"]} if messages[0]["role"] == "system" else {})


def as_chat(messages: list[dict[str, Any]]) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in NAMES]
    return {"messages": messages, "tools": tools}


REPLIES = st.lists(
    WORDS
    | st.sampled_from(["<think>\nHm.\n</think>\n\n", "<tool_call>", "</tool_call>", "\n", " ", "Yes."])
    | st.tuples(st.sampled_from((*NAMES, "none")), ARGUMENTS).map(
        lambda call: f"<tool_call>{json.dumps({'name': call[0], 'arguments': call[1]})}</tool_call>"
    ),
    max_size=5,
).map("".join)


class Said:
    """The answer in any dialect: reasoning, content, calls, and whether it was cut."""

    def __init__(self, reasoning: str, content: str, calls: list[tuple[str, Any]], cut: bool) -> None:
        self.all = (reasoning, content, calls, cut)


def loads(arguments: str) -> Any:
    """Arguments as an object, as clients of ``input`` get them; empty ones have none."""
    return json.loads(arguments) if arguments else {}


def said_in_chat(answer: dict[str, Any]) -> Said:
    choice = answer["choices"][0]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    cut = choice["finish_reason"] == "length"
    return Said(message["reasoning"] or "", message["content"] or "", calls, cut)


def said_in_response(answer: dict[str, Any]) -> Said:
    texts = {"reasoning": "", "message": ""}
    calls = []
    for item in answer["output"]:
        if item["type"] == "function_call":
            calls.append((item["name"], item["arguments"]))
        else:
            texts[item["type"]] += "".join(part["text"] for part in item["content"])
    return Said(texts["reasoning"], texts["message"], calls, answer["status"] == "incomplete")


def said_in_message(answer: dict[str, Any]) -> Said:
    texts = {"thinking": "", "text": ""}
    calls = []
    for block in answer["content"]:
        if block["type"] == "tool_use":
            calls.append((block["name"], block["input"]))
        else:
            texts[block["type"]] += block[block["type"]]
    return Said(texts["thinking"], texts["text"], calls, answer["stop_reason"] == "max_tokens")


def streamed_response(events: list[Any]) -> dict[str, Any]:
    assert [event.data["sequence_number"] for event in events] == list(range(len(events)))
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        data = event.data
        if event.name == "response.output_item.added":
            assert data["output_index"] == len(items)
            items[data["output_index"]] = {"type": data["item"]["type"], "text": ""}
        elif event.name.endswith(".delta"):
            items[data["output_index"]]["text"] += data["delta"]
    final = events[-1].data["response"]
    for index, item in enumerate(final["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert items[index] == {"type": item["type"], "text": text}
    assert len(items) == len(final["output"])
    whole: dict[str, Any] = final
    return whole


def streamed_message(events: list[Any]) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event.name == "content_block_start":
            blocks.append(dict(event.data["content_block"]) | {"arguments": ""})
        elif event.name == "content_block_delta":
            delta = event.data["delta"]
            kind = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            if (name := kind.get(delta["type"])) is not None:
                into = "arguments" if name == "partial_json" else name
                blocks[-1][into] += delta[name]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = block["arguments"]
    return {"content": blocks, "stop_reason": events[-2].data["delta"]["stop_reason"]}


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(folder, lambda submit: [Finish.STOP]) as running:
        running.engine.set_state(max_len=4096)
        wait_until(lambda: '"max_model_len":4096' in running.http.get("/v1/models").text, "the state arrives")
        yield running


def ask(frontend: RunningFrontend, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = frontend.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_any_conversation_gives_the_same_prompt_and_the_same_answer(
    frontend: RunningFrontend,
) -> None:
    @given(turns(), REPLIES, st.integers(1, 200), st.integers(1, 30), st.booleans())
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def run(messages: list[dict[str, Any]], reply: str, most: int, chunk: int, parallel: bool) -> None:
        tokens = turn_ids(reply)[:most]

        def script(submit: Submit) -> Iterator[Any]:
            yield from (tokens[at : at + chunk] for at in range(0, len(tokens), chunk))
            yield Finish.LENGTH

        frontend.engine.script = script
        frontend.engine.submits.clear()
        chat, response, message = as_chat(messages), as_responses(messages), as_messages(messages)
        if not parallel:
            chat["parallel_tool_calls"] = response["parallel_tool_calls"] = False
            message["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
        first = said_in_chat(ask(frontend, "/v1/chat/completions", chat))
        whole = ask(frontend, "/v1/responses", response)
        assert said_in_response(whole).all == first.all
        reasoning, content, calls, cut = first.all
        third = ask(frontend, "/v1/messages", message)
        heard = said_in_message(third).all
        assert (*heard[:2], heard[3]) == (reasoning, content, cut)
        if not cut:
            assert heard[2] == [(name, loads(arguments)) for name, arguments in calls]
        assert len({submit.prompt_i32 for submit in frontend.engine.submits}) == 1

        stream = {"stream": True}
        events = events_of(frontend.http.post("/v1/responses", json=response | stream))
        told = streamed_response(events)
        assert said_in_response(told).all == first.all
        assert [item["type"] for item in told["output"]] == [item["type"] for item in whole["output"]]
        events = events_of(frontend.http.post("/v1/messages", json=message | stream))
        told = streamed_message(events)
        assert said_in_message(told).all == first.all
        assert [block["type"] for block in told["content"]] == [block["type"] for block in third["content"]]

    run()


def test_the_output_of_a_response_is_taken_back_as_it_is(frontend: RunningFrontend) -> None:
    reply = '<think>\nHm.\n</think>\n\nYes.<tool_call>{"name": "look", "arguments": {"x": "a"}}</tool_call>'

    def script(submit: Submit) -> Iterator[Any]:
        yield turn_ids(reply)

    frontend.engine.script = script
    user = {"role": "user", "content": "Hello"}
    chat, response, message = as_chat([user]), as_responses([user]), as_messages([user])
    said = ask(frontend, "/v1/chat/completions", chat)["choices"][0]["message"]
    output = ask(frontend, "/v1/responses", response)["output"]
    content = ask(frontend, "/v1/messages", message)["content"]
    ids = (
        said["tool_calls"][0]["id"],
        next(item["call_id"] for item in output if item["type"] == "function_call"),
        next(block["id"] for block in content if block["type"] == "tool_use"),
    )
    result = {"tool_call_id": ids[0], "role": "tool", "content": "r"}
    chat["messages"] += [said, result]
    response["input"] += [*output, {"type": "function_call_output", "call_id": ids[1], "output": "r"}]
    message["messages"] += [
        {"role": "assistant", "content": content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": ids[2], "content": "r"}]},
    ]
    frontend.engine.submits.clear()
    ask(frontend, "/v1/chat/completions", chat)
    ask(frontend, "/v1/responses", response)
    ask(frontend, "/v1/messages", message)
    prompts = {submit.prompt_i32 for submit in frontend.engine.submits}
    assert len(prompts) == 1
