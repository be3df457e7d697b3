"""Random replies made of tags, fragments of calls and junk: no parser raises, nothing is lost, cuts
change nothing, and arguments are the start of an object.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import HealthCheck, example, given, settings, strategies as st

from support.engine.frontend.json_starts import starts_an_object
from support.engine.frontend.replies import MARKERS, NAMES, VALUE_ENDS, Said, read, written

SCHEMAS: list[Any] = [
    {},
    None,
    {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    {"properties": {"city": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "days": {"type": "array"}}},
    {"properties": None, "required": 5, "$ref": "#"},
    {"additionalProperties": {"enum": ["12", 12, None]}},
]
TAGS = ["<think>", "</think>", *MARKERS]
PIECES = [
    '{"name": "now", "arguments": {',
    '{"name": "now", "arguments": ',
    '{"arguments": {"a": 1}, "name": "now"}',
    '"{\\"a\\": 1}"',
    *(
        '"a": 1',
        '"a": "',
        '"',
        "\\",
        "\\u12",
        "\\d",
        ": ",
        ",",
        "{",
        "}",
        "[",
        "]",
        "}}",
        "null",
        "tru",
        "-1.5e",
        "01",
    ),
    *(
        "\n",
        " ",
        "\t",
        "now",
        "functions.now:0",
        "function",
        "```json\n",
        "```",
        "12",
        "ü🙂",
        "<",
        "<|",
        "[",
        "</",
    ),
    *(written(format, "get_weather", {"city": 'a\n"ü', "days": 2}) for format in NAMES),
    *(written(format, "now", {}) for format in NAMES),
]
WORD = re.compile(r"w\d+k")


FRAGMENTS = [
    '"a": ',
    '"a": "',
    '"',
    "\\d",
    "\\u1",
    "\n",
    ", ",
    "{",
    "}",
    "[",
    "]",
    "12",
    "null",
    ",}",
    '": "',
    "JUNK",
]


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, str]:
    """A format and a text, in which every word of junk stands once. Calls begin well and go on at
    random.
    """
    format = draw(st.sampled_from(NAMES))
    call = written(format, "now", {"a": 1})
    begun = call[: call.index("1" if format in VALUE_ENDS else "1}")]
    own = st.sampled_from([begun, begun, call, call[len(begun) :]])
    fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
    any_piece = st.sampled_from(TAGS) | st.sampled_from(PIECES) | st.just("JUNK")
    pieces = draw(st.lists(any_piece | own | fragments | st.builds(str.__add__, own, fragments), max_size=12))
    text = "".join(pieces)
    for index in range(text.count("JUNK")):
        text = text.replace("JUNK", f"w{index}k", 1)
    return format, text


def bare(text: str) -> str:
    """``text`` without white space and the tags of reasoning."""
    return re.sub(r"\s|</?think>", "", text)


def shown(said: Said) -> str:
    """All text of a reply that a client sees."""
    calls = (call["name"] + call["arguments"] + call["id"] for call in said.calls)
    return said.content + said.reasoning + "".join(calls)


@example(
    reply=(
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>w0k<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>now\n```json\n{"a": ',
    ),
    sizes=[],
    schema={},
    manner={"thinking": False, "named": False},
    finish="stop",
)
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    reply=replies(),
    sizes=st.lists(st.integers(1, 12), max_size=40),
    schema=st.sampled_from(SCHEMAS),
    manner=st.fixed_dictionaries({"thinking": st.booleans(), "named": st.booleans()}),
    finish=st.sampled_from(["stop", "length"]),
)
def test_any_reply(
    reply: tuple[str, str], sizes: list[int], schema: Any, manner: dict[str, bool], finish: str
) -> None:
    format, text = reply
    options: dict[str, Any] = {**manner, "finish": finish, "tools": {"get_weather": schema, "now": schema}}
    whole = read(text, format, **options)
    for cut in (sizes, [1] * len(text)):
        assert read(text, format, cut, **options).plain == whole.plain
    for call in whole.calls:
        assert starts_an_object(call["arguments"]), call
        assert call["name"], call
    if whole.reason == "tool_calls":
        assert all(call["arguments"].endswith("}") for call in whole.calls)
    if not whole.calls:
        assert bare(whole.reasoning + whole.content) == bare(text)
    lost = set(WORD.findall(text)) - set(WORD.findall(shown(whole)))
    assert not lost, whole
