"""Small tokenizers as model folders that hold the tags of a format in every way there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lockstep.engine.text.pieces import byte_alphabet

from .tiktoken_folder import FIRST, write_tokenizer

END = "<|end|>"
HIDDEN = "<|user|>"  # a special token that belongs to no format
# One token that is special; one added token that is not; one that merges make; nothing but pieces.
# The two kinds of added token also in SentencePiece's form with byte fallback, and in tiktoken's.
STORAGES = (
    "special",
    "added",
    "merged",
    "pieces",
    "sentencepiece special",
    "sentencepiece added",
    "tiktoken special",
    "tiktoken added",
)
_WORDS = ("the", "name", "arguments", "get", "call", "</", '{"', '": ', '"}', "function", "\n\n", ">\n")


def write_tagged(folder: Path, tags: Sequence[str], storage: str, end: str = END) -> tuple[int, int]:
    """Writes a tokenizer with ``tags``. Returns its number of tokens and the id of ``end``."""
    if storage.startswith("tiktoken"):
        return _write_tiktoken(folder, tags, end, special=storage.endswith("special"))
    folder.mkdir(exist_ok=True)
    if storage.startswith("sentencepiece"):
        tokenizer = _sentencepiece()
    else:
        tokenizer = _byte_level(tags if storage == "merged" else ())
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in (end, HIDDEN)])
    if storage not in ("merged", "pieces"):
        special = storage.endswith("special")
        tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in tags])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size(), tokenizer.token_to_id(end)


def _byte_level(whole: Sequence[str]) -> Tokenizer:
    """Bytes, a few words, and ``whole`` texts that merges make."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    vocabulary = {character: id for id, character in enumerate(sorted(characters.values()))}
    merges: list[tuple[str, str]] = []
    for word in (*_WORDS, *whole):
        name = "".join(characters[byte] for byte in word.encode())
        for cut in range(1, len(name)):
            if name[: cut + 1] not in vocabulary:
                vocabulary[name[: cut + 1]] = len(vocabulary)
                merges.append((name[:cut], name[cut]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for character in '▁abcdefghijklmnopqrstuvwxyz0123456789<>/_[]{}":,|':
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("<", "/"), ("{", '"')]
    vocabulary |= {left + right: len(vocabulary) + at for at, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken("<unk>", special=True, normalized=False)])
    return tokenizer


def _write_tiktoken(folder: Path, tags: Sequence[str], end: str, special: bool) -> tuple[int, int]:
    named = [(end, True), (HIDDEN, True), *((tag, special) for tag in tags)]
    added = {str(FIRST + at): {"content": name, "special": kind} for at, (name, kind) in enumerate(named)}
    write_tokenizer(folder, added_tokens_decoder=added, bos_token=end, eos_token=end)
    return FIRST + 256, FIRST
