"""Prompts of the canary, and the file of stored answers."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

_FORM = 1
_MOST = 4096  # prompts of a file
_PATH = re.compile(r"`\$(?:\.)?(.*)`$")


class AnswersError(ValueError):
    """A file of prompts or answers that cannot be used; the message names the field."""


_Name = Annotated[str, Meta(min_length=1, max_length=60)]
_NumTokens = Annotated[int, Meta(ge=1, le=4096)]


class CanaryPrompt(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A text to be continued (``prompt``) or a conversation (``messages``): one of the two."""

    name: _Name
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    max_tokens: _NumTokens | None = None


class Alternative(msgspec.Struct, array_like=True):
    """An alternative to the chosen token, as text."""

    token: str
    logprob: float


class AnsweredToken(msgspec.Struct, forbid_unknown_fields=True):
    """A token of an answer. ``alternatives``: the likeliest at its place, itself among them."""

    id: int
    token: str
    logprob: float
    alternatives: list[Alternative]


class CanaryAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """The greedy answer to a prompt. ``prompt_ids``: the prompt as the server tokenised it."""

    asked: CanaryPrompt
    prompt_ids: list[int]
    tokens: list[AnsweredToken]


class AnswersFile(msgspec.Struct, forbid_unknown_fields=True):
    """Answers of one server. ``version``: the server's. ``form``: version of this format."""

    form: int
    model: str
    version: str
    max_tokens: _NumTokens
    answers: Annotated[list[CanaryAnswer], Meta(min_length=1, max_length=_MOST)]


def default_prompts() -> list[CanaryPrompt]:
    """The packaged prompts: prose, code, figures, scripts, repetition, and a long one."""
    rivers = "The river rises in the hills, passes two towns and a mill, and reaches the sea. "
    texts = {
        "prose": "The lighthouse keeper climbed the stairs every evening, because",
        "facts": "The capital of France is Paris. The capital of Japan is",
        "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
        "json": '{"name": "Ada", "born": 1815, "fields": ["mathematics", ',
        "sums": "2 + 2 = 4\n3 + 5 = 8\n12 + 7 = 19\n21 + 14 =",
        "list": "1. January\n2. February\n3. March\n4.",
        "german": "Der Zug nach Hamburg fährt um acht Uhr ab, und deshalb",
        "chinese": "今天的天气很好所以我们",
        "symbols": "∀x ∈ A: x² ≥ 0 ⇒ √(x²) = |x| → 😀",
        "repetition": "ab ab ab ab ab ab ab ab",
        "space": " ",
        "long": rivers * 24 + "In short, the river",
    }
    return [CanaryPrompt(name, text) for name, text in texts.items()]


def read_prompts(path: Path) -> list[CanaryPrompt]:
    """Prompts of a file with one JSON object per line. Raises AnswersError."""
    found: list[CanaryPrompt] = []
    decoder = msgspec.json.Decoder(CanaryPrompt)
    for number, line in enumerate(_read("--prompts", path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"--prompts {path}: line {number}"
        try:
            prompt = decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise AnswersError(f"{where}: {_problem(error)}") from None
        if (prompt.prompt is None) == (prompt.messages is None):
            raise AnswersError(f"{where}: should have one of prompt (text) and messages (a conversation)")
        if any(other.name == prompt.name for other in found):
            raise AnswersError(f"{where}: name = {prompt.name!r}: duplicate name; names must be unique")
        found.append(prompt)
    if not 1 <= len(found) <= _MOST:
        raise AnswersError(f"--prompts {path}: holds {len(found)} prompts; should be 1 to {_MOST:,}")
    return found


def read_answers(path: Path) -> AnswersFile:
    """Raises AnswersError."""
    try:
        stored = msgspec.json.decode(_read("--answers", path), type=AnswersFile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AnswersError(f"--answers {path}: {_problem(error)}; should be a file of --save") from None
    if stored.form != _FORM:
        raise AnswersError(
            f"--answers {path}: form = {stored.form}: should be {_FORM}; save the answers anew"
        )
    for index, answer in enumerate(stored.answers):
        if (answer.asked.prompt is None) == (answer.asked.messages is None):
            problem = f"answers[{index}].asked: should have one of prompt and messages"
            raise AnswersError(f"--answers {path}: {problem}")
    return stored


def check_writable(path: Path) -> None:
    """Raises AnswersError if a file cannot be written; called before any request."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise AnswersError(f"--save {path}: cannot be written; should be a file in a folder that exists")


def write_answers(path: Path, model: str, version: str, max_tokens: int, answers: list[CanaryAnswer]) -> None:
    """Writes a file that people can read and ``diff``. Raises AnswersError."""
    for answer in answers:
        if not all(math.isfinite(token.logprob) for token in answer.tokens):
            problem = f"the answer to {answer.asked.name!r} has log-probabilities that are no numbers"
            raise AnswersError(f"--save {path}: {problem}: nothing to compare with")
    made = AnswersFile(_FORM, model, version, max_tokens, answers)
    content = msgspec.json.format(msgspec.json.encode(made), indent=1)
    try:
        path.write_bytes(content + b"\n")
    except OSError as error:
        raise AnswersError(f"--save {path}: cannot be written: {error.strerror}") from None


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnswersError(f"{option} {path}: cannot be read: {error.strerror}") from None


def _problem(error: Exception) -> str:
    """The message of msgspec, its field first."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return f"not JSON: {text.removeprefix('JSON is malformed: ')}"
    if found := _PATH.search(text):
        problem = text[: found.start()].removesuffix(" - at ")
        return f"{found[1]}: {problem}"
    return text
