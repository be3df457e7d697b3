"""The tokenizer of a folder that only describes a model: texts return, every id has a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.engine.text.tokenizer import Codec
from lockstep.engine.text.vocabulary import load_vocabulary

TEXT = "Zoë  says:\n\t'a <|end|> b' 漢"


def described(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400} | fields))
    return folder


@pytest.mark.parametrize("ends", [[1], [399, 3], []])
def test_texts_return_and_every_id_has_a_text(ends: list[int], tmp_path: Path) -> None:
    codec = Codec(described(tmp_path, eos_token_id=ends))
    ids = codec.encode(TEXT, add_special_tokens=True)
    assert codec.decode(ids, skip_special_tokens=False) == TEXT
    assert len(ids) == len(TEXT.encode()) - (len("<|end|>") - 1 if ends else 0)
    assert codec.special_ids == set(ends) and codec.eos_id == (ends[0] if ends else None)
    assert len({codec.piece(id) for id in range(400)}) == 400
    assert all(codec.is_shown(id, skip_special_tokens=True) == (id not in ends) for id in range(400))


def test_matchers_read_the_same_tokens(tmp_path: Path) -> None:
    codec, vocabulary = Codec(described(tmp_path, eos_token_id=2)), load_vocabulary(tmp_path, 400, (2,))
    assert vocabulary is not None and vocabulary.eos_token == 2
    assert vocabulary.tokenize_str("plain") == codec.encode("plain", add_special_tokens=False)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 256; expected an integer of at least 257"):
        Codec(described(tmp_path, vocab_size=256, eos_token_id=1))


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    (described(tmp_path) / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"tokenizer\.json, tiktoken\.model or tekken\.json should be there"):
        Codec(tmp_path)
