"""Kimi-K2 from a folder as it is downloaded, on two ranks, against transformers and tiktoken."""

from __future__ import annotations

from pathlib import Path

import torch

from support.engine.models.checkpoints import write_checkpoint
from support.engine.models.family_configs import kimi_k2_config
from support.engine.models.reference_models import load_reference
from support.engine.text.tiktoken_folder import SPECIAL, VOCAB_SIZE, reference_encoding, write_tokenizer
from support.serving.served import serve

QUESTION = "They'll say 中文English混合 it's 12345 times?"
NUM_NEW = 24


def continued(path: Path, prompt: list[int]) -> list[int]:
    """transformers' greedy continuation."""
    model, tokens = load_reference(path, torch.float32), list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_NEW):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_kimi_k2_without_its_code(tmp_path: Path) -> None:
    """The code that config.json and tokenizer_config.json name is missing, and is not needed."""
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    config = kimi_k2_config(vocab_size=VOCAB_SIZE, eos_token_id=SPECIAL["<|im_end|>"], auto_map=auto_map)
    path = write_tokenizer(write_checkpoint(tmp_path / "model", config, seed=3))
    encoding = reference_encoding()
    prompt = encoding.encode(f"[BOS]<|im_user|>{QUESTION}<|im_end|>", allowed_special="all")
    expected = continued(path, prompt)
    greedy = {
        "max_tokens": NUM_NEW,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    overrides = (f"model.path={path}", "model.served_name=small", "model.max_len=256", "kv_cache.memory=4MiB")
    with serve(tmp_path / "run", *overrides) as served:
        chat = served.ask("/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}], **greedy)
        whole = served.ask(prompt=f"[BOS]<|im_user|>{QUESTION}<|im_end|>", **greedy)
    for answer in (chat, whole):
        assert answer.usage["prompt_tokens"] == len(prompt)
        assert answer.tokens == expected
        assert answer.text == encoding.decode(expected)
