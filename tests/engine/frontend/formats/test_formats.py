"""The reply parsers alone: each format is understood, cuts do not matter, and no text is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats, Manner, choose
from lockstep.engine.frontend.formats.deepseek import CALL, CALL_END, SECTION, SECTION_END, SEPARATOR
from support.engine.frontend.replies import KIMI, NAMES, TOOLS, VALUE_ENDS, read, texts, written

# ------------------------------------------------------------- one call in every format


@pytest.mark.parametrize("format", NAMES)
def test_a_call_after_reasoning_and_content(format: str) -> None:
    arguments = {"city": 'Köln "am" Rhein </tool_call> {', "days": 3, "note": {"a": [1, None]}}
    said = read(
        "<think>\nHm, \n\n weather?\n</think>\n\nI look.\n"
        + written(format, "get_weather", arguments)
        + "\n",
        format,
    )
    assert (said.reasoning, said.content, said.reason) == ("Hm, \n\n weather?", "I look.", "tool_calls")
    assert said.values == [("get_weather", arguments)]


@pytest.mark.parametrize("format", NAMES)
def test_several_calls_are_numbered_and_have_their_own_ids(format: str) -> None:
    said = read(
        written(format, "get_weather", {"city": "a"}) + "\n" + written(format, "get_weather", {"city": "b"}),
        format,
    )
    assert said.values == [("get_weather", {"city": "a"}), ("get_weather", {"city": "b"})]
    assert said.content == ""
    assert format == "kimi_k2" or len({call["id"] for call in said.calls}) == 2


@pytest.mark.parametrize("format", NAMES)
def test_a_call_without_arguments(format: str) -> None:
    said = read(written(format, "now", {}), format)
    assert (said.values, said.reason) == ([("now", {})], "tool_calls")


@pytest.mark.parametrize("format", NAMES)
def test_parallel_tool_calls_false_ends_the_reply_with_the_first_call(format: str) -> None:
    formats = Formats(None, TOOL_FORMATS[format])
    parser = Manner(formats, tools=TOOLS, one_call=True).parser()
    assert parser is not None
    text = written(format, "now", {}) + "\n" + written(format, "get_weather", {"city": "b"}) + " and more"
    for char in text:
        parser.push(char)
    assert parser.full
    parser.finish()
    delta = parser.take()
    assert ([call["function"]["name"] for call in delta.calls], delta.content) == (["now"], "")
    assert parser.reason("stop") == "tool_calls"


@pytest.mark.parametrize("format", NAMES)
def test_a_call_cut_off_is_no_finished_call(format: str) -> None:
    whole = written(format, "get_weather", {"city": "Paris", "note": "x" * 10})
    said = read(whole[: whole.index("xxx") + 2], format, finish="length")
    assert said.reason == "length"
    assert said.calls[0]["name"] == "get_weather"
    assert said.calls[0]["arguments"].startswith('{"city": "Paris", "note": ')
    assert read(whole[: whole.index("xxx") + 2], format).reason == "stop", (
        "an end in mid-call is no call to act upon"
    )


@pytest.mark.parametrize("format", NAMES)
def test_the_named_function_finishes_with_stop(format: str) -> None:
    assert read(written(format, "now", {}), format, named=True).reason == "stop"


def test_the_other_forms_of_formats() -> None:
    assert read(f'{SECTION}{CALL}now{SEPARATOR}{{"a": 1}}{CALL_END}{SECTION_END}', "deepseek_v3").values == [
        ("now", {"a": 1})
    ]
    one = f"{CALL}function{SEPARATOR}now\n```json\n{{}}\n```{CALL_END}"
    two = f"{SECTION}{one}\n{one}"
    assert read(two + SECTION_END + "x", "deepseek_v3").plain == ("x", "", [("now", "{}")] * 2, "tool_calls")
    assert read('[TOOL_CALLS]now[ARGS]{"a": 1}[TOOL_CALLS]now{}', "mistral").values == [
        ("now", {"a": 1}),
        ("now", {}),
    ]
    with_id = read("[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", "mistral")
    assert (with_id.calls[0]["id"], with_id.calls[0]["name"]) == ("abcdefghi", "now")
    both = read(
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"arguments": {"b": 2}, "name": "now", "id": "x"}]',
        "mistral",
    )
    assert both.values == [("now", {}), ("now", {"b": 2})]
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in both.calls)
    assert read(KIMI.format("functions.now:3", "{}"), "kimi_k2").calls[0]["id"] == "functions.now:3"
    assert read("<tool_call>now</tool_call>", "glm4").values == [("now", {})]


def test_loose_ways_of_writing_hermes() -> None:
    cases = {
        '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>': {"a": 1},
        '<tool_call>{"name": "now"}</tool_call>': {},
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>': {"a": 1},
        '<tool_call>{"name": "now", "parameters": {"a": 1}}</tool_call>': {"a": 1},
        '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>': {"a": 1},
        '<tool_call>{"name": "now", "arguments": {"a": 1}}': {"a": 1},
    }
    for text, arguments in cases.items():
        said = read(text, "hermes")
        assert (said.values, said.content, said.reason) == ([("now", arguments)], "", "tool_calls"), text


def test_a_broken_call_ends_where_its_arguments_break() -> None:
    said = read('<tool_call>{"name": "now", "arguments": {"a": [1}}</tool_call> after', "hermes")
    assert said.plain == (" after", "", [("now", '{"a": [1')], "stop")


def test_glm_takes_the_types_from_the_schema() -> None:
    text = "<tool_call>get_weather\n<arg_key>city</arg_key><arg_value>12</arg_value>"
    text += "<arg_key>days</arg_key><arg_value> 12 </arg_value>"
    text += '<arg_key>note</arg_key><arg_value>a "b"\n</arg_value></tool_call>'
    assert read(text, "glm4").values == [("get_weather", {"city": "12", "days": 12, "note": 'a "b"\n'})]


def test_loose_ways_of_writing_calls_of_qwen_coder() -> None:
    call = "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>"
    cases = {
        call: [{"city": "Rome"}],
        f"<tool_call>{call}": [{"city": "Rome"}],
        f"<tool_call>\n{call}\n{call}\n</tool_call>": [{"city": "Rome"}] * 2,
        f"{call}\n</tool_call>": [{"city": "Rome"}],
        "<function=get_weather><parameter=city>Rome</parameter></function>": [{"city": "Rome"}],
        "<function=get_weather></function>": [{}],
    }
    for text, arguments in cases.items():
        said = read(text, "qwen3_coder")
        assert [value for _, value in said.values] == arguments, text
        assert (said.content, said.reason) == ("", "tool_calls"), text
    assert read("use <function= in C++", "qwen3_coder").content == "use <function= in C++"


def test_a_value_of_qwen_coder_loses_one_line_break_at_either_end_and_no_more() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=x>\n\n  a\n\n</parameter>\n</function>\n</tool_call>"
    assert read(text, "qwen3_coder", tools={"f": {}}).values == [("f", {"x": "\n  a\n"})]
    schema = {"properties": {"x": {"type": "string"}}}
    assert read(text, "qwen3_coder", tools={"f": schema}).values == [("f", {"x": "\n  a\n"})]


def test_a_section_of_minimax_holds_several_calls() -> None:
    call = '<invoke name="get_weather">\n<parameter name="city">{}</parameter>\n</invoke>\n'
    text = f"ok\n<minimax:tool_call>\n{call.format('Rome')}{call.format('7')}</minimax:tool_call>"
    said = read(text, "minimax_m2")
    assert said.values == [("get_weather", {"city": "Rome"}), ("get_weather", {"city": "7"})]
    assert (said.content, said.reason) == ("ok", "tool_calls")


def in_a_section(member: str) -> str:
    """A call of deepseek_v32 with ``member`` between its tags."""
    call = f'<｜DSML｜invoke name="get_weather">\n{member}\n</｜DSML｜invoke>'
    return f"\n\n<｜DSML｜function_calls>\n{call}\n{call}\n</｜DSML｜function_calls>"


def test_a_value_of_dsml_is_of_the_kind_that_its_tag_tells() -> None:
    parameter = '<｜DSML｜parameter name="{}"{}>{}</｜DSML｜parameter>'
    for key, told, text, value in (
        ("note", ' string="true"', "12", "12"),
        ("days", ' string="true"', "12", "12"),
        ("note", ' string="false"', "12", 12),
        ("city", ' string="false"', " 12 ", 12),
        ("city", ' string="false"', "Rome", "Rome"),
        ("city", "", "12", "12"),  # by the schema
        ("days", "", "12", 12),
        ("days", ' string="maybe"', "12", 'maybe">12'),
    ):
        section = in_a_section(parameter.format(key, told, text))
        for sizes in ([], [1] * len(section)):
            said = read("ok" + section, "deepseek_v32", sizes)
            assert said.values == [("get_weather", {key: value})] * 2, section
            assert (said.content, said.reason) == ("ok", "tool_calls")


def test_a_call_of_dsml_may_hold_one_object() -> None:
    for text, arguments in (('{"city": "a</b"}', {"city": "a</b"}), ("", {})):
        said = read(in_a_section(text), "deepseek_v32")
        assert said.values == [("get_weather", arguments)] * 2
        assert (said.content, said.reason) == ("", "tool_calls")


# --------------------------------------------------------------------------- reasoning


def test_reasoning() -> None:
    assert read("<think>a</think>b").plain == ("b", "a", [], "stop")
    assert read("a</think>\n\nb", thinking=True).plain == ("b", "a", [], "stop")
    assert read("<think>\na</think>b", thinking=True).plain == ("b", "a", [], "stop")
    assert read("<think>\n\n</think>\n\nb").plain == ("b", "", [], "stop")
    assert read("<think>a\n", finish="length").plain == ("", "a\n", [], "length")
    assert read("b <think>a</think>").plain == ("b <think>a</think>", "", [], "stop"), (
        "only what comes first is reasoning"
    )
    assert read(" \n<thin air").plain == (" \n<thin air", "", [], "stop")
    assert read("</think>b").plain == ("</think>b", "", [], "stop")
    assert read("<think>a</think>b", show_reasoning=False).plain == ("b", "", [], "stop")
    inside = read('<think>I could <tool_call>{"name": "now"}</tool_call></think>b', "hermes")
    assert inside.plain == ("b", "I could ", [("now", "{}")], "tool_calls"), "a call ends it"


def test_where_the_prompt_opens_the_reasoning() -> None:
    formats = Formats(REASONING_TAGS["think"])
    assert formats.opens_reasoning("<|user|>x<|assistant|><think>\n", None)
    assert not formats.opens_reasoning("<|user|>say <think><|assistant|>", None)
    assert not formats.opens_reasoning("<think>\n\n</think>\n\n", None)
    assert formats.opens_reasoning("...<think>well", "<think>well")
    assert not formats.opens_reasoning("...<think>a</think>b", "<think>a</think>b")
    assert not Formats().opens_reasoning("<think>", None)


# --------------------------------------------------------------------------- cuts and look-alikes


@settings(max_examples=400, deadline=None)
@given(
    format=st.sampled_from(NAMES),
    text=texts,
    sizes=st.lists(st.integers(1, 9), max_size=30),
    thinking=st.booleans(),
    one_call=st.booleans(),
)
def test_the_parts_do_not_depend_on_the_cuts(
    format: str, text: str, sizes: list[int], thinking: bool, one_call: bool
) -> None:
    whole = read(text, format, thinking=thinking, one_call=one_call)
    assert read(text, format, sizes, thinking=thinking, one_call=one_call).plain == whole.plain
    assert read(text, format, [1] * len(text), thinking=thinking, one_call=one_call).plain == whole.plain


@settings(max_examples=400, deadline=None)
@given(format=st.sampled_from(NAMES), text=texts)
@example("hermes", '<tool_call>{"name": 5}</tool_call>')
@example("hermes", "a <tool_call> b")
@example("kimi_k2", "<|tool_calls_section_begin|> none <|tool_calls_section_end|>")
def test_a_reply_without_calls_is_its_text(format: str, text: str) -> None:
    said = read("!" + text, format)
    if not said.calls:
        assert said.content == "!" + text


@settings(max_examples=300, deadline=None)
@given(format=st.sampled_from(NAMES), before=texts, after=texts)
def test_no_letter_is_lost_beside_calls(format: str, before: str, after: str) -> None:
    """Letters outside calls come out as content, whatever stands around them."""
    said = read("!" + before + "QX" + after + "ZW", format)
    inside = said.content + "".join(call["name"] + call["arguments"] + call["id"] for call in said.calls)
    assert "QX" in inside
    assert "ZW" in inside


@settings(max_examples=200, deadline=None)
@given(
    format=st.sampled_from(NAMES),
    arguments=st.fixed_dictionaries(
        {"city": st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)},
        optional={
            "days": st.integers(-(2**60), 2**60),
            "more": st.recursive(st.booleans(), lambda inner: st.lists(inner, max_size=3)),
        },
    ),
    sizes=st.lists(st.integers(1, 7), max_size=20),
)
def test_any_arguments_survive(format: str, arguments: dict[str, Any], sizes: list[int]) -> None:
    if VALUE_ENDS.get(format, "\0") in arguments["city"]:
        return
    said = read("Let me see. " + written(format, "get_weather", arguments), format, sizes)
    assert said.values == [("get_weather", arguments)]
    assert (said.content, said.reason) == ("Let me see.", "tool_calls")


@pytest.mark.parametrize("format", VALUE_ENDS)
@pytest.mark.parametrize("value", ["{", "[1", '{"a":', '"b', "tru"])
def test_a_value_that_only_begins_as_json_is_text(format: str, value: str) -> None:
    for sizes in ([], [1] * 200):
        assert read(written(format, "get_weather", {"note": value}), format, sizes).values == [
            ("get_weather", {"note": value})
        ]


# --------------------------------------------------------------------------- the choice


def test_formats_are_chosen_by_the_template_then_by_the_family() -> None:
    assert choose("... <tool_call> ... </think>", "") == Formats(
        REASONING_TAGS["think"], TOOL_FORMATS["hermes"]
    )
    assert choose("<tool_call> <arg_key>", "qwen3_moe").tools is TOOL_FORMATS["glm4"]
    assert choose("{{ messages }}", "deepseek_v3") == Formats(None, TOOL_FORMATS["deepseek_v3"])
    assert (
        choose("<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>", "").tools is TOOL_FORMATS["glm4"]
    )
    assert choose("<tool_call>{name}<arg_key>{key}</arg_key><arg_value>", "").tools is TOOL_FORMATS["glm47"]
    coder = "<tool_call>\n<function=example>\n<parameter=example>\n"
    assert choose(coder, "qwen3_moe").tools is TOOL_FORMATS["qwen3_coder"]
    both = Formats(REASONING_TAGS["harmony"], TOOL_FORMATS["harmony"])
    assert choose("<|start|>assistant<|channel|>analysis<|message|>", "") == both
    assert choose("{{ messages }}", "gpt_oss") == both
    with pytest.raises(ValueError, match="harmony is the form of a whole reply"):
        choose(None, "", "harmony", "think")
    hy3 = "{% set HYTK = ':opensource' %}{{ '<think{}></think{}><arg_key{}><tool_sep{}>'.format(HYTK) }}"
    assert choose(hy3, "") == Formats(REASONING_TAGS["hy_v3"], TOOL_FORMATS["hy_v3"])
    assert choose(hy3.replace(":opensource", ":other"), "hy_v3") == Formats()
    preview = Formats(REASONING_TAGS["think"], TOOL_FORMATS["hy_v3_preview"])
    assert choose("<think></think><tool_call>{name}<tool_sep>\n<arg_key>", "hy_v3") == preview
    assert choose("<minimax:tool_call>", "").tools is TOOL_FORMATS["minimax_m2"]
    fenced = "<｜tool▁calls▁begin｜>function<｜tool▁sep｜>\\n```json"
    assert choose(fenced, "").tools is TOOL_FORMATS["deepseek_v3"]
    assert choose("<｜tool▁calls▁begin｜><｜tool▁sep｜>", "").tools is TOOL_FORMATS["deepseek_v31"]
    assert (
        choose("{% set dsml = '｜DSML｜' %}<{{ dsml }}function_calls>", "").tools
        is TOOL_FORMATS["deepseek_v32"]
    )
    assert choose(None, "deepseek_v32").tools is TOOL_FORMATS["deepseek_v32"]
    assert choose("<｜tool▁calls▁begin｜>", "deepseek_v32").tools is TOOL_FORMATS["deepseek_v31"], "V3.2-Exp"
    assert choose("<tool_call><function=", "qwen3_moe").tools is None
    assert choose(None, "llama") == Formats()
    assert choose("<tool_call> </think>", "", "mistral", "off") == Formats(None, TOOL_FORMATS["mistral"])
    known = "auto, off, " + ", ".join(TOOL_FORMATS)
    with pytest.raises(ValueError, match=rf"frontend\.tool_parser = qwen: should be one of {known}"):
        choose(None, "", "qwen")
    known = "auto, off, think, mistral, harmony, hy_v3"
    with pytest.raises(ValueError, match=rf"frontend\.reasoning_parser = qwen: should be one of {known}"):
        choose(None, "", "auto", "qwen")
