"""Text to tokens and back: the model's tokenizer and the bytes that each token stands for.

``tokenizer.json`` is loaded as it is on disk (the class named in tokenizer_config.json may rebuild
parts of it). All of it may be called from several threads: only caches change after loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerFast

from . import tiktoken_file
from .detokenizer import ByteDetokenizer, BytePieces, Detokenizer, WindowDetokenizer

PROMPT_TAIL = 6


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
        added = self._backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(id for id, token in added if token.special)
        self._added = {token.content: id for id, token in added}
        self._pieces = BytePieces(self._backend.id_to_token) if _is_byte_level(decoder) else None
        self._visible: dict[frozenset[int], BytePieces] = {}  # by the ids that are hidden

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template; all of them joined where there are several by name."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or None

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The tokens that tokenizer_config.json names, such as ``bos_token``, by that name."""
        tokens: dict[str, Any] = self._tokenizer.special_tokens_map
        return tokens

    def template_for(self, tools: list[dict[str, Any]] | None) -> str:
        """The chat template to use with ``tools``. Raises ValueError where there is none."""
        template: str = self._tokenizer.get_chat_template(tools=tools)
        return template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. The batch call without offsets is used: it holds the interpreter lock for
        milliseconds only, whatever the length of the text.
        """
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def added_id(self, text: str) -> int | None:
        """The token of ``text`` if it is an added one: such a text is never cut into pieces,
        whether the token is special or not.
        """
        return self._added.get(text)

    def ids_of(self, names: Iterable[str]) -> frozenset[int]:
        """Token ids of ``names``; names that are no token are left out."""
        ids = (self._backend.token_to_id(name) for name in names)
        return frozenset(id for id in ids if id is not None)

    def detokenizer(
        self, skip_special_tokens: bool, prompt: list[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A new incremental detokenizer for the tokens after ``prompt``, whose last tokens decide
        about leading spaces. Special ids in ``shown`` are never skipped.
        """
        hidden = self.special_ids - shown if skip_special_tokens else frozenset()
        if self._pieces is None:
            return WindowDetokenizer(self._backend.decode, hidden, prompt[-PROMPT_TAIL:])
        if hidden not in self._visible:
            self._visible[hidden] = BytePieces(self._backend.id_to_token, hidden)
        return ByteDetokenizer(self._visible[hidden])

    def piece(self, token: int) -> bytes:
        """The bytes of one token; its text where the tokenizer is not byte-level."""
        if self._pieces is not None:
            return self._pieces[token]
        return self.decode([token], skip_special_tokens=False).encode()

    def token_name(self, token: int) -> str:
        """The vocabulary entry of ``token`` as tokenizer.json writes it."""
        name: str | None = self._backend.id_to_token(token)
        return name or ""

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def describe(self) -> dict[str, Any]:
        """The document of /tokenizer_info."""
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(),
            "special_tokens": self.special_tokens,
            "special_ids": sorted(self.special_ids),
            "eos_token_id": self.eos_id,
            "byte_level": self._pieces is not None,
            "chat_template": self._tokenizer.chat_template,
        }


def _load(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The transformers tokenizer of a folder, and the decoder that its file describes."""
    file = folder / "tokenizer.json"
    if file.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        described = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
        return tokenizer, described.decoder
    if (folder / tiktoken_file.FILE).exists():
        return tiktoken_file.load_tokenizer(folder), tiktoken_file.DECODER
    raise ValueError(f"neither tokenizer.json nor {tiktoken_file.FILE} is there")


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding joins the bytes of the tokens (byte-level BPE: Qwen, DeepSeek, Llama 3,
    GPT-2).
    """
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders", [])
        return len(parts) == 1 and parts[0].get("type") == "ByteLevel"
    return decoder.get("type") == "ByteLevel"
