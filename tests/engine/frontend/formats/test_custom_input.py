"""The text of a custom tool's call, read out of its arguments: any split gives the unsplit text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from lockstep.engine.frontend.api.tools import custom_parameters
from lockstep.engine.frontend.formats.custom_input import CustomInput
from lockstep.engine.frontend.formats.speech import Speech


def read(parts: list[str]) -> str:
    reader = CustomInput()
    return "".join([reader.push(part) for part in parts] + [reader.finish()])


def split(text: str, sizes: list[int]) -> list[str]:
    parts = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


SIZES = st.lists(st.integers(0, 7), max_size=12)


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.booleans(), SIZES)
def test_any_text_comes_back_however_it_is_written_and_split(
    text: str, ascii_only: bool, sizes: list[int]
) -> None:
    written = json.dumps({"input": text}, ensure_ascii=ascii_only)
    assert read(split(written, sizes)) == text
    assert read(list(written)) == text


@given(st.text(st.sampled_from('{"input: \\u0dD8}cEn'), max_size=40), SIZES)
def test_any_split_of_anything_gives_the_unsplit_text(text: str, sizes: list[int]) -> None:
    start = '{"input": "'
    assert read(split(text, sizes)) == read([text])
    assert read(split(start + text, sizes)) == read([start + text])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "cut', "cut"),
        ('{ "input" : "a" , "more": 1}', "a"),
        ('{"text": "a"}', '{"text": "a"}'),
        ('{"input": 5}', '{"input": 5}'),
        ("", ""),
        ('{"input": "\\ud83d"}', "�"),
        ('{"input": "\\ud83d\\ude42\\u00e9\\/"}', "🙂é/"),
    ],
)
def test_arguments_of_other_shapes(arguments: str, text: str) -> None:
    assert read([arguments]) == read(list(arguments)) == text


def test_the_schema_holds_the_pattern_of_the_whole_text() -> None:
    schema = custom_parameters("A text.", "a|b")
    assert schema["properties"]["input"] == {
        "type": "string",
        "description": "A text.",
        "pattern": "^(?:a|b)$",
    }
    assert schema["required"] == ["input"] and schema["additionalProperties"] is False


def test_a_call_is_shown_with_its_text_and_one_that_is_no_json_as_it_is() -> None:
    speech = Speech(custom=frozenset({"patch"}))
    shown: list[str] = []
    for name, arguments in (("patch", ['{"input": "a', '\\nb"}']), ("patch", ["no ", "json"])):
        speech.open_call(name, "c1")
        for part in arguments:
            speech.arguments(part)
            shown += [call["custom"]["input"] for call in speech.take().calls]
        speech.close_call()
        shown += [call["custom"]["input"] for call in speech.take().calls]
    assert shown == ["a", "\nb", "", "", "", "no json"]
    speech.open_call("other", "c2")
    assert speech.take().calls[0]["type"] == "function"
