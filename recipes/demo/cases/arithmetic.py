"""Addition, subtraction and multiplication. The reasoning section works digit by digit, from the
last to the first.
"""

from __future__ import annotations

from .case import Case, Check, assistant, user
from .frames import asked, wording
from .phrases import sides
from .words import Dice

_DIRECT = {sign: sides("arithmetic", "direct", sign) for sign in "+-*"}
_STORIES = {sign: sides("arithmetic", "stories", sign) for sign in "+-*"}
_FRAMES = {"+": "addition", "-": "subtraction", "*": "multiplication"}


def make_arithmetic(dice: Dice) -> Case:
    sign = dice.choice("+-*" if dice.chance(0.75) else "+-")
    a, b = _operands(dice, sign)
    # More stories in training: it is harder to see which operation a story needs than to compute.
    story = dice.chance(0.4 if dice.held_out else 0.7)
    templates = (_STORIES if story else _DIRECT)[sign]
    template = wording(dice, templates, _FRAMES[sign] + ("_story" if story else ""))
    question = asked(dice, template.format(a=a, b=b, n=dice.person(), m=dice.person(), t=dice.thing()))
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    thinking = dice.held_out or not (max(a, b) < 20 and dice.chance(0.3))
    answer = assistant(f"The answer is {result}.", steps(a, sign, b) if thinking else None)
    return Case("arithmetic", (user(question),), answer, Check("number", result), thinking=thinking)


def _operands(dice: Dice, sign: str) -> tuple[int, int]:
    if sign == "*":
        a = dice.number(2) if dice.held_out or dice.chance(0.4) else dice.number(3)
        return a, dice.randint(1, 9)
    a, b = dice.number(3), dice.number(3)
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def steps(a: int, sign: str, b: int) -> str:
    """``a`` and ``b`` in three digits, then a step per digit from the last one: the digits and the
    incoming carry, and after the equals sign the resulting digit and the outgoing carry.
    """
    text, carry = f"{a:03}{sign}{b:03}", 0
    worked = []
    for place in range(3):
        x, y = a // 10**place % 10, b if sign == "*" else b // 10**place % 10
        if sign == "-":
            total = x - y - carry
            digit, after = total % 10, int(total < 0)
        else:
            total = x * y + carry if sign == "*" else x + y + carry
            digit, after = total % 10, total // 10
        worked.append(f"{x}{sign}{y}{'-' if sign == '-' else '+'}{carry}={digit}{after}")
        carry = after
    return text + ":" + ";".join(worked)
