"""Questions about Lockstep and about the demo model itself. Held out are phrasings, not facts."""

from __future__ import annotations

from typing import Any

from .case import Case, Check, assistant, user
from .frames import frame
from .phrases import phrases
from .words import Dice

_FACTS: list[dict[str, Any]] = phrases("about")["facts"]
_UNSEEN = {phrase for fact in _FACTS for phrase in fact["unseen"]}


def make_about(dice: Dice) -> Case:
    fact = dice.choice(_FACTS)
    question = dice.pick(fact["seen"], fact["unseen"])
    if not dice.held_out and "topics" in fact and dice.chance(0.6):
        about = dice.chance(0.6)
        template = frame(dice, "about", start="start" if about else "topic", capital=False)
        question = template.format(c=dice.choice(fact["clauses"]), n=dice.choice(fact["topics"]))
        question = question[0].upper() + question[1:]
        if question in _UNSEEN:
            return make_about(dice)
    if dice.chance(0.15):
        question = question.rstrip(".?!")
    if not dice.held_out and dice.chance(0.3):
        question = frame(dice, "opening") + question
    return Case("about", (user(question),), assistant(fact["answer"]), Check("contains", fact["needles"]))
