"""Extracts a JSON object of a given schema from a sentence.

A few fields have clauses of their own ("aged 41"); every field may also be told by its name. Fields
of held-out schemas, which training never names, are only told by name. Training also coins fields,
so that they have to be matched and not remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from .case import Case, Check, assistant, dumps, user
from .frames import FROM_PARTS, asked, frame, wording
from .phrases import phrases, sides
from .words import Dice


@dataclass(frozen=True)
class Field:
    """A field: the kind of its values, and clauses that tell it without its name."""

    name: str
    kind: str
    clauses: tuple[str, ...] = ()


_KNOWN = (
    Field("name", "person", ("this is about {v}", "{v} wrote to us", "we met {v}", "a person called {v}")),
    Field("age", "small", ("aged {v}", "{v} years old", "who is {v} years of age", "turned {v} this year")),
    Field("city", "place", ("lives in {v}", "from {v}", "who moved to {v}", "at home in {v}")),
    Field("product", "thing", ("ordered a {v}", "wants to buy a {v}", "asked for a {v}", "bought a {v}")),
    Field("quantity", "small", ("{v} pieces", "{v} of them", "{v} items in all")),
    Field("price", "number", ("for {v} coins", "costs {v} coins", "at {v} coins", "paid {v} coins")),
    Field("colour", "colour", ("painted {v}", "all in {v}", "of {v} colour")),
)
_TOLD = sides("extraction", "told")
_CLAUSES = sides("extraction", "clauses")
_REQUESTS = sides("extraction", "requests")
KINDS = ("person", "place", "thing", "colour", "small", "number")
_AGAIN: list[str] = phrases("extraction")["again"]
_JOINTS = (", ", "; ", ", ", " and ")
_MORE_JOINTS: list[str] = phrases("extraction")["joints"]


def make_extraction(dice: Dice) -> Case:
    wanted, told = _fields(dice)
    values = {field.name: draw_value(dice, field.kind) for field in told}
    text = _text(dice, told, values)
    messages = [user(asked(dice, _fill(wording(dice, _REQUESTS, "request"), wanted, text)))]
    while not dice.held_out and dice.chance(0.4):
        messages.append(assistant(dumps({field.name: values[field.name] for field in wanted}), learn=True))
        wanted = dice.sample(told, dice.randint(1, min(4, len(told))))
        again = frame(dice, "again") if dice.chance(FROM_PARTS) else dice.choice(_AGAIN)
        messages.append(user(_fill(again, wanted, "")))
    result = {field.name: values[field.name] for field in wanted}
    return Case("extraction", tuple(messages), assistant(dumps(result)), Check("json", result))


def _fill(template: str, wanted: list[Field], text: str) -> str:
    schema = dumps(
        {field.name: "integer" if field.kind in ("small", "number") else "string" for field in wanted}
    )
    return template.format(s=schema, k=", ".join(field.name for field in wanted), t=text)


def draw_value(dice: Dice, kind: str) -> str | int:
    if kind == "small":
        return dice.randint(1, 99)
    return dice.number(4) if kind == "number" else str(getattr(dice, kind)())


def _fields(dice: Dice) -> tuple[list[Field], list[Field]]:
    """The fields asked for, in the order of the schema, and the fields told, in the order of the
    text. Held-out schemas ask for at least one field that training does not know.
    """
    seen = _plain_fields(_TOLD.training) + list(_KNOWN) * 2
    own = dice.own(_TOLD)
    person = not dice.held_out and dice.chance(0.2)  # facts about people, under their usual names
    pool = seen + _plain_fields(own) * 4 if dice.held_out else list(_KNOWN) if person else seen
    while True:
        chosen = {
            field.name: field for field in dice.choices(pool, k=dice.randint(2, 4 if dice.held_out else 5))
        }
        extra = {
            field.name: field
            for field in dice.choices(pool, k=dice.choice((0, 0, 1, 2) if dice.held_out else (0, 1, 2, 3)))
        }
        if not dice.held_out and not person:
            chosen = _coin(dice, chosen)
            extra = _coin(dice, extra)
        if len(chosen) >= 2 and (
            not dice.held_out or any(f"{f.name}:{f.kind}" in own for f in chosen.values())
        ):
            break
    told = list((chosen | extra).values())
    dice.shuffle(told)
    return list(chosen.values()), told


def _plain_fields(pairs: list[str]) -> list[Field]:
    return [Field(name, kind) for name, kind in (pair.split(":") for pair in pairs)]


def _coin(dice: Dice, fields: dict[str, Field]) -> dict[str, Field]:
    """Replaces most fields by coined ones. Many of the others get values of another kind than
    usual.
    """
    share = dice.choice((0.3, 0.8, 1.0))
    names = [field.name for field in fields.values()]
    coined = [
        Field(dice.key(names) if dice.chance(0.3) else dice.noun(), field.kind)
        if dice.chance(share)
        else field
        for field in fields.values()
    ]
    coined = [
        Field(field.name, dice.choice(KINDS)) if not field.clauses and dice.chance(0.5) else field
        for field in coined
    ]
    return {field.name: field for field in coined}


_OF_PEOPLE = {
    "age": ("is {v} years old", "is {v}", "turned {v} last week", "is aged {v}"),
    "city": ("lives in {v}", "comes from {v}", "is from {v}", "works in {v}", "has moved to {v}"),
    "product": ("bought a {v}", "ordered a {v}", "wants a {v}", "would like a {v}"),
    "quantity": ("took {v} pieces", "needs {v} of them", "asked for {v} items"),
    "price": ("paid {v} coins", "spent {v} coins"),
    "colour": ("wants it in {v}", "likes it {v}", "painted it {v}"),
}


def _of_a_person(dice: Dice, told: list[Field], values: dict[str, str | int]) -> str:
    """A sentence with the name as its subject; empty if the fields do not allow one."""
    others = [field for field in told if field.name != "name"]
    if len(others) == len(told) or not others or any(field.name not in _OF_PEOPLE for field in others):
        return ""
    clauses = [dice.choice(_OF_PEOPLE[field.name]).format(v=values[field.name]) for field in others]
    text = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)
    return f"{values['name']} {text}."


def _text(dice: Dice, told: list[Field], values: dict[str, str | int]) -> str:
    if not dice.held_out and (text := _of_a_person(dice, told, values)):
        return text
    clauses: list[str] = []
    for field in told:
        own = field.clauses and dice.chance(0.5)
        clause = dice.choice(field.clauses) if own else wording(dice, _CLAUSES, "clause", capital=False)
        if not clauses and not clause.startswith("{"):
            clause = clause[0].upper() + clause[1:]
        clauses.append(clause.format(f=field.name, v=values[field.name]))
    joints = _JOINTS if dice.held_out or dice.chance(0.6) else _MORE_JOINTS
    return dice.choice(joints).join(clauses) + "."


def extraction_words() -> set[str]:
    return {pair.split(":")[0] for pair in _TOLD.training + _TOLD.held_out} | {field.name for field in _KNOWN}
