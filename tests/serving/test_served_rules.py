"""Rules about tokens and the prompt's own log-probabilities, of a served model."""

from __future__ import annotations

import random

import pytest

from support.serving.mixed_asks import random_prompt
from support.serving.served import Ask, Body, Served

GREEDY: Body = {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 24}


def test_rules_hold_and_neighbours_do_not_notice(demo: Served) -> None:
    """Whole and streamed, greedy and drawn; a neighbour without rules writes its own text."""
    dice = random.Random(71)
    prompts = [random_prompt(dice, 5, 60) for _ in range(8)]
    free = [demo.ask(prompt=prompt, **GREEDY) for prompt in prompts]
    asks: list[Ask] = []
    for index, (prompt, answer) in enumerate(zip(prompts, free, strict=True)):
        way: Body = {"prompt": prompt, "stream": index % 2 == 1, **GREEDY}
        way |= {"temperature": 1.0, "seed": index} if index % 3 == 0 else {}
        allowed = sorted({*answer.tokens[:3], *range(200, 231)})
        asks += [Ask(way | {"allowed_token_ids": allowed}), Ask({"prompt": prompt, **GREEDY})]
    answers = demo.ok(asks)
    for index, answer in enumerate(answers[::2]):
        assert set(answer.tokens) <= {*free[index].tokens[:3], *range(200, 231)}
        assert len(answer.tokens) == 24
    assert [answer.tokens for answer in answers[1::2]] == [answer.tokens for answer in free]
    demo.assert_clean()


@pytest.mark.parametrize("stream", [False, True])
def test_bad_words_do_not_come(demo: Served, stream: bool) -> None:
    dice = random.Random(72)
    bodies: list[Body] = [{"prompt": random_prompt(dice, 5, 60), **GREEDY} for _ in range(4)]
    texts = [answer.text for answer in demo.ok([Ask(body) for body in bodies])]
    words = [max(text.split(), key=lambda part: (part.isascii(), len(part)))[:12] for text in texts]
    spellings: list[Body] = [
        GREEDY | {"prompt": text, "max_tokens": 1} for word in words for text in (word, f" {word}")
    ]
    spelt = [
        answer.document["choices"][0]["prompt_token_ids"]
        for answer in demo.ok([Ask(body) for body in spellings])
    ]
    asks = [
        Ask(body | {"bad_words": [word], "stream": stream}) for body, word in zip(bodies, words, strict=True)
    ]
    for index, answer in enumerate(demo.ok(asks)):
        for bad in spelt[2 * index : 2 * index + 2]:
            assert bad not in [answer.tokens[at : at + len(bad)] for at in range(len(answer.tokens))]


def test_prompt_logprobs_are_those_of_echo(demo: Served) -> None:
    dice = random.Random(73)
    for length in (1, 2, 300):
        prompt = random_prompt(dice, length, length)
        options: Body = {"prompt": prompt, "prompt_logprobs": 2, **GREEDY, "n": 2}
        answer = demo.ask(**options)
        echoed = demo.ask(prompt=prompt, echo=True, logprobs=0, **GREEDY)
        expected = echoed.document["choices"][0]["logprobs"]["token_logprobs"][:length]
        for choice in answer.document["choices"]:
            shown = choice["prompt_logprobs"]
            own = [
                None if entry is None else entry[str(token)]
                for token, entry in zip(prompt, shown, strict=True)
            ]
            found = [None if entry is None else entry["logprob"] for entry in own]
            assert found[1:] == pytest.approx(expected[1:], abs=1e-3) and found[0] is expected[0] is None
            for entry, entries in zip(own[1:], shown[1:], strict=True):
                better = [other for other in entries.values() if other["logprob"] > entry["logprob"]]
                assert entry["rank"] > len(better) and 2 <= len(entries) <= 3
                assert (entry["rank"] > 2) == (len(entries) == 3)
