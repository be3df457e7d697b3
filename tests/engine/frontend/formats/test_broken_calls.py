"""Calls that models write wrongly or that are cut: arguments are always the start of a JSON object,
and no text is lost.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.engine.frontend.json_starts import starts_an_object
from support.engine.frontend.replies import KIMI, NAMES, VALUE_ENDS, Said, read, written

SECTION = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
ARRAY = '{"type": "array"}'
WHOLE = {"city": 'Köln "am" \\ Rhein\n🙂', "days": -12.5e3, "note": {"a": [1, None, True], "b": {}}}


def test_the_check_for_starts_of_objects_can_fail() -> None:
    whole = json.dumps(WHOLE)
    assert all(starts_an_object(whole[:end]) for end in range(len(whole) + 1))
    for bad in (
        "ci",
        "[",
        "nul",
        '{"a": [1}',
        '{"a" 1',
        "{1",
        '{"a": "\\d',
        '{"a": "\n',
        "{}}",
        '{"a": 01',
        "null",
    ):
        assert not starts_an_object(bad), bad


def check(said: Said) -> None:
    for call in said.calls:
        assert starts_an_object(call["arguments"]), call


@pytest.mark.parametrize("format", NAMES)
def test_a_call_cut_anywhere(format: str) -> None:
    text = (
        "<think>a</think>b"
        + written(format, "get_weather", WHOLE)
        + "\n"
        + written(format, "now", {"x": [{}]})
    )
    for end in range(len(text)):
        said = read(text[:end], format, finish="length")
        check(said)
        assert read(text[:end], format, [1] * end, finish="length").plain == said.plain
        assert said.reason == "length"


REASONED = "<think>I should look it up.\n"


@pytest.mark.parametrize("format", NAMES)
def test_a_call_inside_open_reasoning_is_a_call(format: str) -> None:
    text = written(format, "get_weather", {"city": "x"})
    called = ("", "I should look it up.", [("get_weather", '{"city": "x"}')], "tool_calls")
    for whole, expected in (
        (REASONED + text, called),
        (REASONED + text + "</think>", called),
        (REASONED + text + "\n</think>\n\nDone", ("Done", *called[1:])),
        (REASONED + text + text, (*called[:2], called[2] * 2, called[3])),
    ):
        for sizes in (None, [1] * len(whole), [3] * len(whole)):
            content, *rest = read(whole, format, sizes).plain
            assert (content.strip(), *rest) == expected
        content, *rest = read(whole.removeprefix("<think>"), format, thinking=True).plain
        assert (content.strip(), *rest) == expected
    one = read(REASONED + text + text, format, one_call=True)
    assert (one.reasoning, len(one.calls)) == ("I should look it up.", 1)
    hidden = read(REASONED + text, format, show_reasoning=False)
    assert (hidden.reasoning, len(hidden.calls)) == ("", 1)


@pytest.mark.parametrize("format", NAMES)
def test_a_tag_in_reasoning_that_opens_no_call_is_reasoning(format: str) -> None:
    opening = {"kimi_k2": "<|tool_calls_section_begin|>", "mistral": "[TOOL_CALLS]"}.get(
        format, "<tool_call>"
    )
    opening = "<｜tool▁calls▁begin｜>" if format == "deepseek_v3" else opening
    said = read(f"<think>I write {opening} or not</think>b", format)
    assert said.plain == ("b", f"I write {opening} or not", [], "stop")


def around(format: str, arguments: str) -> str:
    """A call of ``now`` with the text ``arguments``."""
    return {
        "hermes": f'<tool_call>\n{{"name": "now", "arguments": {arguments}}}\n</tool_call>',
        "kimi_k2": KIMI.format("functions.now:0", arguments),
        "deepseek_v3": SECTION.format(f"function<｜tool▁sep｜>now\n```json\n{arguments}\n```"),
        "deepseek_v3.1": SECTION.format(f"now<｜tool▁sep｜>{arguments}"),
        "mistral": f'[TOOL_CALLS] [{{"name": "now", "arguments": {arguments}}}]',
        "mistral_v11": f"[TOOL_CALLS]now[ARGS]{arguments}",
    }[format]


WAYS = ("hermes", "kimi_k2", "deepseek_v3", "deepseek_v3.1", "mistral", "mistral_v11")


def parser_of(way: str) -> str:
    return {"deepseek_v3.1": "deepseek_v3", "mistral_v11": "mistral"}.get(way, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("written_as", "arguments"),
    [
        ("null", "{}"),
        ('""', "{}"),
        ('" "', "{}"),
        ('"{}"', "{}"),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        ("{ }", "{ }"),
        ('{"a": 1}}', '{"a": 1}'),
        ('{"a": 1}]}', '{"a": 1}'),
        ('{"a": 1,}', '{"a": 1}'),
        ('{"a": [1, 2,\n]}', '{"a": [1, 2\n]}'),
        ('{"a": "x\ny\t"}', '{"a": "x\\ny\\t"}'),
        (r'{"a": "\d\u12"}', r'{"a": "\\d\\u12"}'),
        ('{"a": "</tool_call><|tool_call_end|><｜tool▁call▁end｜>```[TOOL_CALLS]"}', None),
    ],
)
def test_odd_arguments_are_an_object_all_the_same(way: str, written_as: str, arguments: str | None) -> None:
    text = around(way, written_as)
    for sizes in (None, [1] * len(text)):
        said = read(text, parser_of(way), sizes)
        assert said.plain == ("", "", [("now", arguments or written_as)], "tool_calls")


@pytest.mark.parametrize("way", ["kimi_k2", "deepseek_v3", "deepseek_v3.1"])
def test_no_arguments_are_an_empty_object(way: str) -> None:
    assert read(around(way, ""), parser_of(way)).plain == ("", "", [("now", "{}")], "tool_calls")
    assert read(around(way, " \n"), parser_of(way)).plain == ("", "", [("now", "{}")], "tool_calls")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arguments", ["[1]", "12", "true", '"words"', "[]", '"{"'])
def test_arguments_that_are_no_object_make_no_call(way: str, arguments: str) -> None:
    text = around(way, arguments)
    assert read(text, parser_of(way)).plain == (text, "", [], "stop")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "arguments", ['{"a": oops}', '{"a": [1}', '{"a" 1}', "{1}", '{"a": 1 "b"}', '{"a": 01}']
)
def test_broken_arguments_end_where_they_break(way: str, arguments: str) -> None:
    text = around(way, arguments) + "after"
    said = read(text, parser_of(way))
    check(said)
    assert read(text, parser_of(way), [1] * len(text)).plain == said.plain
    [call] = said.calls
    kept = call["arguments"] + said.content
    assert "after" in said.content
    assert said.reason == "stop", "not a call to act upon"
    assert "<" not in said.content, "a tag is no content"
    assert all(char in kept for char in arguments.strip("{}[] "))


def test_the_calls_of_a_section_after_a_broken_one_are_read() -> None:
    one = "<|tool_call_begin|>functions.now:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
    calls = one.format(0, '{"a": oops}') + one.format(1, "{}")
    text = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>x"
    assert read(text, "kimi_k2").plain == ("oops}x", "", [("now", '{"a": '), ("now", "{}")], "stop")


def test_two_calls_between_the_tags_of_hermes() -> None:
    one, two = '{"name": "now", "arguments": {}}', '{"name": "get_weather", "arguments": {"city": "x"}}'
    calls = [("now", "{}"), ("get_weather", '{"city": "x"}')]
    for text in (f"{one}\n{two}", f"{one},{two}", f"[{one}, {two}]", f"{one}}}\n{two}"):
        said = read(f"<tool_call>\n{text}\n</tool_call>", "hermes")
        if "}}}" in text:
            assert said.plain[2] == calls[:1]
        else:
            assert said.plain == ("", "", calls, "tool_calls"), text
    assert len(read(f"<tool_call>{one}{two}</tool_call>", "hermes", one_call=True).calls) == 1


def test_what_is_cut_before_the_arguments_is_a_call_without_any() -> None:
    for text in (
        '<tool_call>{"name": "now"',
        '<tool_call>{"name": "now", "argum',
        '<tool_call>{"name": "now", "arguments": ',
        '<tool_call>{"name": "now", "arguments": nul',
        '<tool_call>{"name": "now", "arguments": "',
    ):
        assert read(text, "hermes", finish="length").plain == ("", "", [("now", "")], "length"), text
    text = '<tool_call>{"name": "now", "arguments": "{\\"ci'
    assert read(text, "hermes", finish="length").plain == ("", "", [("now", '{"ci')], "length")
    assert read('<tool_call>{"name": "no', "hermes").calls == []


def test_text_behind_a_call_is_content_and_stray_tags_are_not() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}} junk</tool_call>\nafter'
    assert read(text, "hermes").plain == (" junk\nafter", "", [("now", "{}")], "tool_calls")
    text = '<tool_call>{"name": "now", "arguments": {}, "b": x}</tool_call>'
    assert read(text, "hermes").plain[:3] == (', "b": x}', "", [("now", "{}")])
    assert read("a</tool_call>b", "hermes").content == "a</tool_call>b"


def test_an_id_that_the_template_would_refuse_is_replaced() -> None:
    assert read("[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", "mistral").calls[0]["id"] == "abcdefghi"
    for id in ("short", "äbcdefghi", "call-12345"):
        found = read(f"[TOOL_CALLS]now[CALL_ID]{id}[ARGS]{{}}", "mistral").calls[0]["id"]
        assert len(found) == 9 and found.isalnum() and found.isascii()


# --------------------------------------------------------------------------- GLM


def glm(part: Any, value: str, root: dict[str, Any] | None = None) -> Any:
    """The argument ``x`` with the schema ``part`` as ``value`` is read."""
    schema = {"type": "object", "properties": {"x": part}, **(root or {})}
    text = f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    said = read(text, "glm4", tools={"f": schema})
    assert read(text, "glm4", [1] * len(text), tools={"f": schema}).plain == said.plain
    assert said.reason == "tool_calls"
    return said.values[0][1]["x"]


STRING, NULL, INTEGER, ARRAY_OF = {"type": "string"}, {"type": "null"}, {"type": "integer"}, {"type": "array"}
DEFS = {"$defs": {"s": STRING, "n": {"anyOf": [{"$ref": "#/$defs/s"}, NULL]}, "l": {"$ref": "#/$defs/l"}}}


@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        (STRING, "12345", "12345"),
        (STRING, "null", "null"),
        (STRING, ' "a" ', ' "a" '),
        ({"anyOf": [STRING, NULL]}, "12345", "12345"),
        ({"anyOf": [STRING, NULL]}, "null", None),
        ({"oneOf": [NULL, STRING]}, "true", "true"),
        ({"type": ["string", "null"]}, "12345", "12345"),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string", "null"]}, "[1, 2", "[1, 2"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "5", "5"),
        ({"anyOf": [STRING, ARRAY_OF]}, '["a"]', ["a"]),
        ({"anyOf": [STRING, ARRAY_OF]}, "5", "5"),
        ({"$ref": "#/$defs/s"}, "5", "5"),
        ({"$ref": "#/$defs/n"}, "5", "5"),
        ({"$ref": "#/$defs/n"}, "null", None),
        ({"$ref": "#/$defs/l"}, "5", 5),
        ({"$ref": "#/$defs/nowhere"}, "5", 5),
        ({"allOf": [{"type": ["string", "integer"]}, STRING]}, "5", "5"),
        ({"allOf": [{"$ref": "#/$defs/s"}], "description": "d"}, "5", "5"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"enum": ["auto", 5]}, "5", 5),
        ({"enum": ["auto", None]}, "null", None),
        ({"enum": ["null", "a"]}, "null", "null"),
        ({"anyOf": [{"enum": ["auto"]}, INTEGER]}, "5", 5),
        ({"anyOf": [{"const": "auto"}, INTEGER]}, "auto", "auto"),
        ({"const": "5"}, "5", "5"),
        ({"const": 5}, "5", 5),
        ({"pattern": "^[0-9]+$"}, "5", "5"),
        (INTEGER, "5", 5),
        (INTEGER, " 5 ", 5),
        (INTEGER, "five", "five"),
        (INTEGER, "null", "null"),
        ({"type": ["integer", "null"]}, "null", None),
        (ARRAY_OF, '["</arg_value>", {"a": 1,}]', ["</arg_value>", {"a": 1}]),
        ({"type": "object"}, '{"a": "x\ny"}', {"a": "x\ny"}),
        ({}, "5", 5),
        (True, "[1]", [1]),
        ({"type": None}, "5", 5),
        ({"enum": None}, "5", 5),
        ({"anyOf": None, "$ref": 5, "allOf": "x"}, "5", 5),
    ],
)
def test_values_follow_the_schema(part: Any, value: str, expected: Any) -> None:
    found = glm(part, value, DEFS)
    assert (found, type(found)) == (expected, type(expected))


def test_the_schema_of_a_value_is_found_wherever_it_stands() -> None:
    text = "<tool_call>f<arg_key>x</arg_key><arg_value>5</arg_value></tool_call>"
    part = {"properties": {"x": STRING}}
    for schema, expected in (
        ({"additionalProperties": STRING}, "5"),
        ({"additionalProperties": True}, 5),
        ({"patternProperties": {"x": STRING}}, "5"),
        ({"allOf": [part]}, "5"),
        ({"$ref": "#/$defs/a", "$defs": {"a": part}}, "5"),
        ({"anyOf": [part, {"properties": {"x": NULL}}]}, "5"),
        ({"properties": None}, 5),
        ({"properties": []}, 5),
        ({"$ref": "#"}, 5),
        (None, 5),
        ({}, 5),
    ):
        assert read(text, "glm4", tools={"f": schema}).values == [("f", {"x": expected})], schema


def test_values_that_are_cut() -> None:
    schema = {"properties": {"x": ARRAY_OF, "s": STRING, "n": {"type": ["string", "null"]}}}
    for cut, expected in (
        ("<arg_key>ci", '{"ci'),
        ("<arg_key>x</arg_key>\n<arg_value>[1, 2", '{"x": [1, 2'),
        ("<arg_key>x</arg_key><arg_value>[1, 2]", '{"x": [1, 2]'),
        ("<arg_key>x</arg_key><arg_value>[1, 2]</arg_va", '{"x": [1, 2]'),
        ("<arg_key>x</arg_key><arg_value>ab", '{"x": "ab'),
        ('<arg_key>s</arg_key><arg_value>a"b', '{"s": "a\\"b'),
        ("<arg_key>n</arg_key><arg_value>[1, 2", '{"n": "[1, 2'),
        ("<arg_key>n</arg_key><arg_value>", '{"n": "'),
        ("<arg_key>x</arg_key><arg", '{"x": '),
        (f"<arg_key>{'k' * 300}</arg_key><arg_value>1", f'{{"{"k" * 300}": 1'),
    ):
        said = read("<tool_call>f\n" + cut, "glm4", finish="length", tools={"f": schema})
        assert (said.calls[0]["arguments"], said.reason) == (expected, "length"), cut


def test_a_function_name_of_any_letters() -> None:
    text = "<tool_call>my tool\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert read(text, "glm4", tools={"my tool": {}}).values == [("my tool", {"a": 1})]
    assert read(text, "glm4", tools={"f": {}}).calls == []


def test_a_quote_that_nothing_closes_begins_a_text_and_not_a_json_string() -> None:
    for format, end in VALUE_ENDS.items():
        text = written(format, "f", {"x": '"open'})
        assert end in text
        assert read(text, format, tools={"f": {}}).values == [("f", {"x": '"open'})]
