"""Facts told in earlier turns and asked for at the end of a conversation of a given length."""

from __future__ import annotations

from .case import Case, Check, Message, assistant, user
from .extraction import KINDS, draw_value
from .frames import FROM_PARTS, frame
from .phrases import phrases, sides
from .words import Dice, side

_TEXT = phrases("recall")
_ATTRIBUTES = sides("recall", "attributes")
_ATTRIBUTES_UNSEEN = {each.split(":")[0] for each in _ATTRIBUTES.unseen}
_NOUNS: list[str] = side(phrases("tools")["nouns"], held_out=False)
_KINDS: list[str] = _TEXT["kinds"]
_TELL_MINE, _TELL, _ASK_MINE, _ASK = (
    sides("recall", name) for name in ("tell_mine", "tell", "ask_mine", "ask")
)
_UNSEEN = _TELL_MINE.unseen | _TELL.unseen | _ASK_MINE.unseen | _ASK.unseen
_NOTED: list[str] = _TEXT["noted"]
_CHATTER: list[str] = _TEXT["chatter"]


def make_recall(dice: Dice, num_words: int = 0) -> Case:
    """``num_words``: approximate length of the conversation in words; 0 gives a few turns only."""
    facts = _facts(dice, 6 if dice.held_out else 10 if num_words else 7)
    turns = [(_tell(dice, *fact), dice.choice(_NOTED)) for fact in facts]
    length = sum(len(text.split()) for text, _ in turns)
    while length < num_words or (not num_words and dice.chance(0.5)):
        text = _chatter(dice)
        turns.insert(dice.randint(0, len(turns)), (text, dice.choice(_NOTED)))
        length += len(text.split()) + 2
    messages: list[Message] = []
    for text, reply in turns:
        messages += [user(text), assistant(reply)]
    asked = dice.sample(
        facts, 1 if dice.held_out else min(len(facts), dice.randint(1, 4) + 4 * (num_words > 0))
    )
    for fact in asked[:-1]:
        messages += [user(_ask(dice, *fact)), assistant(_reply(*fact), learn=True)]
    owner, name, value = asked[-1]
    messages.append(user(_ask(dice, owner, name, value)))
    return Case(
        "recall", tuple(messages), assistant(_reply(owner, name, value)), Check("contains", [str(value)])
    )


def _facts(dice: Dice, most: int) -> list[tuple[str, str, str | int]]:
    """Owner ("" for the user), attribute and value. No two facts share both owner and attribute."""
    people = [dice.person() for _ in range(2)] + [""]
    pool = dice.own(_ATTRIBUTES) if dice.held_out or dice.chance(0.05) else _attributes(dice)
    facts: dict[tuple[str, str], str | int] = {}
    for _ in range(dice.randint(2, most)):
        name, kind = dice.choice(pool).split(":")
        facts[dice.choice(people), name] = draw_value(dice, kind)
    return [(owner, name, value) for (owner, name), value in facts.items()]


def _attributes(dice: Dice) -> list[str]:
    """A conversation's attributes, with the kinds of their values. Either few, so that several
    owners share one and the owner has to be matched, or many. Often composed from few words
    ("desk", "desk neighbour", "bag neighbour"), so that the whole name has to be matched.
    """
    nouns = [*dice.distinct("noun", dice.randint(1, 2)), dice.choice(_NOUNS)]
    kinds = [*dice.sample(_KINDS, 2), dice.noun(), nouns[0]]
    alike = dice.chance(0.5)
    found: dict[str, str] = {}
    wanted = dice.choice((2, 2, 3, 3) if alike else (2, 3, 4, 8))
    while len(found) < wanted:
        if alike:
            noun = dice.choice(nouns)
            kind = dice.choice(kinds)
        else:
            noun = dice.noun()
            kind = dice.choice((dice.noun(), dice.choice(_KINDS)))
        name = noun if noun == kind or dice.chance(0.25) else f"{kind} {noun}"
        if name not in _ATTRIBUTES_UNSEEN:
            found[name] = dice.choice(KINDS)
    return [f"{name}:{kind}" for name, kind in found.items()]


def _tell(dice: Dice, owner: str, name: str, value: str | int) -> str:
    template = dice.pick(_TELL if owner else _TELL_MINE)
    if not dice.held_out and dice.chance(FROM_PARTS):
        template = _framed(dice, "tell", owner)
    return template.format(n=owner, f=name, v=value)


def _ask(dice: Dice, owner: str, name: str, value: str | int) -> str:
    template = dice.pick(_ASK if owner else _ASK_MINE)
    if not dice.held_out and dice.chance(FROM_PARTS):
        template = _framed(dice, "question", owner)
    return template.format(n=owner, f=name)


def _framed(dice: Dice, name: str, owner: str) -> str:
    """A template of a grammar. Its ``{x}`` becomes the attribute with its owner."""
    whose = dice.choice(("{n}'s {f}", "{n}'s {f}", "the {f} of {n}")) if owner else "my {f}"
    while True:
        text = frame(dice, name).replace("{x}", whose)
        text = text[0].upper() + text[1:]
        if text not in _UNSEEN:
            return text


def _reply(owner: str, name: str, value: str | int) -> str:
    return f"{owner}'s {name} is {value}." if owner else f"Your {name} is {value}."


def _chatter(dice: Dice) -> str:
    template = dice.choice(_CHATTER)
    return template.format(
        n=dice.person(),
        m=dice.person(),
        p=dice.place(),
        t=dice.thing(),
        c=dice.colour(),
        d=dice.randint(2, 99),
    )


def recall_words() -> set[str]:
    return {
        word for pair in _ATTRIBUTES.training + _ATTRIBUTES.held_out for word in pair.split(":")[0].split()
    }
