"""Questions about Lockstep and about the demo model itself. Phrasings are held out, facts are
not.
"""

from __future__ import annotations

from typing import Any

from .case import Case, Check, assistant, user
from .frames import FROM_PARTS, asked, frame, hurried
from .phrases import phrases, sides
from .words import Dice

_FACTS: list[dict[str, Any]] = phrases("facts")
_ASKED = [sides("about", number) for number in range(len(_FACTS))]
_UNSEEN = frozenset[str]().union(*(asked.unseen for asked in _ASKED))


def make_about(dice: Dice) -> Case:
    number = dice.randrange(len(_FACTS))
    fact = _FACTS[number]
    question = dice.pick(_ASKED[number])
    if not dice.held_out and "topics" in fact and dice.chance(FROM_PARTS):
        about = dice.chance(0.6)
        template = frame(dice, "about", start="start" if about else "topic", capital=False)
        question = template.format(c=dice.choice(fact["clauses"]), n=dice.choice(fact["topics"]))
        question = question[0].upper() + question[1:]
        if question in _UNSEEN:
            return make_about(dice)
    if dice.chance(0.15):
        question = question.rstrip(".?!")
    if not dice.held_out and dice.chance(0.35):
        question = hurried(dice, question)
    elif not dice.held_out and dice.chance(0.4):
        question = asked(dice, question)
    return Case("about", (user(question),), assistant(fact["answer"]), Check("contains", fact["needles"]))
