"""Makes the demo's tokenizer: a byte-level BPE with one token per digit, trained on the generator's
text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..cases.mixture import draw_case, value_words
from ..cases.words import Dice
from ..chat import CHAT_TEMPLATE, SPECIAL, TAGS, render
from ..files import write_json
from .shape import MAX_POSITION, VOCAB_SIZE

SEED = "tokenizer"
NUM_CASES = 30_000
NUM_FREQUENT = 220


def write_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json. Decoders treat the tags of reasoning and
    tools as ordinary text.
    """
    texts = list(_texts())
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_word_pattern(texts)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "additional_special_tokens": list(SPECIAL[2:]),
        "model_max_length": MAX_POSITION,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)


def _word_pattern(texts: list[str]) -> str:
    """Splits off every digit and every word. A frequent word that the generator never uses as a
    value takes the space before it along. Any other word has the same tokens wherever it stands, so
    that it can be copied from anywhere. Punctuation takes the spaces between and after it along.
    """
    values = value_words()
    counts = Counter(
        word
        for text in texts
        for word in re.findall(r" ([a-z]{2,}|a)(?![A-Za-z])", text)
        if word not in values
    )
    frequent = sorted(
        (word for word, _ in counts.most_common(NUM_FREQUENT)), key=lambda word: (-len(word), word)
    )
    taken = rf"(?:{'|'.join(frequent)})(?!\p{{L}})"
    marks = rf"(?: ?[^\s\p{{L}}\p{{N}}]+)+(?: (?=[\p{{L}}\p{{N}}])(?!{taken}))?"
    return rf"\p{{N}}| {taken}|{marks}| (?=\S)|\p{{L}}+|\s+"


def _texts() -> Iterator[str]:
    """Text of training cases, one line per stretch between two tags of the format."""
    dice = Dice(SEED, held_out=False)
    marks = re.compile("|".join(re.escape(mark) for mark in (*SPECIAL, *TAGS)))
    for _ in range(NUM_CASES):
        for piece in render(draw_case(dice)):
            yield marks.sub("\n", piece.text)
