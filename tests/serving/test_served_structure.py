"""Structured output of a served model: random weights always follow the grammar, and other requests
are not disturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from typing import Any

import jsonschema
import pytest

from support.serving.mixed_asks import random_prompt
from support.serving.served import Answer, Ask, Body, Served

ZIP = {"type": "string", "pattern": "^[0-9]{5}$"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": ZIP},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
ITEM = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 10**6},
        "word": {"type": "string", "maxLength": 8},
    },
}
ITEM |= {"required": ["id", "word"], "additionalProperties": False}
LONG = {"type": "array", "items": ITEM, "minItems": 4, "maxItems": 4}


def structured(seed: int, **fields: Any) -> Body:
    draw = random.Random(seed)
    return {
        "prompt": random_prompt(draw, 5, 40),
        "seed": seed,
        "temperature": draw.choice([0.0, 0.7, 1.0, 1.5]),
        "max_tokens": 300,
        **fields,
    }


def free(seed: int) -> Body:
    prompt = random_prompt(random.Random(1000 + seed), 5, 60)
    return {
        "prompt": prompt,
        "seed": seed,
        "temperature": 1.0,
        "top_k": 20,
        "max_tokens": 48,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def test_random_weights_write_valid_json_and_neighbours_do_not_notice(demo: Served) -> None:
    alone = [demo.ask(**free(seed)).tokens for seed in range(8)]
    asks = [Ask(structured(seed, response_format=FORMAT, stream=seed % 2 == 0)) for seed in range(40)]
    mixed = [Ask(free(seed)) for seed in range(8)]
    for index, ask in enumerate(mixed):
        asks.insert(5 * index, ask)
    answers = demo.ok(asks)
    for ask, answer in zip(asks, answers, strict=True):
        if ask in mixed:
            continue
        assert answer.finish == "stop", answer.text
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert [answers[asks.index(ask)].tokens for ask in mixed] == alone
    demo.assert_clean()


def test_the_same_seed_gives_the_same_object_in_any_company(demo: Served) -> None:
    alone = demo.ask(**structured(5, response_format=FORMAT)).text
    answers = demo.ok([Ask(structured(seed, response_format=FORMAT)) for seed in (5, 6, 7, 5)])
    assert [answer.text == alone for answer in answers] == [True, False, False, True]
    three = demo.ask(**structured(5, response_format=FORMAT, n=3, temperature=1.0)).document["choices"]
    assert len({choice["text"] for choice in three}) == 3
    for choice in three:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_choices_and_patterns(demo: Served) -> None:
    for seed in range(6):
        assert demo.ask(**structured(seed, structured_outputs={"choice": ["yes", "no", "不"]})).text in (
            "yes",
            "no",
            "不",
        )
        date = demo.ask(**structured(seed, structured_outputs={"regex": r"20[0-9]{2}-(0[1-9]|1[0-2])"})).text
        assert (len(date), date[:2], date[4]) == (7, "20", "-")


def test_a_pattern_of_everything_leaves_whole_characters(demo: Served) -> None:
    everything: Body = {
        "structured_outputs": {"regex": r"(.|\n)*"},
        "max_tokens": 60,
        "skip_special_tokens": False,
    }
    for answer in demo.ok([Ask(structured(seed, **everything)) for seed in range(6)]):
        assert "\ufffd" not in answer.text.rstrip("\ufffd"), "only the last character may be cut"
        assert "<|" not in answer.text


def test_logprobs_and_penalties_go_with_a_grammar(demo: Served) -> None:
    body = structured(
        3,
        response_format=FORMAT,
        logprobs=2,
        presence_penalty=1.0,
        repetition_penalty=1.3,
        logit_bias={"5": 50},
        top_p=0.9,
        top_k=30,
    )
    answer = demo.ask(**body)
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    [choice] = answer.document["choices"]
    assert "".join(choice["logprobs"]["tokens"]).startswith(answer.text)


def test_a_schema_that_allows_nothing_fails_clearly_and_nothing_is_queued(demo: Served) -> None:
    before = demo.counted("prompt_tokens")
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": False}}},
        {"structured_outputs": {"regex": r"a[^\s\S]"}},
        {"structured_outputs": {"json": {"enum": []}}},
    ):
        [answer] = demo.together([Ask({"prompt": [5, 6], **fields})])
        assert answer.status == 400
        assert answer.document["error"]["param"].startswith(next(iter(fields)))
    assert demo.counted("prompt_tokens") == before
    demo.assert_clean()


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "add_person"}}],
    ids=["required", "named"],
)
def test_a_forced_call_is_a_call_with_valid_arguments(calling: Served, choice: Any) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "description": "Adds.", "parameters": SCHEMA}}
        for name in ("add_person", "add")
    ]
    body: Body = {
        "messages": [{"role": "user", "content": "Add someone"}],
        "tools": tools,
        "tool_choice": choice,
    }
    body |= {
        "temperature": 1.3,
        "max_tokens": 400,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    for answer in calling.ok([Ask(body | {"seed": seed}, "/v1/chat/completions") for seed in range(6)]):
        [shown] = answer.document["choices"]
        [call] = shown["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert shown["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
        assert call["function"]["name"] in (
            ("add_person", "add") if choice == "required" else ("add_person",)
        )


def test_cut_off_streams_free_their_grammars(demo: Served) -> None:
    demo.ok(
        [
            Ask(structured(seed, structured_outputs={"json": LONG}, stream=True), cut_after=3)
            for seed in range(20)
        ]
    )
    demo.assert_clean()
    jsonschema.validate(json.loads(demo.ask(**structured(1, response_format=FORMAT)).text), SCHEMA)


def test_a_rank_killed_in_mid_object_changes_no_text(calling: Served) -> None:
    """The objects are asked for again and again until the rank is killed, so some are being written
    when it is.
    """
    asks = [
        Ask(structured(seed, structured_outputs={"json": LONG}, max_tokens=400, stream=True))
        for seed in range(4)
    ]
    undisturbed = [answer.text for answer in calling.ok(asks)]
    [counted], epoch = calling.counted("generation_tokens"), calling.cluster()["epoch"]
    victim = calling.launcher.pid_of("rank 1")
    rounds: list[list[Answer]] = []
    killed = threading.Event()

    def insist() -> None:
        while not killed.is_set():
            rounds.append(calling.ok(asks))

    sending = threading.Thread(target=insist, daemon=True)
    sending.start()
    calling.wait_until(
        lambda: calling.metrics()["generation_tokens_total"] > counted + 40, "tokens are streaming"
    )
    os.kill(victim, signal.SIGKILL)
    killed.set()
    sending.join(100)
    assert rounds and not sending.is_alive()
    for whole in rounds:
        assert [answer.text for answer in whole] == undisturbed
        for answer in whole:
            jsonschema.validate(json.loads(answer.text), LONG)
            assert answer.finish == "stop"
    calling.wait_until(lambda: calling.cluster()["epoch"] > epoch, "the state of the cluster after the loss")
