"""OpenAI's client and its Agents SDK against the served demo."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest

from support.clients import PERSON, SUM, WEATHER, Address, client_package

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARAMETERS |= {"additionalProperties": False}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture
def client(server: Address) -> Iterator[Any]:
    openai = client_package("openai")
    with openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_its_stream_and_its_tools(client: Any, server: Address) -> None:
    asked: Any = {"model": server.model, "messages": [{"role": "user", "content": SUM}], "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    assert "19" in whole.message.content and whole.finish_reason == "stop"
    parts = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(parts) == whole.message.content
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == whole.message.content
    tools: Any = [
        {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}}
    ]
    messages: Any = [{"role": "user", "content": WEATHER}]
    message = (
        client.chat.completions.create(
            **asked | {"messages": messages}, tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        .choices[0]
        .message
    )
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Bonn"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    last = client.chat.completions.create(**asked | {"messages": [*messages, message, result]}, tools=tools)
    assert "sunny" in last.choices[0].message.content


def test_a_response_and_its_stream(client: Any, server: Address) -> None:
    whole = client.responses.create(model=server.model, input=SUM, temperature=0)
    assert "19" in whole.output_text and whole.output[0].type == "reasoning"
    with client.responses.stream(model=server.model, input=SUM, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text


def test_structured_text_is_parsed_in_both_dialects(client: Any, server: Address) -> None:
    parsed = client.responses.parse(model=server.model, input=PERSON, text_format=Person, temperature=0)
    assert parsed.output_parsed.age == 31
    messages: Any = [{"role": "user", "content": PERSON}]
    chat = client.chat.completions.parse(
        model=server.model, messages=messages, response_format=Person, temperature=0
    )
    assert chat.choices[0].message.parsed == parsed.output_parsed


def test_a_tool_is_called_and_its_result_goes_back(client: Any, server: Address) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}]
    asked: Any = [{"role": "user", "content": WEATHER}]
    first = client.responses.create(
        model=server.model, input=asked, tools=tools, tool_choice="required", temperature=0
    )
    [call] = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Bonn"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
    second = client.responses.create(
        model=server.model, input=[*asked, *first.output, result], tools=tools, temperature=0
    )
    assert "sunny" in second.output_text


@pytest.mark.parametrize("kind", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_agents_sdk_runs_an_agent_with_a_tool(server: Address, kind: str, streamed: bool) -> None:
    agents, openai = client_package("agents"), client_package("openai")
    agents.set_tracing_disabled(True)
    cities: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Returns the weather."""
        cities.append(city)
        return "sunny"

    agent = agents.Agent(
        name="agent",
        instructions="Be kind.",
        tools=[get_weather],
        model=getattr(agents, kind)(server.model, openai.AsyncOpenAI(base_url=server.v1, api_key="none")),
        model_settings=agents.ModelSettings(temperature=0, tool_choice="required"),
    )

    async def run() -> Any:
        if not streamed:
            return await agents.Runner.run(agent, WEATHER)
        running = agents.Runner.run_streamed(agent, WEATHER)
        async for _ in running.stream_events():
            pass
        return running

    done = asyncio.run(run())
    assert cities == ["Bonn"]
    assert "sunny" in done.final_output
