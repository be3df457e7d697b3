"""A model folder's tokenizer in the form of Kimi-K2: ``tiktoken.model``, trained on a few
sentences, and tokenizer_config.json.
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

# As in tokenization_kimi.py, alternative by alternative.
_BEFORE = r"""[^\r\n\p{L}\p{N}]?"""
_UPPER = r"""[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"""
_LOWER = r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"""
_SUFFIX = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
CORPUS = (
    (
        "The quick brown fox jumps over the lazy dog's back; "
        "they'll say it's 12345 times QUICKER than McDonald's. "
    )
    * 3
    + "中文English混合、北京市的天气。東京 カタカナ ひらがな 한국어 "
    + "naïve Größe 🙂🙃 aaaaaaaa abababab banana\n\n"
    + "  indented\r\n\tcode(x) == {y: 'z'}"
)
NUM_TRAINED = 260
ADDED = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    11: ("<|tool|>", False),
}


def train(words: list[str], num_merges: int) -> dict[bytes, int]:
    """Byte pair encoding learnt from words: pairs that stand often become tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    parts = [[bytes([byte]) for byte in word.encode()] for word in words]
    while len(ranks) < 256 + num_merges:
        pairs = Counter(pair for word in parts for pair in pairwise(word) if b"".join(pair) not in ranks)
        (left, right), _ = pairs.most_common(1)[0]
        ranks[left + right] = len(ranks)
        parts = [_joined(word, left, right) for word in parts]
    return ranks


def _joined(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    joined, i = [], 0
    while i < len(parts):
        step = 2 if parts[i : i + 2] == [left, right] else 1
        joined.append(b"".join(parts[i : i + step]))
        i += step
    return joined


def _babble(num_words: int) -> list[str]:
    """Words of few letters, so that many tokens begin where others end."""
    choose = random.Random(0)
    return [" " + "".join(choose.choices("abnsTü中文", k=choose.randint(2, 9))) for _ in range(num_words)]


RANKS = train(CORPUS.replace(" ", "\0 ").split("\0") + _babble(400) + ["1234567890"] * 50, NUM_TRAINED)
WHOLE = b"zqx"  # a token that no two tokens join to, so that only a piece that is all of it becomes it
RANKS[WHOLE] = len(RANKS)
FIRST = len(RANKS)
VOCAB_SIZE = FIRST + 256
SPECIAL = {ADDED[i][0] if i in ADDED else f"<|reserved_token_{FIRST + i}|>": FIRST + i for i in range(256)}


def write_tokenizer(folder: Path, **changes: Any) -> Path:
    """Writes both files; ``changes`` replace fields of tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(sequence).decode()} {rank}\n" for sequence, rank in RANKS.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    added = {
        str(FIRST + i): {"content": name, "special": special, "lstrip": False}
        for i, (name, special) in ADDED.items()
    }
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": (
            "{{ bos_token }}{% for message in messages %}"
            "<|im_user|>{{ message.content }}{{ eos_token }}{% endfor %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    return folder


def reference_encoding() -> tiktoken.Encoding:
    """The same by the ``tiktoken`` library."""
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens=SPECIAL)
