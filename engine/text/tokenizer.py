"""Text to tokens and back: the model's tokenizer and the bytes that each token stands for.

``tokenizer.json`` is loaded as it is on disk (the class named in tokenizer_config.json may rebuild
parts of it). All of it may be called from several threads: only caches change after loading.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerFast

from . import byte_tokenizer, tekken_file, tiktoken_file
from .detokenizer import ByteDetokenizer, Detokenizer, OpeningDetokenizer, WindowDetokenizer
from .pieces import BytePieces, DecodedPieces, has_byte_tokens, is_byte_level, joins_pieces, parts_of

_LOG = logging.getLogger(__name__)

PROMPT_TAIL = 6
# Settings of a tokenizer that are places on this host, or itself.
_PLACES = frozenset(
    (
        *("tokenizer_file", "tokenizer_object", "vocab_file", "merges_file", "name_or_path", "backend"),
        *("is_local", "local_files_only"),
    )
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
        added = self._backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(id for id, token in added if token.special)
        self._added = {token.content: id for id, token in added}
        self._parts = parts_of(decoder)
        self._joins = joins_pieces(self._parts)
        self._pieces: dict[frozenset[int], BytePieces | DecodedPieces] = {}  # by the ids that are hidden

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template; all of them joined where there are several by name."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or None

    def adopt_template(self, template: str) -> None:
        """Gives a tokenizer without a chat template this one."""
        self._tokenizer.chat_template = template

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
        """A new incremental detokenizer for the tokens after ``prompt``, which decides about a
        leading space. Special ids in ``shown`` are never skipped.
        """
        hidden = self._hidden(skip_special_tokens) - shown
        if not self._joins:
            return WindowDetokenizer(self._backend.decode, hidden, prompt[-PROMPT_TAIL:])
        pieces = self._pieces_without(hidden)
        if isinstance(pieces, DecodedPieces) and not any(pieces[token] for token in prompt):
            return OpeningDetokenizer(pieces)
        return ByteDetokenizer(pieces)

    def text(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text that a detokenizer makes of all ``ids``. It differs from ``decode`` in bytes
        that are no character.
        """
        if not self._joins:
            return self.decode(ids, skip_special_tokens)
        pieces = self._pieces_without(self._hidden(skip_special_tokens))
        texts = [pieces[token] for token in ids]
        first = next((at for at, piece in enumerate(texts) if piece), None)
        if first is not None:
            texts[first] = pieces.opening(ids[first])
        return b"".join(texts).decode("utf-8", "replace")

    def piece(self, token: int, opening: bool = False) -> bytes:
        """The bytes that a token adds to a text, ``opening`` it or inside it."""
        pieces = self._pieces_without(frozenset())
        return pieces.opening(token) if opening else pieces[token]

    def is_shown(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether a token has text."""
        return bool(self._pieces_without(self._hidden(skip_special_tokens))[token])

    def _hidden(self, skip_special_tokens: bool) -> frozenset[int]:
        return self.special_ids if skip_special_tokens else frozenset()

    def _pieces_without(self, hidden: frozenset[int]) -> BytePieces | DecodedPieces:
        found = self._pieces.get(hidden)
        if found is None:
            if is_byte_level(self._parts):
                found = BytePieces(self._backend.id_to_token, hidden)
            else:
                found = DecodedPieces(self._backend, has_byte_tokens(self._parts), hidden)
            self._pieces[hidden] = found
        return found

    def token_name(self, token: int) -> str:
        """The vocabulary entry of ``token`` as tokenizer.json writes it."""
        name: str | None = self._backend.id_to_token(token)
        return name or ""

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def describe(self) -> dict[str, Any]:
        """The document of /tokenizer_info: the tokenizer's own settings, with tokens as text,
        beside our fields.
        """
        settings: dict[str, Any] = _plain(self._tokenizer.init_kwargs)
        named = {name: token for name, token in settings.items() if name not in _PLACES}
        return {
            "bos_token": None,
            "eos_token": None,
            "unk_token": None,
            "pad_token": None,
            **named,
            **_plain(self.special_tokens),
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(),
            "special_tokens": self.special_tokens,
            "special_ids": sorted(self.special_ids),
            "eos_token_id": self.eos_id,
            "byte_level": is_byte_level(self._parts),
            "chat_template": self._tokenizer.chat_template,
        }


def _plain(value: Any) -> Any:
    """A setting of a tokenizer as JSON has it; a token as its text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, int) and abs(value) >= 2**63:  # "no limit" of model_max_length
        return float(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _load(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The transformers tokenizer of a folder, and the decoder that its file describes."""
    file = folder / "tokenizer.json"
    if file.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        described = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
        return tokenizer, described.decoder
    for other in (tiktoken_file, tekken_file):
        if (folder / other.FILE).exists():
            return other.load_tokenizer(folder), other.DECODER
    if byte_tokenizer.is_described_alone(folder):
        _LOG.warning("%s: holds no tokenizer and no weights: every byte is a token", folder)
        return _byte_level(folder), byte_tokenizer.DECODER
    raise ValueError(f"tokenizer.json, {tiktoken_file.FILE} or {tekken_file.FILE} should be there")


def _byte_level(folder: Path) -> Any:
    built = byte_tokenizer.build_tokenizer(folder)
    ends = built.token_to_id(byte_tokenizer.END) is not None
    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped
    return tokenizer_class(
        tokenizer_object=built,
        chat_template=byte_tokenizer.CHAT_TEMPLATE,
        eos_token=byte_tokenizer.END if ends else None,
    )
