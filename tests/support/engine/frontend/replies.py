"""Replies in every format of tool calls, and the parts that a client joins from their deltas."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats, Manner
from lockstep.engine.frontend.formats.deepseek import CALL, CALL_END, SECTION, SECTION_END, SEPARATOR
from lockstep.engine.frontend.formats.parser import ReplyParser

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "note": {}},
}
TOOLS = {"get_weather": SCHEMA, "now": {}}
# Harmony is the form of whole replies and has tests of its own.
NAMES = tuple(name for name in TOOL_FORMATS if name != "harmony")
# The formats that write strings as they are, up to this tag.
VALUE_ENDS = {
    "deepseek_v32": "</｜DSML｜parameter>",
    "glm4": "</arg_value>",
    "glm47": "</arg_value>",
    "hy_v3": "</arg_value:opensource>",
    "hy_v3_preview": "</arg_value>",
    "minimax_m2": "</parameter>",
    "qwen3_coder": "</parameter>",
}
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>{}<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)


@dataclass
class Said:
    """A reply as a client joins it from deltas."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    reason: str = ""

    def add(self, parser: ReplyParser) -> None:
        delta = parser.take()
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.calls:
            function = call["function"]
            if "id" in call:
                assert call["index"] == len(self.calls)
                self.calls.append({"name": function["name"], "arguments": "", "id": call["id"]})
            self.calls[call["index"]]["arguments"] += function["arguments"]

    @property
    def plain(self) -> tuple[str, str, list[tuple[str, str]], str]:
        """The reply without its random ids."""
        return (
            self.content,
            self.reasoning,
            [(call["name"], call["arguments"]) for call in self.calls],
            self.reason,
        )

    @property
    def values(self) -> list[tuple[str, Any]]:
        return [(call["name"], json.loads(call["arguments"])) for call in self.calls]


def read(
    text: str, format: str | None = None, sizes: list[int] | None = None, finish: str = "stop", **manner: Any
) -> Said:
    """Parses ``text`` cut into pieces of ``sizes`` (one piece without), taking what there is after
    each.
    """
    reasoning = REASONING_TAGS["harmony" if format == "harmony" else "think"]
    formats = Formats(reasoning, TOOL_FORMATS[format] if format else None)
    manner.setdefault("tools", TOOLS if format else None)
    parser = Manner(formats, **manner).parser()
    assert parser is not None
    said, start = Said(), 0
    for size in sizes or [len(text)]:
        parser.push(text[start : start + size])
        said.add(parser)
        start += size
    parser.push(text[start:])
    parser.finish()
    said.add(parser)
    assert not parser.pending
    said.reason = parser.reason(finish)
    return said


def written(format: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as the chat template of ``format`` writes it."""
    text = json.dumps(arguments, ensure_ascii=False)
    if format == "hermes":
        return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
    if format == "deepseek_v3":
        return f"{SECTION}{CALL}function{SEPARATOR}{name}\n```json\n{text}\n```{CALL_END}{SECTION_END}"
    if format == "deepseek_v31":
        return f"{SECTION}{CALL}{name}{SEPARATOR}{text}{CALL_END}{SECTION_END}"
    if format == "kimi_k2":
        return KIMI.format(f"functions.{name}:0", text)
    if format == "mistral":
        return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {text}}}]'
    if format == "deepseek_v32":
        return in_dsml(name, arguments)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    if format == "qwen3_coder":
        members = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
        return f"<tool_call>\n<function={name}>\n{members}</function>\n</tool_call>"
    if format == "minimax_m2":
        members = "".join(f'<parameter name="{key}">{text}</parameter>\n' for key, text in texts.items())
        return f'<minimax:tool_call>\n<invoke name="{name}">\n{members}</invoke>\n</minimax:tool_call>'
    if format in ("hy_v3", "hy_v3_preview"):
        end = ":opensource>" if format == "hy_v3" else ">"
        members = "".join(
            f"<arg_key{end}{key}</arg_key{end}\n<arg_value{end}{text}</arg_value{end}\n"
            for key, text in texts.items()
        )
        call = f"<tool_call{end}{name}<tool_sep{end}\n{members}</tool_call{end}"
        return f"<tool_calls{end}\n{call}\n</tool_calls{end}"
    line = "\n" if format == "glm4" else ""
    members = "".join(
        f"<arg_key>{key}</arg_key>{line}<arg_value>{text}</arg_value>{line}" for key, text in texts.items()
    )
    return f"<tool_call>{name}{line}{members}</tool_call>"


def in_dsml(name: str, arguments: dict[str, Any]) -> str:
    members = "".join(
        f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    )
    call = f'<｜DSML｜invoke name="{name}">\n{members}</｜DSML｜invoke>'
    return f"<｜DSML｜function_calls>\n{call}\n</｜DSML｜function_calls>"


MARKERS = sorted({marker for name in NAMES for marker in TOOL_FORMATS[name].markers})
SCRAPS = [
    *MARKERS,
    "<think>",
    "</think>",
    '{"name": "now", "arguments": {',
    '"a": 1',
    "}",
    "]",
    "\n",
    " ",
    "now",
    '"',
    "\\",
    "function",
    "```json\n",
    "```",
]
BUILT = [written(format, "get_weather", {"city": 'a\n"ü', "days": 2}) for format in NAMES]
texts = st.lists(
    st.one_of(st.sampled_from(SCRAPS), st.sampled_from(BUILT), st.text(alphabet="ab<|[{}】\n ü", max_size=6)),
    max_size=10,
).map("".join)
