"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ...protocol.frontends import HandleLogprobs
from ...text.tokenizer import Codec

LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(
    codec: Codec, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], num_top: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of ``tokens`` in a chat completion."""
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        top = [_named(codec, other, value) for other, value in _top(entry, num_top)]
        content.append({**_named(codec, token, _chosen(entry)), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(
    codec: Codec, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], num_top: int, offset: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of ``tokens`` in a text completion. ``offset`` is the place of the
    first token in the text.
    """
    texts = [_text(codec, token) for token in tokens]
    offsets = []
    tops = []
    for token, text, entry in zip(tokens, texts, entries, strict=True):
        offsets.append(offset)
        offset += len(text)
        top = {text: _chosen(entry)}
        for other, value in _top(entry, num_top):
            if other != token:
                top.setdefault(_text(codec, other), value)
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": [_chosen(entry) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _named(codec: Codec, token: int, value: float) -> dict[str, Any]:
    piece = codec.piece(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": value, "bytes": list(piece)}


def _text(codec: Codec, token: int) -> str:
    return codec.piece(token).decode("utf-8", "replace")


def _chosen(entry: HandleLogprobs | None) -> float:
    return LOWEST if entry is None else _finite(entry.chosen)


def _top(entry: HandleLogprobs | None, num_top: int) -> Iterator[tuple[int, float]]:
    """The most likely tokens, most likely first, with their values."""
    if entry is not None:
        ids: list[int] = array("i", entry.top_ids_i32).tolist()
        values: list[float] = array("f", entry.top_f32).tolist()
        yield from ((token, _finite(value)) for token, value in list(zip(ids, values, strict=True))[:num_top])


def _finite(value: float) -> float:
    return max(value, LOWEST) if not math.isnan(value) else LOWEST
