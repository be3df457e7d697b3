"""A tokenizer for a folder that describes a model and holds neither weights nor a tokenizer, as
with random weights.

A byte is a token. The other ids, which a model may sample too, stand for made-up words; those that
end a sequence are special.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..models.description import description_file, read_description
from .pieces import byte_alphabet

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DECODER = {"type": "ByteLevel"}  # as tokenizer.json would describe it


def is_described_alone(folder: Path) -> bool:
    """Whether ``folder`` holds a model's description and no weights."""
    return description_file(folder).is_file() and not any(folder.glob("*.safetensors*"))


def build_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer for the model that ``folder`` describes. Raises ValueError naming the field."""
    fields = read_description(folder)
    ends = fields.integers("eos_token_id")
    vocab_size = fields.integer("vocab_size", minimum=256 + len(ends))
    special = {id: END if id == ends[0] else f"<|end {id}|>" for id in ends}
    others = [id for id in range(vocab_size) if id not in special]
    names = dict(zip(others, byte_alphabet(), strict=False)) | special
    vocabulary = {names.get(id, f"\u0120w{id}"): id for id in range(vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    return tokenizer
