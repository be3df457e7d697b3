"""The generator of the demo's cases: right answers, an honest split, and the format that the template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lockstep.launch.recipe_file import find_recipe
from lockstep.recipes.demo.cases.arithmetic import steps
from lockstep.recipes.demo.cases.case import Case, Check
from lockstep.recipes.demo.cases.mixture import FAMILIES, draw_case, draw_held_out, value_words
from lockstep.recipes.demo.cases.phrases import phrases
from lockstep.recipes.demo.cases.words import Dice
from lockstep.recipes.demo.chat import render
from lockstep.recipes.demo.evaluate import request_messages

MODEL = find_recipe("demo").parent / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def held_out(family: str, count: int = 60) -> Iterator[Case]:
    dice = Dice("test", held_out=True)
    return (draw_held_out(dice, family, 400) for _ in range(count))


def calls_of(case: Case) -> list[tuple[str, str]]:
    return [(call["function"]["name"], json.dumps(call["function"]["arguments"])) for call in case.answer.get("tool_calls", ())]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_answer_passes_and_that_of_another_case_does_not(family: str) -> None:
    cases = list(held_out(family))
    assert all(case.check.passes(case.answer["content"], calls_of(case)) for case in cases)
    wrong = sum(one.check.passes(two.answer["content"], calls_of(two)) for one, two in pairwise(cases))
    assert wrong <= len(cases) // 4  # answers may agree by chance
    assert not any(case.check.passes("", []) for case in cases)


@pytest.mark.parametrize(("kind", "value", "content", "passes"), [
    ("number", 12, "The answer is 12.", True), ("number", 12, "12 and 13", False),
    ("text", "a, b", " a, b\n", True), ("text", "a, b", "a,b", False),
    ("json", {"a": 1}, '{"a":  1}', True), ("json", {"a": 1}, '{"a": "1"}', False), ("json", {"a": 1}, "{", False),
    ("contains", ["7"], "It is 7.", True), ("contains", ["7"], "It is 17.", False), ("contains", ["Red", "blue"], "red and Blue", True),
])  # fmt: skip
def test_how_answers_are_judged(kind: str, value: object, content: str, passes: bool) -> None:
    assert Check(kind, value).passes(content, []) is passes  # type: ignore[arg-type]
    assert not Check(kind, value).passes(content, [("f", "{}")])  # type: ignore[arg-type]


def test_a_call_is_judged_by_name_and_arguments() -> None:
    check = Check("call", {"name": "f", "arguments": {"a": 1, "b": "x"}})
    assert check.passes("", [("f", '{"b": "x", "a": 1}')])
    for calls in ([], [("g", '{"b": "x", "a": 1}')], [("f", '{"a": 1}')], [("f", "{")], [("f", '{"b": "x", "a": 1}')] * 2):
        assert not check.passes("", calls)


@pytest.mark.parametrize(("a", "sign", "b"), [(999, "+", 999), (5, "+", 17), (500, "-", 1), (100, "-", 100), (99, "*", 9), (10, "*", 1)])
def test_the_steps_lead_to_the_result(a: int, sign: str, b: int) -> None:
    digits = [re.fullmatch(r"(\d)[-+*](\d)[-+](\d)=(\d)(\d)", step) for step in steps(a, sign, b).split(":")[1].split(";")]
    number = sum(int(found[4]) * 10**place for place, found in enumerate(digits) if found)
    last = digits[-1]
    assert last is not None
    assert number + 1000 * int(last[5]) == {"+": a + b, "-": a - b, "*": a * b}[sign]


def test_the_same_seed_gives_the_same_cases() -> None:
    assert draw_case(Dice(3, held_out=False)) == draw_case(Dice(3, held_out=False))
    assert draw_case(Dice(3, held_out=False)) != draw_case(Dice(4, held_out=False))


def test_no_template_serves_both_sides() -> None:
    for section in ("words", "arithmetic", "lists", "extraction", "tools", "recall", "mixture"):
        texts = phrases(section)
        for name, unseen in texts.items():
            if name.endswith("_unseen"):
                for seen, other in pairs_of(texts[name.removesuffix("_unseen")], unseen):
                    assert not set(seen) & set(other), f"{section}.{name}"
    for fact in phrases("about")["facts"]:
        assert not set(fact["seen"]) & set(fact["unseen"]), fact


def pairs_of(seen: object, unseen: object) -> Iterator[tuple[list[str], list[str]]]:
    if isinstance(seen, dict):
        assert isinstance(unseen, dict)
        for key in seen:
            yield seen[key], unseen[key]
    else:
        assert isinstance(seen, list)
        assert isinstance(unseen, list)
        yield seen, unseen


def unseen_phrases(family: str) -> list[re.Pattern[str]]:
    """Held-out requests of a family; any text stands for a value."""
    texts = phrases(family)
    if family == "arithmetic":
        templates = [each for part in ("direct_unseen", "stories_unseen") for found in texts[part].values() for each in found]
    else:
        names = {"lists": ("up", "down", "names", "back"), "extraction": ("requests",), "recall": ("ask", "ask_mine")}[family]
        templates = [template for name in names for template in texts[f"{name}_unseen"]]
    return [re.compile(re.sub(r"\\{\w\\}", ".+", re.escape(template.rstrip("."))) + r"\.?") for template in templates]


@pytest.mark.parametrize("family", ["arithmetic", "lists", "extraction", "recall"])
def test_training_never_asks_in_a_phrase_that_is_held_out(family: str) -> None:
    patterns = unseen_phrases(family)
    dice = Dice("phrases", held_out=False)
    said = [FAMILIES[family](dice).messages[-1]["content"] for _ in range(1500)]
    assert not [text for text in said if any(each.fullmatch(text) for each in patterns)]
    asked = [case.messages[-1]["content"] for case in held_out(family)]
    assert sum(any(each.search(text) for each in patterns) for text in asked) == len(asked)


def test_earlier_answers_that_are_learned_had_no_reasoning() -> None:
    """The template leaves reasoning of earlier answers out: learned so, answers would come without it."""
    dice = Dice("earlier", held_out=False)
    learned = [message for _ in range(600) for message in draw_case(dice).messages if "learn" in message]
    assert len(learned) > 300
    assert {"tool_calls" in message for message in learned} == {True, False}
    assert not any("reasoning_content" in message for message in learned)


def test_lists_are_worked_out_from_what_was_given() -> None:
    for case in held_out("lists"):
        given, result = case.answer["reasoning_content"].split(": ")
        keys = dict(each.split("=") for each in given.split()) if "=" in given else {f"{int(each):02}": each for each in given.split()}
        looked_up = [keys[each.split("=")[0]] for each in result.split()]
        assert [str(int(each)) if each.isdigit() else each for each in looked_up] == re.split(", |[ -]", case.answer["content"])


def test_training_never_names_a_held_out_tool_or_field() -> None:
    dice = Dice("test", held_out=False)
    cases = [draw_case(dice) for _ in range(600)]
    offered = {tool["function"]["name"].split("_")[1] for case in cases for tool in case.tools}
    assert not offered & set(phrases("tools")["nouns_unseen"])
    asked = {key for case in cases if case.check.kind == "json" for key in case.check.value}
    assert len(asked) > 40
    assert not asked & {pair.split(":")[0] for pair in phrases("extraction")["told_unseen"]}


def test_held_out_schemas_have_a_field_that_training_lacks() -> None:
    unseen = {pair.split(":")[0] for pair in phrases("extraction")["told_unseen"]}
    assert all(set(case.check.value) & unseen for case in held_out("extraction"))


def test_people_of_the_two_sides_differ() -> None:
    seen, unseen = ({dice.person() for _ in range(500)} for dice in (Dice(1, held_out=False), Dice(1, held_out=True)))
    assert not seen & unseen


@pytest.mark.parametrize("family", FAMILIES)
def test_training_reads_what_the_template_writes(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    dice = Dice("template", held_out=False)
    for _ in range(20):
        case = FAMILIES[family](dice)
        pieces = render(case)
        prompt = tokenizer.apply_chat_template(
            [{key: value for key, value in message.items() if key != "learn"} for message in case.messages],
            tools=list(case.tools) or None, tokenize=False, add_generation_prompt=True, enable_thinking=case.thinking,
        )  # fmt: skip
        assert prompt == "".join(piece.text for piece in pieces[:-1])
        assert pieces[-1].answer
        assert pieces[-1].text.endswith("<|end|>")
        whole = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False)["input_ids"]
        assert whole == [token for piece in pieces for token in tokenizer(piece.text, add_special_tokens=False)["input_ids"]]


def test_requests_carry_arguments_as_text() -> None:
    for case in held_out("tool answer", 5):
        [call] = next(message for message in request_messages(case) if message.get("tool_calls"))["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert isinstance(case.messages[-2]["tool_calls"][0]["function"]["arguments"], dict)


def test_a_value_has_the_same_tokens_wherever_it_stands(tokenizer: PreTrainedTokenizerBase) -> None:
    dice = Dice("copy", held_out=True)
    for word in [*sorted(value_words())[::7], *(dice.person() for _ in range(20)), *(dice.coined() for _ in range(20))]:
        tokens = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f"the {word}.", f'{{"a": "{word}"}}', f"get_{word}(")
        ]
        length = len(tokens[0])
        assert all(any(found[i : i + length] == tokens[0] for i in range(len(found))) for found in tokens), word
