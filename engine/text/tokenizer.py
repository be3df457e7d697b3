"""Text to tokens and back: the model's tokenizer, its chat template, and the pieces of text a token
stands for.

``tokenizer.json`` is loaded as it is on disk (the class named in tokenizer_config.json may rebuild
parts of it). Encoding and rendering are for threads: nothing here changes after loading but caches
of pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from ..frontend.api.errors import bad_request
from . import tiktoken_file
from .detokenizer import ByteDetokenizer, BytePieces, Detokenizer, WindowDetokenizer

PROMPT_TAIL = 6
RESERVED_KWARGS = (
    "tokenize",
    "chat_template",
    "conversation",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
)


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


class Codec:
    """The tokenizer of a model directory. Raises ValueError where it cannot be loaded."""

    def __init__(self, model_path: Path) -> None:
        try:
            self._tokenizer, decoder = _load(model_path)
        except Exception as error:
            raise ValueError(
                f"model.path: the tokenizer of {model_path} cannot be loaded: {error}"
            ) from error
        self._backend: Any = self._tokenizer.backend_tokenizer
        self.special_ids = frozenset(
            id for id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._pieces = BytePieces(self._backend.id_to_token) if _is_byte_level(decoder) else None
        self._visible: dict[frozenset[int], BytePieces] = {}  # by the ids that are hidden

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template; of several by name, all of them."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. The batch call without offsets is the one that holds the interpreter lock for
        milliseconds only.
        """
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, /, **kwargs: Any
    ) -> str:
        """The prompt text of a conversation. Raises ApiError where there is no template or it
        refuses the messages.
        """
        if self.chat_template is None:
            raise bad_request("This model has no chat template: use /v1/completions", "messages")
        for name in RESERVED_KWARGS:
            if name in kwargs:
                raise bad_request(f"chat_template_kwargs.{name} is not allowed", "chat_template_kwargs")
        options = {**self._tokenizer.special_tokens_map, **kwargs}
        try:
            # not apply_chat_template, which drops keys that are None, while templates ask whether
            # content is none
            template = self._tokenizer.get_chat_template(tools=tools)
            text: str = render_jinja_template(
                [messages], tools=[*tools] if tools else None, chat_template=template, **options
            )[0][0]
        except Exception as error:  # a template raises what it likes: jinja errors, TypeError, ValueError
            raise bad_request(
                f"The chat template refused the messages: {str(error)[:300]}", "messages"
            ) from error
        return text

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def ids_of(self, names: Iterable[str]) -> frozenset[int]:
        """The ids of those of ``names`` that are tokens."""
        ids = (self._backend.token_to_id(name) for name in names)
        return frozenset(id for id in ids if id is not None)

    def detokenizer(
        self, skip_special_tokens: bool, prompt: list[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A fresh incremental detokeniser for what follows ``prompt`` (its last tokens decide about
        leading spaces).

        ``shown`` are special ids that are not skipped.
        """
        hidden = self.special_ids - shown if skip_special_tokens else frozenset()
        if self._pieces is None:
            return WindowDetokenizer(self._backend.decode, hidden, prompt[-PROMPT_TAIL:])
        if hidden not in self._visible:
            self._visible[hidden] = BytePieces(self._backend.id_to_token, hidden)
        return ByteDetokenizer(self._visible[hidden])

    def piece(self, token: int) -> bytes:
        """The bytes one token stands for; of a tokenizer that is not byte-level, its text."""
        if self._pieces is not None:
            return self._pieces[token]
        return self.decode([token], skip_special_tokens=False).encode()

    def token_name(self, token: int) -> str:
        """The vocabulary entry of ``token`` as it is written in tokenizer.json."""
        name: str | None = self._backend.id_to_token(token)
        return name or ""

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

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


def _load(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The tokenizer and the decoder of its file."""
    file = folder / "tokenizer.json"
    if file.exists():
        return PreTrainedTokenizerFast.from_pretrained(str(folder)), msgspec.json.decode(
            file.read_bytes(), type=_TokenizerFile
        ).decoder
    if (folder / tiktoken_file.FILE).exists():
        return tiktoken_file.load_tokenizer(folder), tiktoken_file.DECODER
    raise ValueError(f"neither tokenizer.json nor {tiktoken_file.FILE} is there")


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding is the concatenation of each token's bytes (byte-level BPE: Qwen, DeepSeek,
    Llama 3, GPT-2).
    """
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders", [])
        return len(parts) == 1 and parts[0].get("type") == "ByteLevel"
    return decoder.get("type") == "ByteLevel"
