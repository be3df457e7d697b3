"""The generator's words, and the split of words that training never sees.

Names are composed from syllables, so that copying has to be learned and cannot be remembered. A
checksum assigns composed names and words to the held-out side; other words are held out by list.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from .phrases import Sides, phrases

_TEXT = phrases("words")
_STARTS: list[str] = _TEXT["starts"]
_MIDDLES: list[str] = _TEXT["middles"]
_PERSON_ENDS: list[str] = _TEXT["person_ends"]
_PLACE_ENDS: list[str] = _TEXT["place_ends"]

THINGS: list[str] = _TEXT["things"]
_ONSETS: list[str] = _TEXT["onsets"]
_PIECES: list[str] = _TEXT["pieces"]
_VOWELS: list[str] = _TEXT["vowels"]
_CODAS: list[str] = _TEXT["codas"]
_ENDINGS: list[str] = _TEXT["endings"]
COLOURS: list[str] = _TEXT["colours"]
_NOUNS: list[str] = _TEXT["nouns"]


def _words_of_held_out_lists() -> set[str]:
    sections = ("tools", "extraction", "recall", "sums")
    lists = [
        texts
        for section in sections
        for file in ("held_out", "final")
        for texts in phrases(section, file).values()
    ]
    return {text.split(":")[0] for texts in lists for text in texts}


_HELD_OUT_WORDS = _words_of_held_out_lists()


def is_held_out(text: str) -> bool:
    """True for one in five, by checksum: the same on every machine."""
    return zlib.crc32(text.encode()) % 5 == 0


def side(words: Sequence[str], held_out: bool) -> list[str]:
    """The words on one side of the split."""
    return [word for word in words if is_held_out(word) == held_out]


class Dice(random.Random):
    """The generator's random draws. ``held_out`` selects the side of the split, ``final`` the
    held-out side of the final evaluation.
    """

    def __init__(self, seed: int | str, held_out: bool, final: bool = False) -> None:
        super().__init__(seed)
        self.held_out, self.final = held_out or final, final

    def own(self, lists: Sides) -> list[str]:
        """This side's list."""
        if self.final:
            return lists.final
        return lists.held_out if self.held_out else lists.training

    def pick(self, lists: Sides) -> str:
        return self.choice(self.own(lists))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def person(self) -> str:
        return self._name(_PERSON_ENDS, _FIRST_NAMES)

    def place(self) -> str:
        return self._name(_PLACE_ENDS, _TOWNS)

    def _name(self, ends: Sequence[str], real: Sequence[str]) -> str:
        """A coined name; in training also a real one."""
        if not self.held_out and self.chance(0.35):
            return self.choice(real)
        while True:
            middle = self.choice(_MIDDLES) if self.chance(0.4) else ""
            name = self.choice(_STARTS) + middle + self.choice(ends)
            if is_held_out(name) == self.held_out:
                return name

    def coined(self) -> str:
        """A made-up word that looks roughly English. It can only be copied or matched, not
        remembered.
        """
        while True:
            count = self.choice((1, 1, 1, 2, 2))
            if self.chance(0.5):
                word = "".join(
                    self.choice(_PIECES) if self.chance(0.7) else self._syllable()
                    for _ in range(max(2, count))
                )
            else:
                word = "".join(self._syllable() for _ in range(count)) + self.choice(_ENDINGS)
            if len(word) > 2 and is_held_out(word) == self.held_out and word not in _HELD_OUT_WORDS:
                return word

    def _syllable(self) -> str:
        return self.choice(_ONSETS) + self.choice(_VOWELS) + self.choice(_CODAS)

    def noun(self) -> str:
        """A noun for a name; in training mostly coined."""
        if self.chance(0.6):
            return self.coined()
        return self.choice(_NOUNS) if self.chance(0.7) else self.thing()

    def key(self, known: list[str]) -> str:
        """Coins a key of a JSON object: a noun, or a known key and a noun joined as programs join
        words, so that a key is known by all of its pieces and not by the first.
        """
        noun = self.noun()
        if self.chance(0.5):
            return noun
        one, two = self.choice(((self.choice(known), noun), (noun, self.choice(known))))
        return f"{one}_{two}" if self.chance(0.6) else one + two[0].upper() + two[1:]

    def thing(self) -> str:
        """A noun. Held-out cases mix nouns of both sides; training coins some."""
        if self.held_out:
            return self.choice(THINGS)
        return self.coined() if self.chance(0.35) else self.choice(_SEEN_THINGS)

    def colour(self) -> str:
        return self.choice(COLOURS)

    def number(self, most_digits: int) -> int:
        """A positive number; each number of digits is equally likely."""
        digits = self.randint(1, most_digits)
        return self.randint(10 ** (digits - 1), 10**digits - 1)

    def distinct(self, draw: str, count: int) -> list[str]:
        """``count`` different words from the method named ``draw``."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[getattr(self, draw)()] = None
        return list(found)


_SEEN_THINGS = side(THINGS, held_out=False)
_FIRST_NAMES: list[str] = side(_TEXT["first_names"], held_out=False)
_TOWNS: list[str] = side(_TEXT["towns"], held_out=False)
