"""Grammars on a rank, without a model: what is staged, followed, rebuilt, refused and forgotten."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer
from numpy.typing import NDArray

from lockstep.engine.protocol.arrays import Int32, Int64
from lockstep.engine.rank.grammars import Grammars
from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tiny_tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_tokenizer, write_model

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["東京", "dog"]}},
    "required": ["a", "b"],
}
GRAMMAR = "start: %json " + json.dumps(
    {**SCHEMA, "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
)
STOPS = np.array([END_OF_TEXT, IM_END], np.int32)
NOTHING = np.zeros(0, np.int32)


def slots(*numbers: int) -> Int64:
    return np.array(numbers, np.int64)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    loaded = load_vocabulary(write_model(tmp_path_factory.mktemp("model")), VOCAB_SIZE, (IM_END,))
    assert loaded is not None
    return loaded


@pytest.fixture
def grammars(vocabulary: LLTokenizer) -> Iterator[Grammars]:
    made = Grammars(vocabulary)
    yield made
    made.close()


def compiled(grammars: Grammars, count: int = 1) -> list[tuple[int, str]]:
    told: list[tuple[int, str]] = []
    deadline = time.monotonic() + 60
    while len(told) < count:
        assert grammars.compiling
        told += grammars.take_compiled()
        assert time.monotonic() < deadline, f"only {told} after 60 s"
        time.sleep(0.001)
    assert not grammars.compiling
    return told


def admit(
    grammars: Grammars, slot: int, staged: int, emitted: Int32 = NOTHING, grammar: str = GRAMMAR
) -> None:
    grammars.stage(staged, grammar, emitted)
    assert compiled(grammars) == [(staged, "")]
    grammars.admit(slot, staged, STOPS)


def allowed(grammars: Grammars, slot: int) -> NDArray[np.int64]:
    masks = grammars.begin(slots(slot))
    assert masks is not None
    rows, bits = masks.take(slots(slot))
    assert rows.tolist() == [0]
    return np.flatnonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little"))


def draw(grammars: Grammars, slot: int, seed: int, most: int = 200) -> list[int]:
    """Random tokens of what is allowed, up to a stop id."""
    chance, tokens = np.random.default_rng(seed), []
    while not tokens or tokens[-1] not in STOPS:
        tokens.append(int(chance.choice(allowed(grammars, slot))))
        grammars.observe(slots(slot), slots(tokens[-1]))
        assert len(tokens) < most
    return tokens


@pytest.mark.parametrize("seed", range(10))
def test_random_tokens_make_a_valid_object_and_end(grammars: Grammars, seed: int) -> None:
    admit(grammars, 3, 7)
    tokens = draw(grammars, 3, seed)
    value = json.loads(tiny_tokenizer().decode(tokens[:-1], skip_special_tokens=False))
    assert value["b"] in ("東京", "dog")
    assert value["a"] <= 99
    assert grammars.begin(slots(3)) is None, (
        "a sequence that has ended is free: what it still samples is dropped"
    )


def test_a_matcher_is_rebuilt_from_what_was_emitted(grammars: Grammars) -> None:
    admit(grammars, 0, 1)
    tokens = draw(grammars, 0, 5)
    for cut in range(len(tokens)):
        admit(grammars, 1, 10 + 2 * cut)
        grammars.observe(slots(*[1] * cut), slots(*tokens[:cut]))
        admit(grammars, 2, 11 + 2 * cut, np.array(tokens[:cut], np.int32))
        assert allowed(grammars, 2).tolist() == allowed(grammars, 1).tolist()
        assert tokens[cut] in allowed(grammars, 2)


def test_a_checkpoint_without_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert load_vocabulary(tmp_path, VOCAB_SIZE, (IM_END,)) is None


def test_only_rows_with_a_grammar_have_a_mask(grammars: Grammars) -> None:
    assert grammars.begin(slots(0, 1)) is None
    admit(grammars, 1, 1)
    admit(grammars, 4, 2, grammar='start: "dog"')
    masks = grammars.begin(slots(0, 1, 2, 4))
    assert masks is not None
    rows, bits = masks.take(slots(4, 0, 1))
    assert (rows.tolist(), bits.shape) == ([0, 2], (2, -(-VOCAB_SIZE // 32)))
    assert (bits[0] != bits[1]).any()
    assert grammars.begin(slots(0, 2)) is None
    grammars.admit(1, 99, STOPS)
    assert grammars.begin(slots(1)) is None, "a slot's next request has no grammar"


def test_where_the_grammar_may_end_every_stop_id_is_allowed_and_no_other_end(grammars: Grammars) -> None:
    admit(grammars, 0, 1, grammar='start: "dog"?')
    assert set(STOPS.tolist()) < set(allowed(grammars, 0).tolist())
    grammars.stage(2, 'start: "dog"?', NOTHING)
    compiled(grammars)
    grammars.admit(0, 2, np.array([END_OF_TEXT], np.int32))
    assert END_OF_TEXT in allowed(grammars, 0)
    assert IM_END not in allowed(grammars, 0)


def test_a_grammar_that_cannot_be_followed_is_told_and_forgotten(grammars: Grammars) -> None:
    grammars.stage(1, "start: %json false", NOTHING)
    grammars.stage(2, GRAMMAR, np.array([IM_END], np.int32))
    grammars.stage(3, GRAMMAR, NOTHING)
    told = sorted(compiled(grammars, 3))
    assert [staged for staged, _ in told] == [1, 2, 3]
    assert "schema is false" in told[0][1]
    assert "emitted so far do not follow" in told[1][1]
    assert told[2][1] == ""


def test_a_token_outside_the_grammar_is_an_error_that_names_it(grammars: Grammars) -> None:
    admit(grammars, 0, 1)
    admit(grammars, 1, 2)
    token, brace = (tiny_tokenizer().token_to_id(text) for text in "z{")
    errors = grammars.observe(slots(0, 1), slots(token, brace))
    assert list(errors) == [0]
    assert f"token {token} was allowed but does not follow the grammar" in errors[0]
    assert grammars.begin(slots(0)) is None, "the slot is free: the planner drops what it still samples"
    assert grammars.begin(slots(1)) is not None


def test_a_grammar_that_allows_no_token_is_an_error_and_no_end(grammars: Grammars) -> None:
    admit(grammars, 0, 1, grammar='start: "do" /[^\\s\\S]/')
    [token] = allowed(grammars, 0)
    assert grammars.observe(slots(0), slots(token)) == {}
    assert len(allowed(grammars, 0)) > len(STOPS), "any token will do: it is dropped"
    errors = grammars.observe(slots(0), STOPS[:1].astype(np.int64))
    assert "no token follows the grammar here" in errors[0]


def test_unstaged_and_rebased_grammars_are_gone(grammars: Grammars) -> None:
    admit(grammars, 0, 1)
    grammars.stage(5, GRAMMAR, NOTHING)
    grammars.unstage(5)
    assert not grammars.compiling
    grammars.stage(6, GRAMMAR, NOTHING)
    grammars.stage(8, GRAMMAR, NOTHING)
    grammars.rebase(7)
    assert compiled(grammars) == [(8, "")]
    assert grammars.begin(slots(0)) is None
    grammars.admit(0, 6, STOPS)
    assert grammars.begin(slots(0)) is None
    grammars.admit(0, 8, STOPS)
    assert grammars.begin(slots(0)) is not None
