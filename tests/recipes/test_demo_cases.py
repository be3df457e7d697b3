"""The generator of the demo's cases: right answers, a clean split, and the template's format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lockstep.launch.recipe.file import find_recipe
from lockstep.recipes.demo.cases.arithmetic import steps
from lockstep.recipes.demo.cases.case import Case, Check
from lockstep.recipes.demo.cases.frames import frame
from lockstep.recipes.demo.cases.mixture import TAUGHT, draw_case, draw_held_out, value_words
from lockstep.recipes.demo.cases.phrases import Sides, phrases, sides
from lockstep.recipes.demo.cases.recall import _facts
from lockstep.recipes.demo.cases.sums import OPENING, make_forced_object, make_sum_object
from lockstep.recipes.demo.cases.tools import offer_tools
from lockstep.recipes.demo.cases.words import Dice
from lockstep.recipes.demo.chat import render
from lockstep.recipes.demo.evaluate import request_messages

MODEL = find_recipe("demo").parent / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


SIDES = ("held_out", "final")


def held_out(family: str, count: int = 60, final: bool = False) -> Iterator[Case]:
    dice = Dice("test", held_out=True, final=final)
    return (draw_held_out(dice, family, 400) for _ in range(count))


def calls_of(case: Case) -> list[tuple[str, str]]:
    return [
        (call["function"]["name"], json.dumps(call["function"]["arguments"]))
        for call in case.answer.get("tool_calls", ())
    ]


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("family", TAUGHT)
def test_the_right_answer_passes_and_that_of_another_case_does_not(family: str, final: bool) -> None:
    cases = list(held_out(family, final=final))
    assert all(case.check.passes(case.answer["content"], calls_of(case)) for case in cases)
    wrong = sum(one.check.passes(two.answer["content"], calls_of(two)) for one, two in pairwise(cases))
    assert wrong <= len(cases) // 4  # answers may agree by chance
    assert not any(case.check.passes("", []) for case in cases)


@pytest.mark.parametrize(
    ("kind", "value", "content", "passes"),
    [
        ("number", 12, "The answer is 12.", True),
        ("number", 12, "12 and 13", False),
        ("text", "a, b", " a, b\n", True),
        ("text", "a, b", "a,b", False),
        ("json", {"a": 1}, '{"a":  1}', True),
        ("json", {"a": 1}, '{"a": "1"}', False),
        ("json", {"a": 1}, "{", False),
        ("contains", ["7"], "It is 7.", True),
        ("contains", ["7"], "It is 17.", False),
        ("contains", ["Red", "blue"], "red and Blue", True),
    ],
)
def test_checks_of_answers(kind: str, value: object, content: str, passes: bool) -> None:
    assert Check(kind, value).passes(content, []) is passes  # type: ignore[arg-type]
    assert not Check(kind, value).passes(content, [("f", "{}")])  # type: ignore[arg-type]


def test_a_call_is_judged_by_name_and_arguments() -> None:
    check = Check("call", {"name": "f", "arguments": {"a": 1, "b": "x"}})
    assert check.passes("", [("f", '{"b": "x", "a": 1}')])
    for calls in (
        [],
        [("g", '{"b": "x", "a": 1}')],
        [("f", '{"a": 1}')],
        [("f", "{")],
        [("f", '{"b": "x", "a": 1}')] * 2,
    ):
        assert not check.passes("", calls)


@pytest.mark.parametrize(
    ("a", "sign", "b"),
    [(999, "+", 999), (5, "+", 17), (500, "-", 1), (100, "-", 100), (99, "*", 9), (10, "*", 1)],
)
def test_the_steps_lead_to_the_result(a: int, sign: str, b: int) -> None:
    digits = [
        re.fullmatch(r"(\d)[-+*](\d)[-+](\d)=(\d)(\d)", step)
        for step in steps(a, sign, b).split(":")[1].split(";")
    ]
    number = sum(int(found[4]) * 10**place for place, found in enumerate(digits) if found)
    last = digits[-1]
    assert last is not None
    assert number + 1000 * int(last[5]) == {"+": a + b, "-": a - b, "*": a * b}[sign]


def test_the_same_seed_gives_the_same_cases() -> None:
    assert draw_case(Dice(3, held_out=False)) == draw_case(Dice(3, held_out=False))
    assert draw_case(Dice(3, held_out=False)) != draw_case(Dice(4, held_out=False))


SECTIONS = ["words", "arithmetic", "lists", "extraction", "sums", "tools", "recall", "about", "mixture"]


def keys_of(texts: dict[str, Any] | list[list[str]]) -> list[tuple[str | int, ...]]:
    """The keys of a section's lists."""
    if isinstance(texts, list):
        return [(number,) for number in range(len(texts))]
    return (
        [(name, key) for name in texts for key in texts[name]]
        if "direct" in texts
        else [(name,) for name in texts]
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_no_template_serves_two_sides(section: str) -> None:
    last = phrases(section, "final")
    assert keys_of(last) == keys_of(phrases(section, "held_out"))
    for keys in keys_of(last):
        lists = sides(section, *keys)
        assert min(map(len, (lists.training, lists.held_out, lists.final))) > 1, keys
        training, held_out, final = (
            {re.sub(r"[^\w+*=-]+", " ", text).strip().lower() for text in texts}
            for texts in (lists.training, lists.held_out, lists.final)
        )
        assert not (training & held_out or training & final or held_out & final), keys


@pytest.mark.parametrize("side", ["training", *SIDES])
def test_templates_have_a_place_for_every_value(side: str) -> None:
    """A template that lacks a placeholder, or has it twice, would make a case that has no
    answer.
    """
    once = {"direct": "ab", "stories": "ab", "clauses": "fv", "given": "fv", "requests": "t"}
    once |= dict.fromkeys(("up", "down", "names", "back"), "l")
    once |= {"tell_mine": "fv", "tell": "nfv", "ask_mine": "f", "ask": "nf"}
    once |= {"orders": ""}
    for section in SECTIONS[1:-2]:
        once["requests"] = "q" if section == "sums" else "t"
        for keys in keys_of(phrases(section, "final")):
            for text in getattr(sides(section, *keys), side):
                places = re.findall(r"{(.*?)}", text)
                assert all(places.count(each) == 1 for each in once.get(str(keys[0]), "")), text
                schemas = places.count("k") + places.count("s")
                assert keys[0] not in ("requests", "orders") or schemas == 1, text
                if keys[0] in ("bare", "filled"):
                    assert [each.lower() for each in places].count("v") == 1 == places.count("n"), text
                assert (keys[0] == "filled") == ("p" in places), text


def templates_of(family: str, side: str) -> list[re.Pattern[str]]:
    """Patterns of a family's requests on one side, with the possible values of each placeholder."""
    name = r"\w+" if family == "tool call" else r"[A-Z]\w+"
    values = {"a": r"\d+", "b": r"\d+", "n": name, "m": r"[A-Z]\w+"}
    values |= {"f": r"\w+( (?!again)\w+)?", "l": "[\\w, -]+"}
    names = {
        "arithmetic": ("direct", "stories"),
        "lists": ("up", "down", "names", "back"),
        "extraction": ("requests",),
        "recall": ("ask", "ask_mine"),
        "tool call": ("filled", "bare"),
    }[family]
    section = "tools" if family == "tool call" else family
    keys: tuple[tuple[str, ...], ...] = tuple((sign,) for sign in "+-*") if family == "arithmetic" else ((),)
    found = [
        template for name in names for key in keys for template in getattr(sides(section, name, *key), side)
    ]
    escaped = [re.escape(template.rstrip(".")) for template in found]
    return [
        re.compile(re.sub(r"\\{(\w)\\}", lambda place: values.get(place[1], ".+"), each) + r"\.?")
        for each in escaped
    ]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["arithmetic", "lists", "extraction", "recall"])
def test_training_never_asks_in_a_phrase_that_is_held_out(family: str, side: str) -> None:
    patterns = templates_of(family, side)
    dice = Dice("phrases", held_out=False)
    said = [TAUGHT[family](dice).messages[-1]["content"] for _ in range(1500)]
    assert not [(text, each.pattern) for text in said for each in patterns if each.fullmatch(text)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["arithmetic", "lists", "extraction", "recall", "tool call"])
def test_each_side_asks_in_its_own_phrases(family: str, side: str) -> None:
    patterns = templates_of(family, side)
    asked = [case.messages[-1]["content"] for case in held_out(family, 200, final=side == "final")]
    assert all(any(each.search(text) for each in patterns) for text in asked)
    assert sum(any(each.search(text) for text in asked) for each in patterns) > 0.7 * len(patterns)


@pytest.mark.parametrize(
    ("grammar", "part", "lists"),
    [
        ("opening", "start", sides("words", "openings")),
        ("given", "start", sides("tools", "given")),
        ("command", "start", sides("tools", "filled")),
        ("command", "bare", sides("tools", "bare")),
        ("clause", "start", sides("extraction", "clauses")),
        ("request", "start", sides("extraction", "requests")),
    ],
)
def test_phrases_from_parts_are_never_held_out(grammar: str, part: str, lists: Sides) -> None:
    dice = Dice("parts", held_out=False)
    unseen = lists.unseen - set(lists.training)
    assert unseen
    said = {
        frame(dice, grammar, lists.unseen, part, capital=grammar in ("command", "request", "opening"))
        for _ in range(3000)
    }
    assert len(said) > 1000
    assert not said & unseen


def test_training_never_asks_about_lockstep_in_held_out_phrases() -> None:
    dice = Dice("about", held_out=False)
    asked = {TAUGHT["about"](dice).messages[-1]["content"].rstrip(".?!") for _ in range(4000)}
    unseen = {each.rstrip(".?!") for side in SIDES for asked in phrases("about", side) for each in asked}
    assert not asked & unseen


def test_earlier_answers_that_are_learned_had_no_reasoning() -> None:
    """The template drops the reasoning of earlier answers. A model that learned such answers would
    stop reasoning.
    """
    dice = Dice("earlier", held_out=False)
    learned = [message for _ in range(800) for message in draw_case(dice).messages if "learn" in message]
    assert len(learned) > 300
    assert {"tool_calls" in message for message in learned} == {True, False}
    assert not any("reasoning_content" in message for message in learned)


def test_lists_are_worked_out_from_the_given_items() -> None:
    for case in held_out("lists"):
        given, result = case.answer["reasoning_content"].split(": ")
        if "=" in given:
            keys = dict(each.split("=") for each in given.split())
        else:
            keys = {f"{int(each):02}": each for each in given.split()}
        looked_up = [keys[each.split("=")[0]] for each in result.split()]
        answer = re.split(", |[ -]", case.answer["content"])
        assert [str(int(each)) if each.isdigit() else each for each in looked_up] == answer


def test_training_never_names_a_held_out_tool_or_field() -> None:
    dice = Dice("test", held_out=False)
    cases = [draw_case(dice) for _ in range(600)]
    offered = {tool["function"]["name"].split("_")[1] for case in cases for tool in case.tools}
    assert not offered & sides("tools", "nouns").unseen
    asked = {key for case in cases if case.check.kind == "json" for key in case.check.value}
    assert len(asked) > 40
    assert not asked & {pair.split(":")[0] for pair in sides("extraction", "told").unseen}


@pytest.mark.parametrize("side", SIDES)
def test_held_out_schemas_have_a_field_that_training_lacks(side: str) -> None:
    unseen = {pair.split(":")[0] for pair in getattr(sides("extraction", "told"), side)}
    assert all(set(case.check.value) & unseen for case in held_out("extraction", final=side == "final"))


def test_tools_of_a_training_case_share_parameters() -> None:
    """So a call's parameters have to be read from its tool."""
    dice = Dice("shared", held_out=False)
    unseen = {pair.split(":")[0] for pair in sides("tools", "parameters").unseen}
    sharing = 0
    for _ in range(300):
        names = [name for tool in offer_tools(dice) for name, _ in tool.parameters]
        sharing += len(set(names)) < len(names)
        assert not set(names) & unseen
    assert sharing > 100


def test_training_tells_the_same_attribute_of_several_people() -> None:
    """So the owner has to be matched. Names also share words, so that the whole name has to be
    matched.
    """
    dice = Dice("alike", held_out=False)
    same = sharing = 0
    for _ in range(200):
        facts = _facts(dice, 7)
        names = [name for _, name, _ in facts]
        same += len(set(names)) < len(names)
        words = [word for name in set(names) for word in name.split()]
        sharing += len(set(words)) < len(words)
        assert len({(owner, name) for owner, name, _ in facts}) == len(facts)
        assert not set(names) & {pair.split(":")[0] for pair in sides("recall", "attributes").unseen}
    assert min(same, sharing) > 40


def test_people_of_the_two_sides_differ() -> None:
    seen, unseen = (
        {dice.person() for _ in range(500)} for dice in (Dice(1, held_out=False), Dice(1, held_out=True))
    )
    assert not seen & unseen


@pytest.mark.parametrize("family", TAUGHT)
def test_training_text_equals_the_template_output(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    dice = Dice("template", held_out=False)
    for _ in range(20):
        case = TAUGHT[family](dice)
        pieces = render(case)
        prompt = tokenizer.apply_chat_template(
            [{key: value for key, value in message.items() if key != "learn"} for message in case.messages],
            tools=list(case.tools) or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=case.thinking,
        )
        assert prompt == "".join(piece.text for piece in pieces[:-1])
        assert pieces[-1].answer
        assert pieces[-1].text.endswith("<|end|>")
        whole = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False)["input_ids"]
        assert whole == [
            token
            for piece in pieces
            for token in tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        ]


def test_the_object_that_a_grammar_begins_is_no_answer_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Else the model would begin objects that nobody has asked for."""
    dice = Dice("forced", held_out=False)
    givens = set()
    for _ in range(100):
        case = make_forced_object(dice)
        pieces = render(case)
        assert [piece.answer for piece in pieces[-3:]] == [True, False, True]
        given, rest = pieces[-2], pieces[-1]
        givens.add(given.text)
        assert given.given and not given.answer and rest.answer
        assert given.text + rest.text == case.answer["content"] + "<|end|>"
        assert str(list(case.check.value.values())[-1]) in rest.text
        whole = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False)["input_ids"]
        parts = (tokenizer(piece.text, add_special_tokens=False)["input_ids"] for piece in pieces)
        assert whole == [token for part in parts for token in part]
    assert OPENING in givens
    assert len(givens) > 20


@pytest.mark.parametrize("side", ["training", *SIDES])
def test_objects_hold_the_result_and_the_numbers_under_the_keys_asked_for(side: str) -> None:
    dice = Dice("objects", held_out=side != "training", final=side == "final")
    shapes = set()
    for _ in range(300):
        case = make_sum_object(dice)
        worked = re.match(r"(\d+)([-+*])(\d+):", case.answer.get("reasoning_content", ""))
        values = [int(value) for value in case.check.value.values()]
        if worked:
            a, b = int(worked[1]), int(worked[3])
            result = {"+": a + b, "-": a - b, "*": a * b}[worked[2]]
            assert values in ([result], [result, a, b], [a, b, result])
        said = " ".join(message["content"] for message in case.messages)
        assert all(key in said for key in case.check.value)
        shapes.add((len(values), case.messages[0]["role"], '": "' in case.answer["content"]))
    assert len(shapes) > 4


def test_requests_carry_arguments_as_text() -> None:
    for case in held_out("tool answer", 5):
        called = next(message for message in request_messages(case) if message.get("tool_calls"))
        [call] = called["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert isinstance(case.messages[-2]["tool_calls"][0]["function"]["arguments"], dict)


def test_a_value_has_the_same_tokens_wherever_it_stands(tokenizer: PreTrainedTokenizerBase) -> None:
    dice = Dice("copy", held_out=True)
    drawn = [draw() for draw in (dice.person, dice.coined) for _ in range(20)]
    for word in [*sorted(value_words())[::7], *drawn]:
        tokens = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (word, f"the {word}.", f'{{"a": "{word}"}}', f"get_{word}(")
        ]
        length = len(tokens[0])
        for found in tokens:
            assert any(found[i : i + length] == tokens[0] for i in range(len(found))), word
