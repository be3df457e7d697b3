"""Addition, subtraction and multiplication. The reasoning section works digit by digit, from the
last to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .case import Case, Check, assistant, user
from .frames import asked, wording
from .phrases import sides
from .words import Dice

_DIRECT = {sign: sides("arithmetic", "direct", sign) for sign in "+-*"}
_STORIES = {sign: sides("arithmetic", "stories", sign) for sign in "+-*"}
_FRAMES = {"+": "addition", "-": "subtraction", "*": "multiplication"}


@dataclass(frozen=True)
class Sum:
    """Two numbers and what to do with them, and the question that asks for the result."""

    a: int
    sign: str
    b: int
    question: str

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def small(self) -> bool:
        """Whether the result can be known without working it out."""
        return max(self.a, self.b) < 20

    @property
    def steps(self) -> str:
        return steps(self.a, self.sign, self.b)


def make_arithmetic(dice: Dice) -> Case:
    drawn = draw_sum(dice)
    thinking = dice.held_out or not (drawn.small and dice.chance(0.3))
    answer = assistant(f"The answer is {drawn.result}.", drawn.steps if thinking else None)
    return Case(
        "arithmetic", (user(drawn.question),), answer, Check("number", drawn.result), thinking=thinking
    )


def draw_sum(dice: Dice) -> Sum:
    sign = dice.choice("+-*" if dice.chance(0.75) else "+-")
    a, b = _operands(dice, sign)
    # More stories in training: it is harder to see which operation a story needs than to compute.
    story = dice.chance(0.4 if dice.held_out else 0.7)
    templates = (_STORIES if story else _DIRECT)[sign]
    template = wording(dice, templates, _FRAMES[sign] + ("_story" if story else ""))
    question = asked(dice, template.format(a=a, b=b, n=dice.person(), m=dice.person(), t=dice.thing()))
    return Sum(a, sign, b, question)


def _operands(dice: Dice, sign: str) -> tuple[int, int]:
    if sign == "*":
        a = dice.number(2) if dice.held_out or dice.chance(0.4) else dice.number(3)
        return a, dice.randint(1, 9)
    a = dice.number(3)
    b = dice.number(3)
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def steps(a: int, sign: str, b: int) -> str:
    """``a`` and ``b`` in three digits, then a step per digit from the last one: the digits and the
    incoming carry, and after the equals sign the resulting digit and the outgoing carry.
    """
    text, carry = f"{a:03}{sign}{b:03}", 0
    worked = []
    for place in range(3):
        x = a // 10**place % 10
        y = b if sign == "*" else b // 10**place % 10
        if sign == "-":
            total = x - y - carry
            digit, after = total % 10, int(total < 0)
        else:
            total = x * y + carry if sign == "*" else x + y + carry
            digit, after = total % 10, total // 10
        worked.append(f"{x}{sign}{y}{'-' if sign == '-' else '+'}{carry}={digit}{after}")
        carry = after
    return text + ":" + ";".join(worked)
