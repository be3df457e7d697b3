"""Trials of grammars: those that a rank would give up on are refused, with the limit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.frontend.grammars.trial import Trial
from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tiny_tokenizer import IM_END, VOCAB_SIZE, write_model


@cache
def trial(folder: Path) -> Trial:
    vocabulary = load_vocabulary(write_model(folder), VOCAB_SIZE, (IM_END,))
    assert vocabulary is not None
    return Trial(vocabulary)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"field_{n}": {"type": "integer"} for n in range(count)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        optional(600),
        {"type": "array", "items": {"type": "string"}, "minItems": 1000},
        {"type": "string", "minLength": 100_000},
        {"type": "string", "pattern": "^([a-z]{1,50} ?){1,500}$"},
        {"const": "東京 🙂 naïve"},
    ],
)
def test_grammars_that_can_be_followed(folder: Path, schema: dict[str, Any]) -> None:
    assert trial(folder).fault("start: %json " + json.dumps(schema)) == ""


@pytest.mark.parametrize(
    ("grammar", "fault"),
    [
        ("start: %json " + json.dumps(optional(2000)), "too many choices at one place; the limit is 4000"),
        ("start: %json false", "schema is false"),
        ("start: /[^\\s\\S]/", "it allows no text at all"),
        ("start: nothing", "nothing"),
    ],
)
def test_faults(folder: Path, grammar: str, fault: str) -> None:
    assert fault in trial(folder).fault(grammar)
