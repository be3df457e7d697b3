"""Phrases that training composes from parts (``frames.yaml``), so that the model recognises a
request by its meaning and not by its words.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .phrases import Sides, phrases, sides
from .words import Dice

_OPENINGS = sides("words", "openings")
_CLOSINGS: list[str] = phrases("words")["closings"]
FROM_PARTS = 0.3  # share of training's phrases composed from parts; the others are written out
CARELESS = 0.12  # share of phrases written in a hurry
_PART = re.compile(r"<(\w+)>")


def asked(dice: Dice, text: str) -> str:
    """Adds an opening to a request, or drops its last full stop; in training also adds a
    closing.
    """
    if dice.chance(0.1):
        text = text.rstrip(".")
    if dice.chance(0.5):
        return text
    if dice.held_out:
        return dice.pick(_OPENINGS) + text
    if dice.chance(0.15) and text[-1] in ".?!":
        text += frame(dice, "closing") if dice.chance(FROM_PARTS) else dice.choice(_CLOSINGS)
    from_parts = dice.chance(FROM_PARTS)
    opening = frame(dice, "opening", _OPENINGS.unseen) if from_parts else dice.pick(_OPENINGS)
    return opening + text


def wording(dice: Dice, lists: Sides, grammar: str, start: str = "start", capital: bool = True) -> str:
    """A template from ``lists``; in training also one of a grammar, and sometimes written in a
    hurry.
    """
    if dice.held_out:
        return dice.pick(lists)
    text = frame(dice, grammar, lists.unseen, start, capital) if dice.chance(FROM_PARTS) else dice.pick(lists)
    return hurried(dice, text) if dice.chance(CARELESS) else text


_SHORT = {
    "you": "u",
    "are": "r",
    "please": "pls",
    "Please": "pls",
    "your": "ur",
    "what's": "whats",
    "What's": "whats",
}


def hurried(dice: Dice, text: str) -> str:
    """The text with a small first letter, sometimes with shortened words. Placeholders stay."""
    if dice.chance(0.5):
        text = " ".join(_SHORT.get(word, word) for word in text.split(" "))
    return text[0].lower() + text[1:]


def frame(
    dice: Dice, name: str, unseen: Collection[str] = (), start: str = "start", capital: bool = True
) -> str:
    """A template of the grammar ``name``, never one of ``unseen``."""
    assert not dice.held_out, "held-out cases have phrases of their own"
    grammar: dict[str, list[str]] = phrases("shared", "frames") | phrases(name, "frames")
    while True:
        text = _expand(dice, grammar, dice.choice(grammar[start]))
        if capital:
            text = text[0].upper() + text[1:]
        if text not in unseen:
            return text


def _expand(dice: Dice, grammar: dict[str, list[str]], text: str) -> str:
    def drawn(found: re.Match[str]) -> str:
        part = found[1].lower()
        if part in grammar:
            each = _expand(dice, grammar, dice.choice(grammar[part]))
        else:
            each = str({"word": dice.coined, "person": dice.person, "thing": dice.thing}[part]())
        return each[0].upper() + each[1:] if found[1][0].isupper() and each else each

    return _PART.sub(drawn, text)
