"""A small byte-level BPE tokenizer with a chat template, written as a model directory without
weights.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Experts are logical, slots are physical; a placement is the map between them.",
    "Größe, naïve café, 東京 and 🙂 need several bytes.",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
VOCAB_SIZE = 420
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not (continue_final_message and loop.last) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if loud %}LOUD{% endif %}"
)
# In the manner of Qwen3: JSON between tags, reasoning in front, <think></think> for those who want
# none.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}"
    "{% if not (continue_final_message and loop.last) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined %}<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}{% endif %}"
)


@cache
def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def turn_ids(text: str) -> list[int]:
    """The tokens of a whole turn that says ``text``."""
    return [*tiny_tokenizer().encode(text).ids, IM_END]


def write_model(path: Path, generation: dict[str, object] | None = None, template: str = TEMPLATE) -> Path:
    """Writes tokenizer, config.json and generation_config.json into ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(
        json.dumps({"model_type": "tiny", "vocab_size": VOCAB_SIZE, "eos_token_id": IM_END})
    )
    defaults = (
        {"eos_token_id": [IM_END, END_OF_TEXT], "temperature": 0.7, "top_p": 0.9}
        if generation is None
        else generation
    )
    (path / "generation_config.json").write_text(json.dumps(defaults))
    return path
