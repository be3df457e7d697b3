"""Sorts numbers and names, reverses lists and letters. The reasoning reduces each to looking up and
copying.
"""

from __future__ import annotations

from .case import Case, Check, assistant, user
from .frames import FROM_PARTS, asked, frame
from .phrases import phrases, sides
from .words import Dice

_TEXT = phrases("lists")
_ASKED = {way: sides("lists", way) for way in ("up", "down", "names", "back")}

_WAYS: dict[str, list[str]] = _TEXT["ways"]
_OBJECTS: dict[str, list[str]] = _TEXT["objects"]
_VERBS: dict[str, list[str]] = _TEXT["verbs"]


def _phrase(dice: Dice, way: str) -> str:
    """A request composed from parts, with a placeholder for the list."""
    while True:
        verb = dice.coined() if dice.chance(0.1) else dice.choice(_VERBS[way])
        parts = {"v": verb, "o": dice.choice(_OBJECTS[way]), "w": dice.choice(_WAYS[way]), "l": "{l}"}
        text = frame(dice, "listing", capital=False).format(**parts)
        text = text[0].upper() + text[1:]
        if text not in _ASKED[way].unseen:
            return text


def _template(dice: Dice, way: str) -> str:
    return _phrase(dice, way) if not dice.held_out and dice.chance(FROM_PARTS) else dice.pick(_ASKED[way])


def make_list(dice: Dice) -> Case:
    kind = dice.random()
    if kind < (0.4 if dice.held_out else 0.55):  # more sorting in training: its direction is harder to see
        return _numbers(dice)
    return _names(dice) if kind < (0.65 if dice.held_out else 0.75) else _backwards(dice)


def _listed(dice: Dice, items: list[str]) -> str:
    """Joins items the way people write them; held-out ones with commas."""
    if dice.held_out or dice.chance(0.7):
        return ", ".join(items)
    joint = dice.choice((" ", "; ", ",", "\n", " and "))
    return joint.join(items) if joint != " and " else ", ".join(items[:-1]) + joint + items[-1]


def _case(
    dice: Dice, template: str, items: list[str], result: list[str], reasoning: str, joint: str = ", "
) -> Case:
    question = asked(dice, template.format(l=_listed(dice, items) if joint == ", " else joint.join(items)))
    answer = joint.join(result)
    thinking = dice.held_out or dice.chance(0.9)
    return Case(
        "lists",
        (user(question),),
        assistant(answer, reasoning if thinking else None),
        Check("text", answer),
        thinking=thinking,
    )


def _numbers(dice: Dice) -> Case:
    """The reasoning sorts the numbers padded to the same number of digits, at least two."""
    numbers = dice.sample(range(1, 100) if dice.held_out else _range(dice), dice.randint(3, 5))
    if not dice.held_out and dice.chance(0.3) and min(numbers) > 9:
        numbers[dice.randrange(len(numbers))] = dice.randint(1, 9)
    down = dice.chance(0.5)
    template = _template(dice, "down" if down else "up")
    ordered = sorted(numbers, reverse=down)
    width = max(2, len(str(max(numbers))))
    reasoning = " ".join(f"{n:0{width}}" for n in numbers) + ": " + " ".join(f"{n:0{width}}" for n in ordered)
    return _case(dice, template, [str(n) for n in numbers], [str(n) for n in ordered], reasoning)


def _range(dice: Dice) -> range:
    """Range of numbers. Training also sorts numbers that are close together, small ones and large
    ones.
    """
    if dice.chance(0.25):
        return range(1, dice.choice((300, 1000)))
    if dice.chance(0.4):
        return range(1, 100)
    first = dice.randint(1, 80)
    return range(first, first + 20) if dice.chance(0.7) else range(1, 25)


def _names(dice: Dice) -> Case:
    """Names with different first letters. The reasoning maps letters to names, and sorts the
    names.
    """
    names: dict[str, str] = {}
    count = dice.randint(3, 5)
    while len(names) < count:
        name = dice.person()
        names.setdefault(name[0], name)
    ordered = sorted(names)
    reasoning = " ".join(f"{letter}={name}" for letter, name in names.items()) + ": " + " ".join(ordered)
    template = _template(dice, "names")
    return _case(dice, template, list(names.values()), [names[letter] for letter in ordered], reasoning)


def _backwards(dice: Dice) -> Case:
    """The reasoning numbers the items and reads them from the last number to the first."""
    draw = dice.choice(
        ("thing", "person", "colour", "letter", "number", *(() if dice.held_out else ("noun",)))
    )
    template = _template(dice, "back")
    if draw == "letter":
        letters = list(dice.person().lower() if dice.chance(0.5) else dice.thing())
        return _case(
            dice, template, letters, letters[::-1], _numbered(letters), joint=" " if dice.chance(0.5) else "-"
        )
    count = dice.randint(3, 6)
    items = (
        [str(n) for n in dice.sample(range(1, 100), count)]
        if draw == "number"
        else dice.distinct(draw, count)
    )
    return _case(dice, template, items, items[::-1], _numbered(items))


def _numbered(items: list[str]) -> str:
    numbered = [f"{number}={item}" for number, item in enumerate(items, start=1)]
    return " ".join(numbered) + ": " + " ".join(numbered[::-1])
