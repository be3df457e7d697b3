"""Chooses the formats of a checkpoint's replies: by its chat template, else by its family, unless
the recipe names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .deepseek import DeepSeek, DeepSeekV31
from .dsml import SIGN, Dsml
from .format import ToolFormat, Tools
from .glm import Glm, Glm47
from .harmony import CHANNELS, Harmony, HarmonyParser
from .hermes import Hermes
from .hy import SUFFIX, Hy3, Hy3Preview, has_suffix, spelled
from .kimi import Kimi
from .minimax import MiniMax
from .mistral import Mistral
from .parser import ReplyParser, Tags
from .qwen_coder import QwenCoder
from .speech import Speech

AUTO, OFF = "auto", "off"
TOOL_FORMATS: Mapping[str, type[ToolFormat]] = {
    "deepseek_v3": DeepSeek,
    "deepseek_v31": DeepSeekV31,
    "deepseek_v32": Dsml,
    "glm4": Glm,
    "glm47": Glm47,
    "harmony": Harmony,
    "hermes": Hermes,
    "hy_v3": Hy3,
    "hy_v3_preview": Hy3Preview,
    "kimi_k2": Kimi,
    "minimax_m2": MiniMax,
    "mistral": Mistral,
    "qwen3_coder": QwenCoder,
}
REASONING_TAGS: Mapping[str, Tags] = {
    "think": Tags("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Kimi-K2-Thinking, MiniMax-M2
    "mistral": Tags("[THINK]", "[/THINK]"),
    "harmony": CHANNELS,
    "hy_v3": Tags(f"<think{SUFFIX}>", f"</think{SUFFIX}>"),
}
# Texts that together occur only in templates of the format. The first format that fits is taken:
# GLM's and Qwen3-Coder's templates contain the tag of Hermes too, Hy3-preview's those of GLM, and
# each older form a part of the newer one's.
_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", (CHANNELS.open,)),
    ("deepseek_v32", (SIGN, "function_calls")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("hy_v3", (f"<tool_sep{SUFFIX}>",)),
    ("hy_v3_preview", ("<tool_sep>",)),
    ("glm47", ("</arg_key><arg_value>",)),
    ("glm4", ("<arg_key>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("hermes", ("<tool_call>",)),
)
_REASONING_SIGNS = {name: tags.close for name, tags in REASONING_TAGS.items()} | {"harmony": CHANNELS.open}
# Llama 3 writes JSON behind it, for which there is no parser.
_NOT_PARSED = "<function="
_FAMILIES = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "glm4_moe": "glm4",
    "glm4_moe_lite": "glm47",
    "glm_moe_dsa": "glm47",
    "gpt_oss": "harmony",
    "hy_v3": "hy_v3",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "mistral4": "mistral",
    "mixtral": "mistral",
    "qwen2_moe": "hermes",
    "qwen3_moe": "hermes",
}


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a model. Replies have no reasoning where ``reasoning`` is None, and no calls
    where ``tools`` is None.
    """

    reasoning: Tags | None = None
    tools: type[ToolFormat] | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Tags that must reach the parser even if they are special tokens."""
        tags = () if self.reasoning is None else self.reasoning.markers
        return tags + (() if self.tools is None else self.tools.markers)

    @property
    def harmony(self) -> bool:
        """Whether replies are sequences of messages with headers."""
        return self.reasoning is CHANNELS or self.tools is Harmony

    def opens_reasoning(self, prompt: str, last_message: str | None) -> bool:
        """Whether a reply to ``prompt`` begins inside the reasoning. ``last_message`` is the
        message that it continues, None if it begins a new one.
        """
        if self.reasoning is None:
            return False
        if last_message is not None:
            return last_message.rfind(self.reasoning.open) > last_message.rfind(self.reasoning.close)
        return prompt.rstrip().endswith(self.reasoning.open)

    def closes_reasoning(self, prompt: str) -> bool:
        """Whether a reply to ``prompt`` has no reasoning and begins with its content."""
        return self.reasoning is None or prompt.rstrip().endswith(self.reasoning.close)


@dataclass(frozen=True, slots=True)
class Manner:
    """Parsing of the replies to one request. With ``tools`` None no call is looked for.

    ``thinking``: the prompt has opened the reasoning. ``answering``: the prompt has closed it, or
    there is none. If neither holds, the model may begin with reasoning. ``one_call``: the reply
    ends with its first call. ``named``: the client asked for one function by name. ``custom``:
    the functions that stand for custom tools.
    """

    formats: Formats
    thinking: bool = False
    answering: bool = False
    show_reasoning: bool = True
    tools: Tools | None = None
    one_call: bool = False
    named: bool = False
    custom: frozenset[str] = frozenset()

    def parser(self) -> ReplyParser | None:
        """A new parser for one reply; None where all of it is content."""
        kind = self.formats.tools if self.tools is not None else None
        if kind is None and self.formats.reasoning is None:
            return None
        id_length = kind.id_length if kind is not None else 0
        speech = Speech(self.show_reasoning, self.one_call, id_length, self.custom)
        if self.formats.harmony:
            harmony = Harmony(self.tools) if self.tools is not None and kind is not None else None
            return HarmonyParser(speech, self.formats.reasoning, harmony, self.thinking, self.named)
        format = kind(self.tools or {}) if kind is not None else None
        return ReplyParser(speech, self.formats.reasoning, format, self.thinking, self.named)


def choose(
    template: str | None, model_type: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO
) -> Formats:
    """The formats of a checkpoint. Raises ValueError for an unknown parser."""
    template = spelled(template or "")
    if tool_parser == AUTO:
        tool_parser = _tool_format(template, model_type)
    if reasoning_parser == AUTO:
        other = "harmony" if tool_parser == "harmony" else OFF
        reasoning_parser = next((name for name, sign in _REASONING_SIGNS.items() if sign in template), other)
    _check("tool_parser", tool_parser, TOOL_FORMATS)
    _check("reasoning_parser", reasoning_parser, REASONING_TAGS)
    if "harmony" in (tool_parser, reasoning_parser) and not {tool_parser, reasoning_parser} <= {
        "harmony",
        OFF,
    }:
        raise ValueError(
            f"frontend.tool_parser = {tool_parser}, frontend.reasoning_parser = {reasoning_parser}: "
            "harmony is the form of a whole reply; use it for both, or off for the other"
        )
    return Formats(REASONING_TAGS.get(reasoning_parser), TOOL_FORMATS.get(tool_parser))


def _tool_format(template: str, model_type: str) -> str:
    found = next((name for name, signs in _TOOL_SIGNS if all(sign in template for sign in signs)), None)
    if _NOT_PARSED in template and found in (None, "hermes"):
        return OFF
    if found is None and has_suffix(template):  # another than the known one
        return OFF
    return found or _FAMILIES.get(model_type, OFF)


def _check(key: str, value: str, known: Mapping[str, object]) -> None:
    if value != OFF and value not in known:
        raise ValueError(f"frontend.{key} = {value}: should be one of {', '.join((AUTO, OFF, *known))}")
