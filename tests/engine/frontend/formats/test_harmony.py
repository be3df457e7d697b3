"""Harmony, the format of gpt-oss: channels, recipients, cuts, and text that only looks like it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats, Manner
from lockstep.engine.frontend.formats.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MARKERS,
    MESSAGE,
    RETURN,
    START,
)
from support.engine.frontend.json_starts import starts_an_object
from support.engine.frontend.replies import TOOLS, Said, read

ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
FINAL = f"{CHANNEL}final{MESSAGE}"
NEXT = f"{END}{START}assistant"


def call(name: str, arguments: dict[str, Any], end: str = CALL) -> str:
    head = f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}"
    return f"{head}{json.dumps(arguments, ensure_ascii=False)}{end}"


def said(text: str, **manner: Any) -> Said:
    return read(text, "harmony", **manner)


def test_reasoning_then_an_answer() -> None:
    for end in ("", RETURN, END):
        found = said(f"{ANALYSIS}Hm,\nwell.{NEXT}{FINAL}It rains.{end}")
        assert found.plain == ("It rains.", "Hm,\nwell.", [], "stop")
    assert said(f"{FINAL}It rains.").plain == ("It rains.", "", [], "stop")
    assert said(f"{ANALYSIS}Hm", finish="length").plain == ("", "Hm", [], "length")
    assert said(f"{ANALYSIS}a{NEXT}{FINAL}b", show_reasoning=False).plain == ("b", "", [], "stop")


def test_a_call_after_reasoning() -> None:
    arguments = {"city": f'Köln "am" Rhein {CALL}{END}{START} {{', "days": 3, "note": {"a": [1, None]}}
    for end in ("", CALL):
        found = said(f"{ANALYSIS}Look.{NEXT}{call('get_weather', arguments, end)}")
        assert (found.content, found.reasoning, found.reason) == ("", "Look.", "tool_calls")
        assert found.values == [("get_weather", arguments)]


def test_a_preamble_is_content() -> None:
    preamble = f"{CHANNEL}commentary{MESSAGE}I look."
    found = said(f"{ANALYSIS}a{NEXT}{preamble}{NEXT}{ANALYSIS}b{NEXT}{call('now', {})}")
    assert found.plain == ("I look.", "a\n\nb", [("now", "{}")], "tool_calls")
    assert said(f"{preamble}{NEXT}{FINAL}Done.{RETURN}").content == "I look.\n\nDone."


@pytest.mark.parametrize(
    "head",
    [
        f"{CHANNEL}commentary to=functions.now {CONSTRAIN}json{MESSAGE}",
        f"{CHANNEL}commentary to=functions.now{CONSTRAIN}json{MESSAGE}",
        f"{CHANNEL}commentary to=functions.now json{MESSAGE}",
        f"{CHANNEL}commentary to=functions.now{MESSAGE}",
        f"{CHANNEL}analysis to=functions.now code{MESSAGE}",
        f" to=functions.now{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}",
        f"{START}assistant to=functions.now{CHANNEL}commentary json{MESSAGE}",
        f"{START}assistant to=functions.now{MESSAGE}",
        f"{CHANNEL}commentary to=now{MESSAGE}",
        f"{NEXT}{CHANNEL}commentary to=functions.now {CONSTRAIN}json{MESSAGE}",
    ],
)
def test_headers_of_calls(head: str) -> None:
    assert said(f'{head}{{"a": 1}}{CALL}').plain == ("", "", [("now", '{"a": 1}')], "tool_calls")


def test_a_call_cut_off_is_no_finished_call() -> None:
    whole = call("get_weather", {"city": "Paris", "note": "x" * 10})
    cut = whole[: whole.index("xxx") + 2]
    found = said(cut, finish="length")
    assert (found.calls[0]["name"], found.reason) == ("get_weather", "length")
    assert found.calls[0]["arguments"] == '{"city": "Paris", "note": "xx'
    assert said(cut).reason == "stop"


def test_a_header_cut_off_is_not_shown() -> None:
    whole = f"{ANALYSIS}a{NEXT}{CHANNEL}commentary to=functions.now {CONSTRAIN}json{MESSAGE}"
    start = whole.index(START)
    for end in range(start + len(START), len(whole)):
        assert said(whole[:end], finish="length").plain[:3] == ("", "a", []), whole[:end]


def test_text_that_is_no_message_stays_text() -> None:
    assert said("plain").plain == ("plain", "", [], "stop")
    assert said("a <|channel b").content == "a <|channel b"
    long = "x " * 600
    assert said(f"{START}{long}").content == f"{START}{long}"
    assert said(f"{CHANNEL}commentary to=functions.now{MESSAGE}no json{CALL}").plain[:3] == (
        "no json",
        "",
        [],
    )
    assert said(f"{FINAL}a {CHANNEL} b {MESSAGE} c").content == f"a {CHANNEL} b {MESSAGE} c"


def test_without_tools_a_call_is_content() -> None:
    assert said(call("now", {"a": 1}), tools=None).plain == ('{"a": 1}', "", [], "stop")


def test_without_reasoning_analysis_is_content() -> None:
    parser = Manner(Formats(None, TOOL_FORMATS["harmony"]), tools=TOOLS).parser()
    assert parser is not None and parser.reasoning_over
    parser.push(f"{ANALYSIS}a{NEXT}{call('now', {})}")
    parser.finish()
    delta = parser.take()
    assert (delta.content, delta.reasoning, len(delta.calls)) == ("a", "", 1)


def test_the_reply_ends_with_the_only_call_allowed_and_the_named_one_finishes_with_stop() -> None:
    formats = Formats(REASONING_TAGS["harmony"], TOOL_FORMATS["harmony"])
    parser = Manner(formats, tools=TOOLS, one_call=True).parser()
    assert parser is not None
    for char in f"{call('now', {})}{START}assistant{FINAL}more":
        parser.push(char)
    assert parser.full
    parser.finish()
    delta = parser.take()
    assert ([one["function"]["name"] for one in delta.calls], delta.content) == (["now"], "")
    assert said(call("now", {}), named=True).reason == "stop"


def test_where_the_reasoning_lies() -> None:
    parser = Manner(Formats(REASONING_TAGS["harmony"], None)).parser()
    assert parser is not None and not parser.reasoning_over
    text = f"{ANALYSIS}why{NEXT}{FINAL}so"
    for char in text:
        parser.push(char)
    parser.finish()
    begin, end = parser.reasoning_from, parser.reasoning_to
    assert begin is not None and text[begin:end] == "why" and parser.reasoning_over


def test_where_the_prompt_opens_the_reasoning() -> None:
    formats = Formats(REASONING_TAGS["harmony"])
    assert not formats.opens_reasoning(f"{START}assistant", None)
    assert formats.opens_reasoning(f"{START}assistant{ANALYSIS}", None)
    assert said(f"more{NEXT}{FINAL}b", thinking=True).plain == ("b", "more", [], "stop")


# --------------------------------------------------------------------------- any text

PIECES = [
    *MARKERS,
    ANALYSIS,
    FINAL,
    NEXT,
    call("get_weather", {"city": 'a\n"ü', "days": 2}),
    call("now", {}),
    call("now", {"a": 1})[: -len(f"1}}{CALL}")],
    " to=functions.now",
    " to=",
    *(
        "assistant",
        "commentary",
        "final",
        "json",
        "now",
        " ",
        "\n",
        '"',
        "{",
        "}",
        "\\",
        "1",
        "<",
        "<|",
        "|>",
    ),
    "JUNK",
]


@st.composite
def replies(draw: st.DrawFn) -> str:
    """A text in which every word of junk stands once."""
    text = "".join(draw(st.lists(st.sampled_from(PIECES) | st.text("ab<|ü {", max_size=5), max_size=14)))
    for index in range(text.count("JUNK")):
        text = text.replace("JUNK", f"w{index}k;", 1)
    return text


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=replies(),
    sizes=st.lists(st.integers(1, 12), max_size=40),
    manner=st.fixed_dictionaries(
        {"thinking": st.booleans(), "named": st.booleans(), "one_call": st.booleans()}
    ),
    tools=st.sampled_from([TOOLS, None]),
)
@example(text=" to=", sizes=[], manner={}, tools=TOOLS)
@example(text=f"{START}assistant{CHANNEL}", sizes=[], manner={}, tools=TOOLS)
def test_the_parts_do_not_depend_on_the_cuts(
    text: str, sizes: list[int], manner: dict[str, bool], tools: dict[str, Any] | None
) -> None:
    whole = said(text, tools=tools, **manner)
    for cut in (sizes, [1] * len(text)):
        assert said(text, sizes=cut, tools=tools, **manner).plain == whole.plain
    for made in whole.calls:
        assert starts_an_object(made["arguments"]) and made["name"]
    if whole.reason == "tool_calls":
        assert all(made["arguments"].endswith("}") for made in whole.calls)


@settings(max_examples=600, deadline=None)
@given(text=replies())
def test_no_word_of_a_message_is_lost(text: str) -> None:
    """Words of headers are no text; a semicolon ends each word, and no header has one."""
    found = said("!" + text, tools=TOOLS)
    shown = found.content + found.reasoning + "".join(one["name"] + one["arguments"] for one in found.calls)
    headers = "".join(
        re.findall(rf"(?:{re.escape(START)}|{re.escape(CHANNEL)}).*?{re.escape(MESSAGE)}", text, re.S)
    )
    words = set(re.findall(r"w\d+k;", text)) - set(re.findall(r"w\d+k;", headers))
    assert words <= set(re.findall(r"w\d+k;", shown)), found
