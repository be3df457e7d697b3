"""Asks a running server the held-out cases and prints the number of right answers by family.

``python -m lockstep.recipes.demo.evaluate``; ``--save FILE`` keeps every answer for
``lockstep.recipes.demo.compare``. ``--constrained`` asks the cases whose answers have a form (sums,
objects, calls) freely and again under a grammar of that form, and counts those that flip. It adds
sums whose answer has to be an object, asked for or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import openai

from .cases.case import Case, dumps
from .cases.mixture import FAMILIES, TAUGHT
from .cases.sums import UNASKED, unasked_objects
from .compare import flips, report
from .constraints import constraint
from .training.batches import held_out_cases

GOAL = 95.0  # per cent of every family
MAX_TOKENS = 200
LONGEST = 3000
TIMEOUT = 300.0  # seconds for one answer


@dataclass(frozen=True)
class Answered:
    """A case and its answer. ``calls``: name and arguments, as JSON text, of each tool call."""

    family: str
    number: int
    passed: bool
    question: str
    wanted: str
    content: str
    reasoning: str
    calls: list[tuple[str, str]]


class Asker:
    """Sends cases to the server at ``url``, at most ``at_once`` at a time."""

    def __init__(self, url: str, model: str, at_once: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=2, timeout=TIMEOUT)
        self._model = model
        self._room = asyncio.Semaphore(at_once)

    async def ask_all(self, cases: dict[str, list[Case]], constrained: bool = False) -> list[Answered]:
        """Returns the answers in the order of the cases, each confined to its form if asked."""
        asks = [
            self._ask(number, case, constraint(case) if constrained else {})
            for family in cases.values()
            for number, case in enumerate(family)
        ]
        return await asyncio.gather(*asks)

    async def _ask(self, number: int, case: Case, form: dict[str, Any]) -> Answered:
        fields: dict[str, Any] = {"tools": list(case.tools)} if case.tools else {}
        fields |= {name: value for name, value in form.items() if name != "extra_body"}
        extra = {} if case.thinking else {"chat_template_kwargs": {"enable_thinking": False}}
        extra |= form.get("extra_body", {})
        async with self._room:
            reply = await self._client.chat.completions.create(
                model=self._model,
                messages=request_messages(case),
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                extra_body=extra,
                **fields,
            )
        message = reply.choices[0].message
        content = message.content or ""
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return Answered(
            family=case.family,
            number=number,
            passed=case.check.passes(content, calls),
            question=str(case.messages[-1]["content"]),
            wanted=case.answer["content"] or dumps(case.check.value),
            content=content,
            reasoning=str(getattr(message, "reasoning_content", None) or ""),
            calls=calls,
        )


def request_messages(case: Case) -> list[Any]:
    """The messages in the API's form: arguments of calls are JSON text."""
    messages = []
    for message in case.messages:
        plain = {key: value for key, value in message.items() if key != "learn"}
        if "tool_calls" in plain:
            plain["tool_calls"] = [
                call | {"function": _as_text(call["function"])} for call in plain["tool_calls"]
            ]
        messages.append(plain)
    return messages


def _as_text(function: dict[str, Any]) -> dict[str, str]:
    return {"name": function["name"], "arguments": dumps(function["arguments"])}


def table(answers: list[Answered]) -> str:
    """A line per family: right, asked and per cent."""
    lines = []
    for family in dict.fromkeys(answer.family for answer in answers):
        passed = [answer.passed for answer in answers if answer.family == family]
        share = 100 * sum(passed) / len(passed)
        remark = "" if share >= GOAL else f"  below the goal of {GOAL:g} %"
        lines.append(f"{family:12} {sum(passed):5} of {len(passed):5}  {share:5.1f} %{remark}")
    right = sum(answer.passed for answer in answers)
    lines.append(f"{'all':12} {right:5} of {len(answers):5}  {100 * right / len(answers):5.1f} %")
    return "\n".join(lines)


def save(path: Path, answers: list[Answered]) -> None:
    text = json.dumps([asdict(answer) for answer in answers], indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def wrong_answers(answers: list[Answered], family: str, count: int) -> str:
    """The first ``count`` wrong answers of a family, three lines each."""
    wrong = [answer for answer in answers if answer.family == family and not answer.passed]
    return "".join(
        f"{family}: {answer.question!r}\n"
        f"  wanted {answer.wanted!r}\n"
        f"  got    {answer.content!r} {answer.calls} {answer.reasoning!r}\n"
        for answer in wrong[:count]
    )


def compared(asker: Asker, cases: dict[str, list[Case]]) -> str:
    """Asks the cases with a known form, freely and confined to it; plain sums also confined to an
    object. Returns a line per family and side, and the flips.
    """
    formed = {family: [case for case in some if constraint(case)] for family, some in cases.items()}
    formed = {family: some for family, some in formed.items() if some}
    sums = formed["arithmetic"]
    free_cases = formed | {UNASKED: [replace(case, family=UNASKED) for case in sums]}
    confined_cases = formed | {UNASKED: unasked_objects(sums)}

    async def both() -> list[list[Answered]]:
        return [await asker.ask_all(free_cases), await asker.ask_all(confined_cases, constrained=True)]

    free, confined = asyncio.run(both())
    found = flips(*([asdict(answer) for answer in answers] for answers in (free, confined)))
    return f"free\n{table(free)}\n\nconstrained\n{table(confined)}\n\n{report(found)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge the demo model that a server serves.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--cases",
        type=int,
        default=286,
        help="cases per family; 286 make 2,002 in all, enough to see half a point between two runs",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--phrases",
        choices=("held-out", "final"),
        default="held-out",
        help="final: phrases whose answers are counted, not read",
    )
    parser.add_argument(
        "--longest", type=int, default=LONGEST, help="tokens of the longest conversation to recall from"
    )
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--failed", type=int, default=0, help="wrong answers to show per family")
    parser.add_argument("--save", type=Path)
    parser.add_argument(
        "--constrained", action="store_true", help="ask freely and under a grammar, and compare"
    )
    args = parser.parse_args()
    families = TAUGHT if args.constrained else FAMILIES
    cases = held_out_cases(args.cases, args.seed, args.longest, args.phrases == "final", families)
    began = time.monotonic()
    if args.constrained:
        print(compared(Asker(args.url, args.model, args.at_once), cases))
        return
    try:
        answers = asyncio.run(Asker(args.url, args.model, args.at_once).ask_all(cases))
    except openai.APIConnectionError:
        sys.exit(f"{args.url}: no server answers; start one with `make serve`")
    print(table(answers))
    print(f"{len(answers)} cases in {time.monotonic() - began:.0f} s")
    for family in cases:
        print(wrong_answers(answers, family, args.failed), end="")
    if args.save:
        save(args.save, answers)


if __name__ == "__main__":
    main()
