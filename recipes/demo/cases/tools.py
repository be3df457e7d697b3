"""Chooses and fills a tool call among two to four tools, and answers from a tool's result.

Tools of held-out cases have nouns and parameters that training never offers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .case import Case, Check, Message, assistant, dumps, user
from .extraction import KINDS, draw_value
from .frames import asked, wording
from .phrases import phrases, sides
from .words import Dice

_TEXT = phrases("tools")
_VERBS: dict[str, list[str]] = _TEXT["verbs"]
_DESCRIPTIONS: list[str] = _TEXT["descriptions"]
_NOUNS, _PARAMETERS, _FACTS = (sides("tools", name) for name in ("nouns", "parameters", "facts"))
_BARE, _FILLED, _GIVEN = (sides("tools", name) for name in ("bare", "filled", "given"))
_CONVEYED: dict[str, list[str]] = _TEXT["conveyed"]
_STATES: list[str] = _TEXT["states"]
_JOINTS = (", ", " and ", " ")
_MORE_JOINTS: list[str] = _TEXT["joints"]


@dataclass(frozen=True)
class Tool:
    verb: str
    noun: str
    parameters: tuple[tuple[str, str], ...]
    description: str

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.noun}"

    def schema(self) -> Message:
        """The tool in the chat API's form."""
        kinds = {
            name: "integer" if kind in ("small", "number") else "string" for name, kind in self.parameters
        }
        parameters = {
            "type": "object",
            "properties": {name: {"type": kind} for name, kind in kinds.items()},
            "required": list(kinds),
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def make_tool_call(dice: Dice) -> Case:
    tools = offer_tools(dice)
    earlier = _rounds(dice, tools) if not dice.held_out and dice.chance(0.5) else []
    tool = dice.choice(tools)
    question, arguments = _request(dice, tool)
    value = {"name": tool.name, "arguments": arguments}
    answer = assistant("") | {"tool_calls": [_call(value)]}
    return Case(
        "tool call",
        (*earlier, user(question)),
        answer,
        Check("call", value),
        tuple(each.schema() for each in tools),
    )


def make_tool_answer(dice: Dice) -> Case:
    """The call is already made; its result is a flat object."""
    tools = offer_tools(dice)
    messages, facts = _round(dice, dice.choice(tools))
    values = [str(value) for value in facts.values()]
    return Case(
        "tool answer",
        tuple(messages[:-1]),
        messages[-1],
        Check("contains", values),
        tuple(each.schema() for each in tools),
    )


def _rounds(dice: Dice, tools: list[Tool]) -> list[Message]:
    """One to three requests to the same tools, called and answered."""
    rounds = [_round(dice, dice.choice(tools))[0] for _ in range(dice.randint(1, 3))]
    return [message for messages in rounds for message in messages]


def _round(dice: Dice, tool: Tool) -> tuple[list[Message], dict[str, str | int]]:
    """A request, its call, the result and the answer from it; and the facts that the tool
    returned.
    """
    question, arguments = _request(dice, tool)
    call = _call({"name": tool.name, "arguments": arguments})
    facts = _draw_facts(dice)
    result: Message = {"role": "tool", "tool_call_id": call["id"], "content": dumps(facts)}
    called = assistant("", learn=not dice.held_out) | {"tool_calls": [call]}
    return [user(question), called, result, assistant(tell(facts), learn=not dice.held_out)], facts


def tell(facts: dict[str, str | int]) -> str:
    """A flat object as a sentence."""
    clauses = [f"the {name} is {value}" for name, value in facts.items()]
    text = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)
    return text[0].upper() + text[1:] + "."


def _call(value: Message) -> Message:
    return {"id": "call_0", "type": "function", "function": value}


def offer_tools(dice: Dice) -> list[Tool]:
    """Two to four tools. Often two of them share the noun or the verb."""
    tools: dict[str, Tool] = {}
    count = dice.randint(2, 4)
    pool = _shared_parameters(dice) if not dice.held_out and dice.chance(0.6) else None
    verb = dice.choice(list(_VERBS))
    noun = _noun(dice)
    while len(tools) < count:
        tool = _tool(dice, verb, noun, pool)
        tools.setdefault(tool.name, tool)
        keep = dice.random()
        verb = verb if keep < 0.25 else dice.choice(list(_VERBS))
        noun = noun if 0.25 <= keep < 0.4 else _noun(dice)
    offered = list(tools.values())
    dice.shuffle(offered)
    return offered


def _noun(dice: Dice) -> str:
    """Training also uses nouns of other families and coins some, so that they have to be matched
    and not remembered.
    """
    if dice.held_out:
        return dice.pick(_NOUNS)
    return dice.pick(_NOUNS) if dice.chance(0.35) else dice.noun()


def _named(dice: Dice, pool: list[str], least: int, most: int) -> dict[str, str]:
    """Names and kinds of values; training coins some of the names."""
    found = dict(pair.split(":") for pair in dice.choices(pool, k=dice.randint(least, most)))
    share = 0.0 if dice.held_out else dice.choice((0.2, 0.7, 1.0))
    return {dice.noun() if dice.chance(share) else name: kind for name, kind in found.items()}


def _shared_parameters(dice: Dice) -> list[str]:
    """A few parameters for all tools of a case, most of them coined. Which ones a tool takes has to
    be read from its signature.
    """
    coined = [f"{name}:{dice.choice(KINDS)}" for name in dice.distinct("noun", dice.randint(2, 5))]
    return coined + dice.sample(_PARAMETERS.training, dice.randint(1, 3))


def _tool(dice: Dice, verb: str, noun: str, shared: list[str] | None) -> Tool:
    """``shared``: parameters to choose from; None for those of the tool's side."""
    pool = _PARAMETERS.training + dice.own(_PARAMETERS) * 4 if dice.held_out else _PARAMETERS.training
    few, least, most = (0.3, 1, 3) if dice.held_out else (0.12, 2, 5)
    least, most = (0, 1) if dice.chance(few) else (least, most)
    if shared:
        parameters = dict(pair.split(":") for pair in dice.choices(shared, k=dice.randint(least, most)))
    else:
        parameters = _named(dice, pool, least, most)
    description = dice.choice(_DESCRIPTIONS).format(V=verb.capitalize(), v=verb, n=noun)
    return Tool(verb, noun, tuple(parameters.items()), description)


def _request(dice: Dice, tool: Tool) -> tuple[str, dict[str, str | int]]:
    """The user's text, and the arguments in the tool's order."""
    arguments = {name: draw_value(dice, kind) for name, kind in tool.parameters}
    given = []
    for name, value in arguments.items():
        conveyed = name in _CONVEYED and dice.chance(0.5)
        clause = dice.choice(_CONVEYED[name]) if conveyed else wording(dice, _GIVEN, "given", capital=False)
        given.append(clause.format(f=name, v=value))
    first = given[:1]
    dice.shuffle(given)
    if not dice.held_out and dice.chance(0.4):  # the text then ends with the first argument
        given = [clause for clause in given if clause not in first] + first
    template = wording(dice, _FILLED, "command") if given else wording(dice, _BARE, "command", "bare")
    verb = dice.choice(_VERBS[tool.verb]) if dice.chance(0.4) else tool.verb
    joints = _JOINTS if dice.held_out or dice.chance(0.7) else _MORE_JOINTS
    text = template.format(v=verb, V=verb.capitalize(), n=tool.noun, p=dice.choice(joints).join(given))
    return asked(dice, text[0].upper() + text[1:]), arguments


def _draw_facts(dice: Dice) -> dict[str, str | int]:
    pool = _FACTS.training + dice.own(_FACTS) * 4 if dice.held_out else _FACTS.training
    facts = _named(dice, pool, 1, 3)
    return {
        name: dice.choice(_STATES) if kind == "state" else draw_value(dice, kind)
        for name, kind in facts.items()
    }


def tool_words() -> set[str]:
    named = (_PARAMETERS.training, _PARAMETERS.held_out, _FACTS.training, _FACTS.held_out)
    return {*_VERBS, *_NOUNS.training, *_NOUNS.held_out, *_STATES} | {
        pair.split(":")[0] for pairs in named for pair in pairs
    }
