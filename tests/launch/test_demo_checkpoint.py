"""The demo checkpoint: the committed files are what the script makes, and are a model that both we and transformers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lockstep.engine.checkpoint import read_checkpoint
from lockstep.engine.models.config import load_config
from lockstep.launch.recipe_file import find_recipe
from lockstep.recipes.demo.make_checkpoint import MAX_POSITION, make_checkpoint, shapes

COMMITTED = find_recipe("demo").parent / "demo" / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    make_checkpoint(directory)
    return directory


def test_the_script_makes_the_committed_files(made: Path) -> None:
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in COMMITTED.iterdir())
    for name in names:
        if name.endswith(".json") and name != "tokenizer.json":
            assert json.loads((made / name).read_text()) == json.loads((COMMITTED / name).read_text()), name
        if name.endswith(".safetensors"):
            new, old = load_file(made / name), load_file(COMMITTED / name)
            assert new.keys() == old.keys()
            assert all(torch.equal(new[key], old[key]) for key in new), name


def test_it_stays_small() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 5.2e6


def test_we_read_it() -> None:
    config = load_config(COMMITTED)
    assert (config.family, config.max_position, config.eos_ids) == ("deepseek_v3", MAX_POSITION, (1,))
    assert {name: stored.shape for name, stored in read_checkpoint(COMMITTED).items()} == shapes()


@pytest.mark.parametrize("text", ["The controller plans.", "naïve café — 漢字 😀\n\ttabs", "", "<|user|> is a mark", "\x00\x7f"])
def test_any_text_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 1024 for token in ids)


def test_the_chat_template_knows_three_roles() -> None:
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|assistant|>"
    with pytest.raises(Exception, match="roles are system, user and assistant, not pirate"):
        tokenizer.apply_chat_template([{"role": "pirate", "content": "arr"}], tokenize=False)
