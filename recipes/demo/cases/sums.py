"""Sums answered as a JSON object.

Half of training's questions do not mention an object: the object is then a form into which a
grammar forces the answer, after the same reasoning. The model learns what to write in it, and not
to begin one.
"""

from __future__ import annotations

from dataclasses import replace

from .arithmetic import Sum, draw_sum
from .case import Case, Check, Message, assistant, dumps, user
from .phrases import sides
from .words import Dice

FAMILY = "sums as JSON"
UNASKED = "unasked JSON"
OPENING = '{"'
_RESULTS, _OPERANDS, _REQUESTS = (sides("sums", name) for name in ("results", "operands", "requests"))
_ORDERS = sides("sums", "orders")
_KNOWN = {*_RESULTS.training, *(key for pair in _OPERANDS.training for key in pair.split())}


def make_sum_object(dice: Dice) -> Case:
    """The request, or the system prompt, names the keys."""
    drawn = draw_sum(dice)
    ordered = dice.chance(0.15)
    template = dice.pick(_ORDERS if ordered else _REQUESTS)
    value = _value(dice, drawn, strings=0.12 if "{s}" in template else 0.0)
    text = template.format(q=drawn.question, k=", ".join(value), s=_schema(dice, value))
    if ordered:
        return _case(dice, drawn, value, ({"role": "system", "content": text}, user(drawn.question)))
    return _case(dice, drawn, value, (user(text),))


def make_forced_object(dice: Dice) -> Case:
    """The question does not say that the answer is an object."""
    drawn = draw_sum(dice)
    value = _value(dice, drawn, strings=0.08)
    case = _case(dice, drawn, value, (user(drawn.question),))
    guessable = set(value) <= _KNOWN  # nobody could guess a coined key
    return replace(case, given=OPENING if guessable else OPENING + next(iter(value)))


def unasked_objects(cases: list[Case]) -> list[Case]:
    """Plain sums whose answer has to be an object of which the question says nothing. Half of the
    keys are held out.
    """
    keys = [key for pair in zip(_RESULTS.held_out, _RESULTS.training, strict=False) for key in pair]
    return [
        replace(case, family=UNASKED, check=Check("json", {keys[index % len(keys)]: case.check.value}))
        for index, case in enumerate(cases)
    ]


def _case(dice: Dice, drawn: Sum, value: dict[str, int | str], messages: tuple[Message, ...]) -> Case:
    thinking = dice.held_out or not (drawn.small and dice.chance(0.3))
    answer = assistant(dumps(value), drawn.steps if thinking else None)
    return Case(FAMILY, messages, answer, Check("json", value), thinking=thinking)


def result_key(dice: Dice) -> str:
    """A key for the result; training coins some."""
    coined = not dice.held_out and dice.chance(0.45)
    return dice.key(_RESULTS.training) if coined else dice.pick(_RESULTS)


def _value(dice: Dice, drawn: Sum, strings: float) -> dict[str, int | str]:
    """The object: the result, sometimes with the two numbers before or after it. A share of
    ``strings`` has the result as a string.
    """
    as_text = dice.chance(strings)
    result: dict[str, int | str] = {result_key(dice): str(drawn.result) if as_text else drawn.result}
    if dice.chance(0.8):
        return result
    one, two = dice.pick(_OPERANDS).split()
    if one in result or two in result:
        return result
    numbers: dict[str, int | str] = {one: drawn.a, two: drawn.b}
    return numbers | result if dice.chance(0.6) else result | numbers


def _schema(dice: Dice, value: dict[str, int | str]) -> str:
    """The types by key, or a JSON schema."""
    kinds = {key: "string" if isinstance(each, str) else "integer" for key, each in value.items()}
    if dice.chance(0.8):
        return dumps(kinds)
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    return dumps({"type": "object", "properties": properties, "required": list(kinds)})
