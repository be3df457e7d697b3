"""The mixture: how often each family is drawn, system prompts, and conversations of several
requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .about import make_about
from .arithmetic import make_arithmetic
from .case import Case, Message
from .extraction import extraction_words, make_extraction
from .lists import make_list
from .phrases import sides
from .recall import make_recall, recall_words
from .sums import FAMILY as SUMS_AS_JSON, make_forced_object, make_sum_object
from .tools import make_tool_answer, make_tool_call, offer_tools, tool_words
from .words import COLOURS, THINGS, Dice

FAMILIES: dict[str, Callable[[Dice], Case]] = {
    "arithmetic": make_arithmetic,
    "lists": make_list,
    "extraction": make_extraction,
    "tool call": make_tool_call,
    "tool answer": make_tool_answer,
    "recall": make_recall,
    "about": make_about,
}
# With a family that is judged apart.
TAUGHT = FAMILIES | {SUMS_AS_JSON: make_sum_object}
_SHARES = {
    "arithmetic": 0.24,
    "lists": 0.22,
    "extraction": 0.22,
    "tool call": 0.12,
    "tool answer": 0.02,
    "recall": 0.30,
    "about": 0.05,
    SUMS_AS_JSON: 0.2,
}
FORCED = 0.5  # share of training's sums as JSON whose question does not mention an object
_SYSTEM = sides("mixture", "system")
# Words of a long conversation per wanted token, measured with the demo's tokenizer.
WORDS_PER_TOKEN = 0.27


def draw_case(dice: Dice) -> Case:
    """Draws one case of the mixture."""
    family = dice.choices(list(_SHARES), list(_SHARES.values()))[0]
    case = TAUGHT[family](dice)
    if family == SUMS_AS_JSON and dice.chance(FORCED):
        case = make_forced_object(dice)
    if family == "about" and dice.chance(0.25):
        return with_system(dice, replace(case, tools=tuple(tool.schema() for tool in offer_tools(dice))))
    if dice.chance(0.15) and not case.tools and case.messages[0]["role"] == "user":
        case = _after_others(dice, case)
    return with_system(dice, case)


def draw_long(dice: Dice, length: int) -> Case:
    """Draws a recall case of about ``length`` tokens."""
    return with_system(dice, make_recall(dice, int(length * WORDS_PER_TOKEN)))


def draw_held_out(dice: Dice, family: str, longest: int = 3000) -> Case:
    """Draws a case to evaluate the model. Half of the recall cases are long, up to ``longest``
    tokens.
    """
    if family == "recall" and dice.chance(0.5):
        return draw_long(dice, dice.randint(300, longest))
    return with_system(dice, TAUGHT[family](dice))


def with_system(dice: Dice, case: Case) -> Case:
    if not dice.chance(0.3) or case.messages[0]["role"] == "system":
        return case
    system: Message = {"role": "system", "content": dice.pick(_SYSTEM)}
    return replace(case, messages=(system, *case.messages))


def _after_others(dice: Dice, case: Case) -> Case:
    """The same case after one or two answered ones."""
    earlier: list[Message] = []
    for _ in range(dice.randint(1, 2)):
        other = dice.choice((make_arithmetic, make_list, make_extraction, make_about))(dice)
        earlier += [
            *other.messages,
            other.answer | ({} if "reasoning_content" in other.answer else {"learn": True}),
        ]
    return replace(case, messages=(*earlier, *case.messages))


def value_words() -> set[str]:
    """Words that answers copy: values, names of fields, tools and their parameters, attributes."""
    return {*extraction_words(), *tool_words(), *recall_words(), *THINGS, *COLOURS}
