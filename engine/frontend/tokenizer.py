"""Text to tokens and back: the model's tokenizer, its chat template, and the pieces of text a token stands for.

``tokenizer.json`` is loaded as it is on disk (the class named in tokenizer_config.json may rebuild parts of it). Encoding
and rendering are for threads: nothing here changes after loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerFast

from .detokenizer import ByteDetokenizer, BytePieces, Detokenizer, WindowDetokenizer
from .errors import bad_request

PROMPT_TAIL = 6
RESERVED_KWARGS = ("tokenize", "chat_template", "conversation", "return_dict", "return_tensors", "padding", "truncation", "max_length")


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


class Codec:
    """The tokenizer of a model directory. Raises ValueError where it cannot be loaded."""

    def __init__(self, model_path: Path) -> None:
        file = model_path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"model.path: {model_path} has no tokenizer.json; a fast (tokenizers) tokenizer is needed")
        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(model_path))
            decoder = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile).decoder
        except Exception as error:
            raise ValueError(f"model.path: the tokenizer of {model_path} cannot be loaded: {error}") from error
        self._backend: Any = self._tokenizer.backend_tokenizer
        self.special_ids = frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)
        self._pieces = self._visible = None
        if _is_byte_level(decoder):
            self._pieces = BytePieces(self._backend.id_to_token)
            self._visible = BytePieces(self._backend.id_to_token, hidden=self.special_ids)

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. The batch call without offsets is the one that holds the interpreter lock for milliseconds only."""
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **kwargs: Any) -> str:
        """The prompt text of a conversation. Raises ApiError where there is no template or it refuses the messages."""
        if not self.has_chat_template:
            raise bad_request("This model has no chat template: use /v1/completions", "messages")
        for name in RESERVED_KWARGS:
            if name in kwargs:
                raise bad_request(f"chat_template_kwargs.{name} is not allowed", "chat_template_kwargs")
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
        except Exception as error:  # a template raises what it likes: jinja errors, TypeError, ValueError
            raise bad_request(f"The chat template refused the messages: {str(error)[:300]}", "messages") from error
        return text

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool, prompt: list[int]) -> Detokenizer:
        """A fresh incremental detokeniser for what follows ``prompt`` (its last tokens decide about leading spaces)."""
        if self._pieces is None or self._visible is None:
            return WindowDetokenizer(self._backend.decode, skip_special_tokens, prompt[-PROMPT_TAIL:])
        return ByteDetokenizer(self._visible if skip_special_tokens else self._pieces)

    def piece(self, token: int) -> bytes:
        """The bytes one token stands for; of a tokenizer that is not byte-level, its text."""
        if self._pieces is not None:
            return self._pieces[token]
        return self.decode([token], skip_special_tokens=False).encode()

    def token_name(self, token: int) -> str:
        """The vocabulary entry of ``token`` as it is written in tokenizer.json."""
        name: str | None = self._backend.id_to_token(token)
        return name or ""

    def describe(self) -> dict[str, Any]:
        """What /tokenizer_info shows."""
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(),
            "special_tokens": self._tokenizer.special_tokens_map,
            "special_ids": sorted(self.special_ids),
            "eos_token_id": self.eos_id,
            "byte_level": self._pieces is not None,
            "chat_template": self._tokenizer.chat_template,
        }


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding is the concatenation of each token's bytes (byte-level BPE: Qwen, DeepSeek, Llama 3, GPT-2)."""
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders", [])
        return len(parts) == 1 and parts[0].get("type") == "ByteLevel"
    return decoder.get("type") == "ByteLevel"
