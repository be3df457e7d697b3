"""A small tokenizer of every kind that checkpoints have, by the decoder that joins its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .tiny_tokenizer import tiny_tokenizer

SPACE = "\u2581"
PARTS = ("hel", "lo", "w", "or", "ld", "na", "ï", "ve", "東", ".")


def _sentencepiece(*, strip: bool, byte_tokens: bool = True) -> Tokenizer:
    """In the manner of Llama 2 and Mistral (``strip``), or Gemma."""
    names = ["<unk>", "<s>", "</s>"]
    names += [f"<0x{byte:02X}>" for byte in range(256)] if byte_tokens else []
    names += [SPACE, *PARTS, *(SPACE + part for part in PARTS), "a", "b"]
    vocabulary = {name: id for id, name in enumerate(names)}
    model = models.BPE(vocabulary, [], byte_fallback=byte_tokens, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend(SPACE)] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " ")]
    parts += [decoders.ByteFallback()] if byte_tokens else []
    parts += [decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(parts)
    return _with_added(tokenizer)


def _metaspace() -> Tokenizer:
    """In the manner of T5 and XLNet: unigrams, spaces by the decoder itself."""
    names = ["<unk>", "<s>", "</s>", SPACE, *PARTS, *(SPACE + part for part in PARTS), "a"]
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _with_added(tokenizer)


def _word_pieces() -> Tokenizer:
    """In the manner of BERT."""
    names = ["[UNK]", "<s>", "</s>", "a", *PARTS, *("##" + part for part in PARTS)]
    tokenizer = Tokenizer(models.WordPiece({name: id for id, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _with_added(tokenizer)


def _word_ends() -> Tokenizer:
    """In the manner of GPT-1: a token says that its word ends, so its neighbour decides."""
    names = ["<unk>", "<s>", "</s>", "a", *PARTS, *(part + "</w>" for part in PARTS)]
    tokenizer = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _with_added(tokenizer)


def _bare() -> Tokenizer:
    """Words without a decoder: they are joined by spaces."""
    names = ["<unk>", "<s>", "</s>", "a", *PARTS]
    tokenizer = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(tokenizer)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False), AddedToken("né", normalized=False)])
    return tokenizer


# Those whose tokens each have their own bytes, and the one whose tokens do not.
JOINING: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": tiny_tokenizer,
    "llama2": lambda: _sentencepiece(strip=True),
    "gemma": lambda: _sentencepiece(strip=False),
    "no_bytes": lambda: _sentencepiece(strip=True, byte_tokens=False),
    "metaspace": _metaspace,
    "word_pieces": _word_pieces,
    "bare": _bare,
}
KINDS = {**JOINING, "word_ends": _word_ends}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


def write_kind(path: Path, kind: str) -> Path:
    """Writes a model directory without weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(kind)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    size = tokenizer.get_vocab_size()
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": size}))
    return path
