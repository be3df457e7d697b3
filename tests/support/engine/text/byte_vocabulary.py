"""A vocabulary of the 256 bytes and an end token: every text has one way to be written."""

from __future__ import annotations

from functools import cache

from llguidance import LLTokenizer

END = 256


class _Bytes:
    """The vocabulary in the shape that llguidance takes."""

    is_tokenizer_wrapper = True
    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def byte_vocabulary() -> LLTokenizer:
    return LLTokenizer(_Bytes())  # type: ignore[arg-type]
