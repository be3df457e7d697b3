"""Facts told in earlier turns, asked for at the end of a conversation of a wanted length."""

from __future__ import annotations

from .case import Case, Check, Message, assistant, user
from .extraction import draw_value
from .frames import frame
from .phrases import phrases, sides
from .words import Dice, side

_TEXT = phrases("recall")
_ATTRIBUTES = sides("recall", "attributes")
_NOUNS: list[str] = side(phrases("tools")["nouns"], held_out=False)
_KINDS: list[str] = _TEXT["kinds"]
_TELL_MINE, _TELL, _ASK_MINE, _ASK = (sides("recall", name) for name in ("tell_mine", "tell", "ask_mine", "ask"))
_UNSEEN = _TELL_MINE.unseen | _TELL.unseen | _ASK_MINE.unseen | _ASK.unseen
_NOTED: list[str] = _TEXT["noted"]
_CHATTER: list[str] = _TEXT["chatter"]


def make_recall(dice: Dice, num_words: int = 0) -> Case:
    """``num_words``: about how many words the conversation has; 0: only a few turns."""
    facts = _facts(dice, 10 if num_words and not dice.held_out else 6)
    turns = [(_tell(dice, *fact), dice.choice(_NOTED)) for fact in facts]
    length = sum(len(text.split()) for text, _ in turns)
    while length < num_words or (not num_words and dice.chance(0.5)):
        text = _chatter(dice)
        turns.insert(dice.randint(0, len(turns)), (text, dice.choice(_NOTED)))
        length += len(text.split()) + 2
    messages: list[Message] = []
    for text, reply in turns:
        messages += [user(text), assistant(reply)]
    asked = dice.sample(facts, 1 if dice.held_out else min(len(facts), dice.randint(1, 4) + 4 * (num_words > 0)))
    for fact in asked[:-1]:
        messages += [user(_ask(dice, *fact)), assistant(_reply(*fact), learn=True)]
    owner, name, value = asked[-1]
    messages.append(user(_ask(dice, owner, name, value)))
    return Case("recall", tuple(messages), assistant(_reply(owner, name, value)), Check("contains", [str(value)]))


def _facts(dice: Dice, most: int) -> list[tuple[str, str, str | int]]:
    """Owner ("" for the user), attribute and value; no two alike in owner and attribute."""
    people = [dice.person() for _ in range(2)] + [""]
    pool = dice.own(_ATTRIBUTES)
    facts: dict[tuple[str, str], str | int] = {}
    for _ in range(dice.randint(2, most)):
        name, kind = dice.choice(pool).split(":")
        if not dice.held_out and dice.chance(0.95):
            name = _attribute(dice)
        facts[dice.choice(people), name] = draw_value(dice, kind)
    return [(owner, name, value) for (owner, name), value in facts.items()]


def _attribute(dice: Dice) -> str:
    """A name that can only be copied: a word, or two."""
    noun = dice.choice(_NOUNS) if dice.chance(0.5) else dice.noun()
    if dice.chance(0.25):
        return noun
    kind = dice.noun() if dice.chance(0.4) else dice.choice(_KINDS)
    return f"{kind} {noun}"


def _tell(dice: Dice, owner: str, name: str, value: str | int) -> str:
    template = dice.pick(_TELL if owner else _TELL_MINE)
    if not dice.held_out and dice.chance(0.5):
        template = _with_owner(frame(dice, "tell"), owner)
    return template.format(n=owner, f=name, v=value)


def _ask(dice: Dice, owner: str, name: str, value: str | int) -> str:
    template = dice.pick(_ASK if owner else _ASK_MINE)
    if not dice.held_out and dice.chance(0.6):
        template = _with_owner(frame(dice, "question"), owner)
    return template.format(n=owner, f=name)


def _with_owner(template: str, owner: str) -> str:
    """``{x}`` of a frame: the attribute and whose it is."""
    text = template.replace("{x}", "{n}'s {f}" if owner else "my {f}")
    unseen = (*_TELL_UNSEEN, *_TELL_MINE_UNSEEN, *_ASK_UNSEEN, *_ASK_MINE_UNSEEN)
    assert text not in unseen
    return text[0].upper() + text[1:] if text[0] != "{" else text


def _reply(owner: str, name: str, value: str | int) -> str:
    return f"{owner}'s {name} is {value}." if owner else f"Your {name} is {value}."


def _chatter(dice: Dice) -> str:
    template = dice.choice(_CHATTER)
    return template.format(n=dice.person(), m=dice.person(), p=dice.place(), t=dice.thing(), c=dice.colour(), d=dice.randint(2, 99))


def recall_words() -> set[str]:
    return {word for pair in _ATTRIBUTES.training + _ATTRIBUTES.held_out for word in pair.split(":")[0].split()}
