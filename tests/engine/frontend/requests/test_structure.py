"""Grammars of structured output: the texts they allow in every format, and the requests that are
refused before anything is queued.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher
from pydantic import ValidationError

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest, CompletionRequest
from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats, Manner
from lockstep.engine.frontend.grammars.trial import Trial
from lockstep.engine.frontend.requests.structure import grammar_of
from support.engine.frontend.replies import VALUE_ENDS, written
from support.engine.text.byte_vocabulary import END, byte_vocabulary

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["city", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}
FUNCTIONS: list[dict[str, Any]] = [{"name": "get_weather", "parameters": PARAMETERS}, {"name": "now"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
SCHEMAS = {function["name"]: function.get("parameters", {}) for function in FUNCTIONS}
# Some formats write strings as free text, and a random text does not find the tag that ends it.
UNQUOTED_PARAMETERS = {
    **PARAMETERS,
    "properties": {**PARAMETERS["properties"], "city": {"type": "string", "enum": ["Rome"]}},
}  # type: ignore[dict-item]
UNQUOTED_TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": UNQUOTED_PARAMETERS}},
    TOOLS[1],
]
NAMED = {"type": "function", "function": {"name": "now"}}


@cache
def trial() -> Trial:
    return Trial(byte_vocabulary())


def no_special(tag: str) -> int | None:
    return None


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


def manner_of(ask: ChatRequest, format: str | None, **fields: Any) -> Manner:
    tools = (
        {tool.function.name: tool.function.parameters or {} for tool in ask.tools or ()}
        if ask.offers_tools
        else None
    )
    named = not isinstance(ask.tool_choice, str | None)
    one = ask.parallel_tool_calls is False
    formats = Formats(REASONING_TAGS["think"], TOOL_FORMATS[format] if format else None)
    return Manner(formats, tools=tools, named=named, one_call=one, **fields)


def grammar(ask: ChatRequest, format: str | None = None, **fields: Any) -> str:
    fields.setdefault("answering", True)
    claims = grammar_of(ask, manner_of(ask, format, **fields), no_special)
    for claim in claims:
        fault = trial().fault(claim.grammar)
        if fault:
            raise claim.refused(fault)
    return claims[-1].grammar if claims else ""


def walk(text: str, seed: int, end_share: float = 0.5, most: int = 4000) -> str:
    """A random text of the grammar ``text``, byte by byte; ends where it may, with the chance
    ``end_share``.
    """
    chance, matcher, said = random.Random(seed), LLMatcher(byte_vocabulary(), text, log_level=0), bytearray()
    while len(said) < most:
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(END) if mask[byte // 8] >> byte % 8 & 1]
        if not allowed or (matcher.is_accepting() and chance.random() < end_share):
            assert matcher.is_accepting(), said
            return said.decode()
        printable = [byte for byte in allowed if byte < 128] or allowed
        byte = chance.choice(printable)
        assert matcher.consume_token(byte)
        said.append(byte)
    raise AssertionError(f"no end after {most} bytes: {bytes(said[:200])!r}")


def accepts(grammar_text: str, text: str) -> bool:
    matcher = LLMatcher(byte_vocabulary(), grammar_text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


# --------------------------------------------------------------------------- content


def test_free_replies_have_no_grammar() -> None:
    assert grammar(chat()) == ""
    assert grammar(chat(response_format={"type": "text"})) == ""
    assert grammar(chat(tools=TOOLS), "hermes") == ""
    assert grammar(chat(tools=TOOLS, tool_choice="none"), "hermes") == ""


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_of_a_schema_are_valid(seed: int) -> None:
    for fields in (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True},
            }
        },
        {"structured_outputs": {"json": PARAMETERS}},
        {"structured_outputs": {"json": json.dumps(PARAMETERS)}},
    ):
        jsonschema.validate(json.loads(walk(grammar(chat(**fields)), seed)), PARAMETERS)


def test_json_objects_in_the_usual_ways_of_writing_them() -> None:
    text = grammar(chat(response_format={"type": "json_object"}))
    value = {"a": [1, {"b": None}], "c": 'x"\\é'}
    for options in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}):
        assert accepts(text, json.dumps(value, ensure_ascii=False, **options)), options
    assert not accepts(text, "[1]")
    assert not accepts(text, '{"a":  1}'), "white space is bounded, or a model could go on for ever"


def test_regex_and_choice() -> None:
    dates = grammar(chat(structured_outputs={"regex": r"\d{4}-[01]\d/é?"}))
    assert accepts(dates, "2026-11/")
    assert accepts(dates, "2026-11/é")
    assert not accepts(dates, "x2026-11/")
    choices = ["yes", "no", 'a "b"\\\n', "東京", ""]
    text = grammar(chat(structured_outputs={"choice": choices}))
    assert all(accepts(text, choice) for choice in choices)
    assert not accepts(text, "yesno")
    assert accepts(grammar(chat(structured_outputs={"regex": ".*"})), "anything 東京")
    assert accepts(grammar(chat(structured_outputs={"regex": ""})), "")
    completion = CompletionRequest.model_validate({"prompt": "x", "structured_outputs": {"choice": ["yes"]}})
    assert accepts(grammar_of(completion, None, no_special)[-1].grammar, "yes")


def test_reasoning_comes_before_the_grammar() -> None:
    ask = chat(structured_outputs={"choice": ["yes"]})
    may, must, closed = (
        grammar(ask, answering=False),
        grammar(ask, answering=False, thinking=True),
        grammar(ask),
    )
    assert accepts(may, "yes")
    assert accepts(may, "<think>no\n</th </think>\n\nyes")
    assert not accepts(may, "no</think>yes")
    assert accepts(must, "I think\n\nno</think>yes")
    assert not accepts(must, "yes")
    assert not accepts(must, "a</think>b</think>yes"), "the first closing tag ends it"
    assert not accepts(closed, "<think>no</think>yes")


def test_tags_that_are_tokens_are_written_as_tokens() -> None:
    ask = chat(structured_outputs={"choice": ["yes"]})
    manner = manner_of(ask, None, thinking=True)
    text = grammar_of(ask, manner, {"</think>": END}.get)[-1].grammar
    matcher = LLMatcher(byte_vocabulary(), text, log_level=0)
    assert matcher.consume_tokens([*b"a </think", END, *b"yes"])
    assert matcher.is_accepting()
    spelled = LLMatcher(byte_vocabulary(), text, log_level=0)
    assert spelled.try_consume_tokens([*b"</think>"]) == 7, "the parser would take it for the end"


# --------------------------------------------------------------------------- tools


@pytest.mark.parametrize("format", TOOL_FORMATS)
@pytest.mark.parametrize("seed", range(6))
def test_required_calls_are_read_back_as_valid_calls(format: str, seed: int) -> None:
    for fields in ({}, {"parallel_tool_calls": False}):
        ask = chat(tools=UNQUOTED_TOOLS if format in VALUE_ENDS else TOOLS, tool_choice="required", **fields)
        said = walk(grammar(ask, format), seed, end_share=0.9)
        parser = manner_of(ask, format).parser()
        assert parser is not None
        parser.push(said)
        parser.finish()
        delta = parser.take()
        assert delta.content == "", said
        assert delta.calls, said
        assert len(delta.calls) == 1 or not fields
        for call in delta.calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
        assert parser.reason("stop") == "tool_calls"


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_a_named_function_is_called_once(format: str) -> None:
    ask = chat(tools=TOOLS, tool_choice=NAMED)
    for seed in range(4):
        parser = manner_of(ask, format).parser()
        assert parser is not None
        parser.push(walk(grammar(ask, format), seed, end_share=0.0))
        parser.finish()
        assert [call["function"]["name"] for call in parser.take().calls] == ["now"]
        assert parser.reason("stop") == "stop"


def test_a_schema_and_tools_let_the_model_choose() -> None:
    text = grammar(chat(tools=TOOLS, response_format={"type": "json_object"}), "hermes")
    assert accepts(text, '{"a": 1}')
    assert accepts(text, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(text, "free text")


def test_the_calls_of_the_chat_templates_are_allowed() -> None:
    ask = chat(tools=TOOLS, tool_choice="required")
    arguments = '{"city": "Paris", "tags": []}'
    for format, said in {
        "hermes": f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>',
        "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>",
        "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {arguments}}}]',
        "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        f"{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        **{
            format: written(format, "get_weather", {"city": "Paris", "tags": []})
            for format in (
                "deepseek_v32",
                "glm4",
                "glm47",
                "hy_v3",
                "hy_v3_preview",
                "minimax_m2",
                "qwen3_coder",
            )
        },
    }.items():
        assert accepts(grammar(ask, format), said), format


# --------------------------------------------------------------------------- refusals


WRONG_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}},
}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (schema(False), "response_format.json_schema.schema", "schema is false"),
        (
            schema({"type": "string", "minLength": 3, "maxLength": 1}),
            "response_format",
            "minLength (3) is greater than maxLength (1)",
        ),
        (
            schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
            "response_format",
            "'a' is unsatisfiable",
        ),
        (schema({"type": "text"}), "response_format", "Invalid type: text"),
        (schema({"$ref": "#/nowhere"}), "response_format", "does not exist"),
        (schema({"not": {}}), "response_format", "not cannot be held"),
        (schema({"type": "string", "pattern": "("}), "response_format", "unclosed group"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-ahead"),
        (
            {"structured_outputs": {"regex": r"[^\s\S]"}},
            "structured_outputs.regex",
            "it allows no text at all",
        ),
        (
            {"structured_outputs": {"regex": r"a[^\s\S]"}},
            "structured_outputs.regex",
            "it allows no text at all",
        ),
        (
            {"tools": [WRONG_TOOL], "tool_choice": "required"},
            "tools[0].function.parameters",
            "Invalid type: x",
        ),
    ],
)
def test_what_cannot_be_followed_is_a_400_that_says_why(
    fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ApiError) as refused:
        grammar(chat(**fields), "hermes")
    assert refused.value.status_code == 400
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)
    assert message in refused.value.detail
    assert len(refused.value.detail) < 400
    assert "start:" not in refused.value.detail, "our own grammar is no help to the client"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "exactly one of json, regex and choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar is not supported"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "exclude each other",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "cannot be combined with ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "cannot be combined with min_tokens"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "cannot be combined with",
        ),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        chat(**fields)
