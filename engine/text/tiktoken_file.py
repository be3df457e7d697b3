"""Loads a tokenizer from ``tiktoken.model``, as Kimi-K2 has it: byte sequences with their ranks,
and no tokenizer.json.

The pattern that splits text and the names of unnamed tokens stand in tokenization_kimi.py, Python
code beside the file. They are written down here, so that code is not run
(https://huggingface.co/moonshotai/Kimi-K2-Instruct). That code also cuts text every 400,000
characters, and after 25,000 without a change between space and other characters; it gives such
texts other ids. transformers 5 reads the file itself, but splits text by the pattern of Llama 3.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .pieces import byte_alphabet

FILE = "tiktoken.model"
DECODER = {"type": "ByteLevel"}  # as tokenizer.json would describe it

_KNOWN_CODE = (
    "tokenization_kimi.TikTokenTokenizer",
    "tokenization_moonshot.TikTokenTokenizer",  # the same code in Moonlight
)
_NUM_ADDED = 256
_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}*[\p{{Ll}}{_LETTERS}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}+[\p{{Ll}}{_LETTERS}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class _Added(msgspec.Struct):
    content: str
    special: bool = False


class _Settings(msgspec.Struct):
    """The fields used of tokenizer_config.json. A token is text or an object with ``content``."""

    auto_map: dict[str, Any] = {}
    added_tokens_decoder: dict[int, _Added] = {}
    bos_token: str | _Added | None = None
    eos_token: str | _Added | None = None
    unk_token: str | _Added | None = None
    pad_token: str | _Added | None = None
    chat_template: str | list[dict[str, str]] | None = None


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder. Raises ValueError naming the file at fault."""
    settings = msgspec.json.decode((folder / "tokenizer_config.json").read_bytes(), type=_Settings)
    code = settings.auto_map.get("AutoTokenizer")
    code = code[0] if isinstance(code, list) and code else code
    if code not in _KNOWN_CODE:
        raise ValueError(
            f"tokenizer_config.json: auto_map.AutoTokenizer is {code!r}; supported: {', '.join(_KNOWN_CODE)}"
        )
    backend = _build(_read_ranks(folder / FILE), settings.added_tokens_decoder)
    named = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(settings, name)
        named[name] = token.content if isinstance(token, _Added) else token
        if named[name] is not None and backend.token_to_id(named[name]) is None:
            raise ValueError(
                f"tokenizer_config.json: {name} is {named[name]!r}, which is no token of {FILE} or"
                " added_tokens_decoder"
            )
    template = folder / "chat_template.jinja"
    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped
    return tokenizer_class(
        tokenizer_object=backend,
        chat_template=template.read_text(encoding="utf-8") if template.exists() else settings.chat_template,
        **{name: token for name, token in named.items() if token is not None},
    )


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Byte sequence -> rank, which is the token's id. A line holds the sequence in base64 and the
    rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            sequence, rank = line.split()
            ranks[base64.b64decode(sequence, validate=True)] = int(rank)
        except ValueError:
            text = f"{file.name}: line {number} is not a token in base64 and its rank: {line[:60]!r}"
            raise ValueError(text) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{file.name}: expected ranks from 0 on without gaps and every single byte"
            f" ({len(missing)} bytes are missing)"
        )
    return ranks


def _build(ranks: dict[bytes, int], added: dict[int, _Added]) -> Tokenizer:
    characters = {byte: character for character, byte in byte_alphabet().items()}
    names = {sequence: "".join([characters[byte] for byte in sequence]) for sequence in ranks}
    vocabulary = {names[sequence]: rank for sequence, rank in ranks.items()}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first = len(ranks)
    last = first + _NUM_ADDED - 1
    outside = [id for id in added if not first <= id <= last]
    if outside:
        raise ValueError(
            f"tokenizer_config.json: added_tokens_decoder names token {outside[0]};"
            f" expected {first} to {last}"
        )
    for id in range(first, last + 1):
        token = added.get(id, _Added(f"<|reserved_token_{id}|>", special=True))
        tokenizer.add_tokens([AddedToken(token.content, special=token.special, normalized=False)])
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that join to a token, in the order of that token's rank: the tokenizer
    joins the pair of the least rank first, however the token is cut.
    """
    pairs = []
    for sequence, rank in ranks.items():
        for cut in range(1, len(sequence)):
            left = ranks.get(sequence[:cut])
            right = ranks.get(sequence[cut:])
            if left is not None and right is not None:
                pairs.append((rank, left, right, sequence, cut))
    return [(sequence[:cut], sequence[cut:]) for _, _, _, sequence, cut in sorted(pairs)]
