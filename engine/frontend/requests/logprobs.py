"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ...protocol.frontends import HandleLogprobs
from ...text.tokenizer import Codec
from .places import Places

LOWEST = -9999.0  # JSON has no infinity
TEXT_FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chat_logprobs(
    codec: Codec, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], num_top: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of ``tokens`` in a chat completion."""
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        top = [_named(codec, other, value) for other, value in top_values(entry, num_top)]
        content.append({**_named(codec, token, chosen_value(entry)), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(
    codec: Codec,
    tokens: Sequence[int],
    entries: Sequence[HandleLogprobs | None],
    num_top: int,
    places: Places,
) -> dict[str, Any]:
    """``choices[].logprobs`` of ``tokens`` in a text completion, which ``places`` follows.

    ``top_logprobs`` name candidates by their text: the chosen one always, another only if no better
    one has the same text; otherwise it is named ``token_id:`` and its id.
    """
    shown: dict[str, list[Any]] = {name: [] for name in TEXT_FIELDS}
    for token, entry in zip(tokens, entries, strict=True):
        opening = places.opening
        text = _text(codec, token, opening)
        top = {text: chosen_value(entry)}
        for other, value in top_values(entry, num_top):
            if other != token:
                name = _text(codec, other, opening)
                top[name if name not in top else f"token_id:{other}"] = value
        shown["tokens"].append(text)
        shown["token_logprobs"].append(chosen_value(entry))
        shown["top_logprobs"].append(top)
        shown["text_offset"].append(places.take(token))
    return shown


def _named(codec: Codec, token: int, value: float) -> dict[str, Any]:
    piece = codec.piece(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": value, "bytes": list(piece)}


def _text(codec: Codec, token: int, opening: bool) -> str:
    return codec.piece(token, opening).decode("utf-8", "replace")


def chosen_value(entry: HandleLogprobs | None) -> float:
    """The log-probability of the entry's own token."""
    return LOWEST if entry is None else _finite(entry.chosen)


def top_values(entry: HandleLogprobs | None, num_top: int) -> Iterator[tuple[int, float]]:
    """The most likely tokens, most likely first, with their values."""
    if entry is not None:
        ids: list[int] = array("i", entry.top_ids_i32).tolist()
        values: list[float] = array("f", entry.top_f32).tolist()
        yield from ((token, _finite(value)) for token, value in list(zip(ids, values, strict=True))[:num_top])


def _finite(value: float) -> float:
    return max(value, LOWEST) if not math.isnan(value) else LOWEST
