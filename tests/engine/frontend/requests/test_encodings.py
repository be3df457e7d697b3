"""Conversations of families whose checkpoints ship an encoding in place of a chat template.

The expected prompts follow the published encoding of DeepSeek-V3.2
(https://huggingface.co/deepseek-ai/DeepSeek-V3.2, encoding/encoding_dsv32.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats
from lockstep.engine.frontend.requests.chat_template import render
from lockstep.engine.frontend.requests.conversation import conversation_text
from lockstep.engine.frontend.requests.encodings import ENCODING
from lockstep.engine.frontend.requests.model import ServedModel, load_model
from lockstep.engine.protocol.sockets import new_keypair
from lockstep.engine.protocol.specs import AcceptorSpec, FrontendSpec, Keys
from support.engine.models.mistral_params import LARGE_3
from support.engine.text.tekken_folder import write_tekken
from support.engine.text.tiny_tokenizer import write_model

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ABOUT_TOOLS = '# Tools\nWrite <{dsml_token}function_calls>, {thinking_start_token}.\n{tool_schemas}\n"End"\n'
SOURCE = f"""import not_installed
raise RuntimeError("never run")
TOOLS_SYSTEM_TEMPLATE = {ABOUT_TOOLS!r}
"""
TOOLS = [
    {"type": "function", "function": {"name": "wetter", "description": "für {x}", "parameters": {}}},
    {"type": "function", "function": {"name": "now"}},
]
TOLD = (
    "\n\n# Tools\nWrite <｜DSML｜function_calls>, <think>.\n"
    '{"name": "wetter", "description": "für {x}", "parameters": {}}\n{"name": "now"}\n"End"\n'
)
CALLS = [
    {
        "type": "function",
        "id": "1",
        "function": {"name": "wetter", "arguments": {"ort": 'Köln "x"', "tage": [1, None]}},
    },
    {"type": "function", "id": "2", "function": {"name": "now", "arguments": {}}},
]
CALLED = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="wetter">\n'
    '<｜DSML｜parameter name="ort" string="true">Köln "x"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="tage" string="false">[1, null]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>" + EOS
)
RESULTS = "\n\n<function_results>\n<result>warm</result>\n<result>12:00</result>\n</function_results>\n\n"


def model(path: Path, source: str | None = SOURCE, template: str | None = None) -> ServedModel:
    write_model(path, template=template or "")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v32"}))
    if source is not None:
        (path / ENCODING).parent.mkdir()
        (path / ENCODING).write_text(source, encoding="utf-8")
    return load(path, config["vocab_size"])


def load(path: Path, vocab_size: int) -> ServedModel:
    public, secret = new_keypair()
    return load_model(
        FrontendSpec(
            name="frontend-0",
            keys=Keys(server_public=public, public=public, secret=secret),
            address="tcp://127.0.0.1:1",
            acceptor=AcceptorSpec(address="nobody", token="t"),
            model_path=str(path),
            served_name="m",
            vocab_size=vocab_size,
        )
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, thoughts: str | None = None, calls: Any = None) -> dict[str, Any]:
    more = {} if calls is None else {"tool_calls": calls}
    return {"role": "assistant", "content": text, "reasoning_content": thoughts, **more}


def results() -> list[dict[str, Any]]:
    return [{"role": "tool", "content": text, "tool_call_id": "x"} for text in ("warm", "12:00")]


def test_conversations_of_deepseek_v32(tmp_path: Path) -> None:
    codec = model(tmp_path).codec
    system = {"role": "system", "content": "Be brief."}
    talk = [system, user("a"), said("b", "c"), user("d")]
    turn = [user("a"), said("Look.", "Hm", CALLS), *results()]
    begun = f"{BOS}Be brief.<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>d<｜Assistant｜>"
    for messages, tools, thinking, expected in (
        (talk, None, False, begun + "</think>"),
        (talk, None, True, begun + "<think>"),
        (talk[:1] + turn[:1], TOOLS, False, f"{BOS}Be brief.{TOLD}<｜User｜>a<｜Assistant｜></think>"),
        (turn, TOOLS, False, f"{BOS}{TOLD}<｜User｜>a<｜Assistant｜></think>Look.{CALLED}{RESULTS}</think>"),
        (turn, None, True, f"{BOS}<｜User｜>a<｜Assistant｜><think>Hm</think>Look.{CALLED}{RESULTS}<think>"),
        (
            [*turn, said("Warm.", "So"), user("b")],
            None,
            True,
            f"{BOS}<｜User｜>a<｜Assistant｜></think>Look.{CALLED}{RESULTS}</think>Warm.{EOS}"
            "<｜User｜>b<｜Assistant｜><think>",
        ),
    ):
        assert render(codec, messages, tools, add_generation_prompt=True, thinking=thinking) == expected
    assert render(codec, talk, None, add_generation_prompt=True) == begun + "</think>"
    assert render(codec, talk, None).endswith(f"{EOS}<｜User｜>d")


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "</think>"),
        ({"reasoning_effort": "high"}, "<think>"),
        ({"reasoning_effort": "minimal"}, "<think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "</think>"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"thinking": True}}, "<think>"),
    ],
)
def test_effort_turns_the_thinking_of_deepseek_v32_on(
    fields: dict[str, Any], end: str, tmp_path: Path
) -> None:
    """The published encoding has a mode, chat or thinking, and no degrees of it."""
    served = model(tmp_path)
    ask = ChatRequest.model_validate({"messages": [user("a")], **fields})
    text = conversation_text(served.codec, served.habits, ask)
    assert text == f"{BOS}<｜User｜>a<｜Assistant｜>{end}"


def test_habits_and_formats_of_deepseek_v32(tmp_path: Path) -> None:
    served = model(tmp_path)
    assert served.formats == Formats(REASONING_TAGS["think"], TOOL_FORMATS["deepseek_v32"])
    assert served.habits.shows_tools and served.habits.thinking.can_stop
    assert not served.habits.one_call and not served.habits.text_arguments
    assert served.habits.roles.written_as("developer", 0) == "system"


def test_a_checkpoint_that_has_a_template_keeps_it(tmp_path: Path) -> None:
    served = model(tmp_path, template="{{ messages[0].content }}<｜tool▁calls▁begin｜>")
    assert render(served.codec, [user("a")], None) == "a<｜tool▁calls▁begin｜>"
    assert served.formats.tools is TOOL_FORMATS["deepseek_v31"], "as DeepSeek-V3.2-Exp"


def test_without_the_checkpoints_text_no_tools_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = model(tmp_path, None)
    assert not served.habits.shows_tools, "a request with tools is refused"
    assert ENCODING in caplog.text
    assert render(served.codec, [user("a")], TOOLS).endswith("<｜User｜>a")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:", "no Python source"),
        ("X = 1", "TOOLS_SYSTEM_TEMPLATE should be there"),
        ("TOOLS_SYSTEM_TEMPLATE = f()", "TOOLS_SYSTEM_TEMPLATE should be there"),
        ("TOOLS_SYSTEM_TEMPLATE: str = '{other}{tool_schemas}'", "a field that is not known: 'other'"),
        ("TOOLS_SYSTEM_TEMPLATE = 'x'", "should hold {tool_schemas}"),
    ],
)
def test_another_encoding_file_is_refused(source: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"encoding_dsv32\.py: .*{reason}"):
        model(tmp_path, source)


def test_a_folder_in_mistrals_own_format_is_served(tmp_path: Path) -> None:
    write_tekken(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(LARGE_3))
    served = load(tmp_path, LARGE_3["vocab_size"])
    assert served.formats.tools is TOOL_FORMATS["mistral"]
    assert served.defaults.eos_ids == (2,) and served.habits.shows_tools
