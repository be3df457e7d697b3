"""Sampling and stopping of a request. The model's generation_config.json fills in what the client
left open.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ...models.description import description_file, read_description
from ...protocol.message import Sampling
from ..api.schemas import GenerationRequest
from .stops import StopRule
from .token_rules import TokenRules, check_ids

T = TypeVar("T")

SEEDS = 2**63
MIN_TEMPERATURE = 0.01
DEFAULT_TEMPERATURE = 1.0


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """The model's values for fields that the client leaves open; ``eos_ids`` end a sequence."""

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()


def load_defaults(model_path: Path, tokenizer_eos: int | None) -> Defaults:
    """Reads generation_config.json and the eos ids of the model's description. A missing file
    leaves the neutral values. Raises ValueError naming the file.
    """
    generation = _read(model_path / "generation_config.json")
    described = description_file(model_path).exists()
    eos = (
        _ids(generation.get("eos_token_id"))
        | _ids(read_description(model_path).raw("eos_token_id") if described else None)
        | _ids(tokenizer_eos)
    )
    named = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    given = {name: generation[name] for name in named if generation.get(name) is not None}
    try:
        return msgspec.convert({**given, "eos_ids": tuple(sorted(eos))}, Defaults)
    except msgspec.ValidationError as error:
        raise ValueError(f"{model_path / 'generation_config.json'}: {error}") from error


def stop_rule(ask: GenerationRequest, defaults: Defaults, vocab_size: int) -> StopRule:
    """The only place that decides which ids end a generation. Raises ApiError for ids outside the
    vocabulary.
    """
    named = frozenset(ask.stop_token_ids or ())
    check_ids(ask.stop_token_ids or [], vocab_size, "stop_token_ids")
    eos = () if ask.ignore_eos else defaults.eos_ids
    ending = frozenset(token for token in eos if token < vocab_size)
    include = bool(ask.include_stop_str_in_output)
    return StopRule(named | ending, ending - named, tuple(ask.stops), include)


def build_samplings(
    ask: GenerationRequest, defaults: Defaults, vocab_size: int, stop: StopRule, rules: TokenRules
) -> list[Sampling]:
    """One ``Sampling`` per choice: each adds one to the seed. Log-probabilities of the prompt alone
    are asked for once.
    """
    temperature = _pick(ask.temperature, defaults.temperature)
    if temperature != 0:
        temperature = max(temperature, MIN_TEMPERATURE)  # a smaller one overflows float32 logits
    top_k = max(0, _pick(ask.top_k, defaults.top_k))
    ranked = -1 if ask.prompt_logprobs is None else ask.prompt_logprobs
    echoed = ask.num_logprobs if ask.scores_prompt else -1
    first = Sampling(
        temperature=temperature,
        top_p=_pick(ask.top_p, defaults.top_p),
        top_k=0 if top_k >= vocab_size else top_k,
        min_p=_pick(ask.min_p, defaults.min_p),
        presence_penalty=_pick(ask.presence_penalty, 0.0),
        frequency_penalty=_pick(ask.frequency_penalty, 0.0),
        repetition_penalty=_pick(ask.repetition_penalty, defaults.repetition_penalty),
        seed=secrets.randbits(63) if ask.seed is None else ask.seed % SEEDS,
        min_tokens=ask.min_tokens or 0,
        num_logprobs=ask.num_logprobs,
        stop_i32=stop.packed_i32(),
        bias_ids_i32=rules.bias_ids_i32,
        bias_values_f32=rules.bias_values_f32,
        num_prompt_logprobs=max(ranked, echoed),
        allowed_i32=rules.allowed_i32,
        bad_words_i32=rules.bad_words_i32,
        prompt_ranks=ranked >= 0,
    )
    other = msgspec.structs.replace(first, num_prompt_logprobs=echoed, prompt_ranks=False)
    others = range(1, ask.n or 1)
    return [first, *(msgspec.structs.replace(other, seed=(first.seed + more) % SEEDS) for more in others)]


def _pick(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def _ids(value: Any) -> set[int]:
    """The ids of an eos entry in a config file: one id, a list of ids, or nothing."""
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
