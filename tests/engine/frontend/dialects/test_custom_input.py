"""The text of a custom tool's call, read out of its arguments: any split gives the unsplit text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from lockstep.engine.frontend.dialects.custom_input import CustomInput, custom_parameters


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
