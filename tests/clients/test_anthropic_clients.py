"""Anthropic's client against the served demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.clients import SUM, WEATHER, Address, client_package

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GREEDY = {"temperature": 0}  # newer clients have no such argument


@pytest.fixture
def client(server: Address) -> Iterator[Any]:
    anthropic = client_package("anthropic")
    with anthropic.Anthropic(base_url=server.base, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_message_and_its_stream(client: Any, server: Address) -> None:
    asked: Any = {"model": server.model, "max_tokens": 64, "messages": [{"role": "user", "content": SUM}]}
    whole = client.messages.create(**asked, extra_body=GREEDY)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert "19" in whole.content[-1].text and whole.stop_reason == "end_turn"
    with client.messages.stream(**asked, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[-1].text
    assert [block.model_dump() for block in final.content] == [block.model_dump() for block in whole.content]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_is_called_and_its_result_goes_back(client: Any, server: Address) -> None:
    messages: Any = [{"role": "user", "content": WEATHER}]
    asked: Any = {
        "model": server.model,
        "max_tokens": 64,
        "tools": [{"name": "get_weather", "description": "Returns the weather", "input_schema": SCHEMA}],
        "extra_body": GREEDY,
    }
    first = client.messages.create(messages=messages, tool_choice={"type": "any"}, **asked)
    [use] = [block for block in first.content if block.type == "tool_use"]
    assert (use.name, use.input, first.stop_reason) == ("get_weather", {"city": "Bonn"}, "tool_use")
    with client.messages.stream(messages=messages, tool_choice={"type": "any"}, **asked) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[-1].input == {"city": "Bonn"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"weather": "sunny"}'}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=messages, **asked)
    assert "sunny" in second.content[-1].text


def test_tokens_are_counted(client: Any, server: Address) -> None:
    asked: Any = {"model": server.model, "messages": [{"role": "user", "content": SUM}]}
    count = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(max_tokens=1, **asked).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_are_the_clients_own(client: Any, server: Address) -> None:
    anthropic = client_package("anthropic")
    user: Any = [{"role": "user", "content": SUM}]
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", max_tokens=9, messages=user)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(model=server.model, max_tokens=10**6, messages=user, timeout=60)
