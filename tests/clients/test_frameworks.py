"""Frameworks on top of the clients, against the served demo, in each dialect that they speak."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from support.clients import PERSON, SUM, WEATHER, Address, client_package

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

OPENAI_2 = "clients-openai2"


class Person(pydantic.BaseModel):
    name: str
    age: int


def get_weather(city: str) -> str:
    """Returns the weather."""
    return "sunny"


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_litellm(server: Address, dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = client_package("litellm")
    base = server.v1 if dialect == "openai" else server.base
    asked: Any = {"model": f"{dialect}/{server.model}", "api_base": base, "api_key": "none", "max_tokens": 64}
    asked["temperature"] = 0
    messages = [{"role": "user", "content": SUM}]
    whole = litellm.completion(messages=messages, **asked).choices[0].message.content
    assert "19" in whole
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in litellm.completion(messages=messages, stream=True, **asked)
    ]
    assert "19" in "".join(parts)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    called = litellm.completion(
        messages=[{"role": "user", "content": WEATHER}], tools=tools, tool_choice="required", **asked
    )
    [call] = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"city"}


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_openai(server: Address, responses: bool) -> None:
    package = client_package("langchain_openai")
    model = package.ChatOpenAI(
        model=server.model, base_url=server.v1, api_key="none", temperature=0, use_responses_api=responses
    )
    assert "19" in model.invoke(SUM).text
    assert "19" in "".join(chunk.text for chunk in model.stream(SUM))
    assert model.with_structured_output(Person).invoke(PERSON).age == 31
    bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    [call] = bound.invoke(WEATHER).tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Bonn"})


def test_langchain_anthropic(server: Address) -> None:
    package = client_package("langchain_anthropic")
    model = package.ChatAnthropic(
        model=server.model, base_url=server.base, api_key="none", max_tokens=64, temperature=0
    )
    assert "19" in model.invoke(SUM).text
    assert "19" in "".join(chunk.text for chunk in model.stream(SUM))
    [call] = model.bind_tools([get_weather], tool_choice="any").invoke(WEATHER).tool_calls
    assert call["name"] == "get_weather"


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(server: Address, kind: str) -> None:
    package, models = client_package("pydantic_ai"), client_package("pydantic_ai.models.openai")
    providers = client_package("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=server.v1, api_key="none")
    model = getattr(models, kind)(server.model, provider=provider, settings={"temperature": 0})
    assert "19" in package.Agent(model).run_sync(SUM).output
    assert package.Agent(model, output_type=Person).run_sync(PERSON).output.age == 31


@pytest.mark.apart
def test_llama_index(server: Address) -> None:
    package = client_package("llama_index.llms.openai_like", OPENAI_2)
    core = client_package("llama_index.core.tools", OPENAI_2)
    told: Any = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096}
    llm = package.OpenAILike(
        model=server.model, api_base=server.v1, api_key="none", max_tokens=64, temperature=0, **told
    )
    message = client_package("llama_index.core.llms", OPENAI_2).ChatMessage
    asked = [message(role="user", content=SUM)]
    assert "19" in llm.chat(asked).message.content
    assert "19" in "".join(part.delta or "" for part in llm.stream_chat(asked))
    tool = core.FunctionTool.from_defaults(get_weather)
    reply = llm.chat_with_tools([tool], user_msg=WEATHER, tool_required=True)
    [call] = llm.get_tool_calls_from_response(reply)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Bonn"})
    structured = llm.as_structured_llm(Person).chat([message(role="user", content=PERSON)])
    assert structured.raw.age == 31


@pytest.mark.apart
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor(server: Address, mode: str) -> None:
    instructor, openai = client_package("instructor", OPENAI_2), client_package("openai")
    with openai.OpenAI(base_url=server.v1, api_key="none", timeout=60) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        messages: Any = [{"role": "user", "content": PERSON}]
        asked: Any = {"model": server.model, "messages": messages, "temperature": 0, "max_retries": 0}
        found = client.create(response_model=Person, **asked)
    assert found.age == 31


@pytest.mark.apart
def test_instructor_in_anthropics_dialect(server: Address) -> None:
    instructor, anthropic = client_package("instructor", OPENAI_2), client_package("anthropic")
    with anthropic.Anthropic(base_url=server.base, api_key="none", timeout=60) as plain:
        client = instructor.from_anthropic(plain)
        messages: Any = [{"role": "user", "content": PERSON}]
        asked: Any = {
            "model": server.model,
            "max_tokens": 64,
            "max_retries": 0,
            "extra_body": {"temperature": 0},
        }
        found = client.create(response_model=Person, messages=messages, **asked)
    assert found.age == 31
