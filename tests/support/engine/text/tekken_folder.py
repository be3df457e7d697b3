"""A model folder's tokenizer in the form of Mistral's: ``tekken.json``."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tiktoken

from .tiktoken_folder import PATTERN, RANKS

NAMED = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]")
NUM_SPECIAL = 16
PAD = 11
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    "{% if tools %}[TOOL_CALLS]{{ tools | tojson }}{% endif %}"
)
SPECIAL = {
    **{f"<SPECIAL_{i}>": i for i in range(len(NAMED), NUM_SPECIAL) if i != PAD},
    **{name: i for i, name in enumerate(NAMED)},
    "<pad>": PAD,
}


def write_tekken(folder: Path, **changes: Any) -> Path:
    """Writes tekken.json, with more entries than its size says, and a chat template; ``changes``
    replace fields of the file.
    """
    folder.mkdir(exist_ok=True)
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(sequence).decode(), "token_str": None}
        for sequence, rank in RANKS.items()
    ]
    beyond = {"rank": len(RANKS), "token_bytes": base64.b64encode(b"beyond").decode(), "token_str": "beyond"}
    by_rank = sorted(SPECIAL.items(), key=lambda item: item[1])
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(RANKS) + 1,
            "default_vocab_size": len(RANKS) + NUM_SPECIAL,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v13",
        },
        "vocab": [*vocab, beyond],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for name, i in by_rank],
    }
    (folder / "tekken.json").write_text(json.dumps(content | changes))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def reference_encoding() -> tiktoken.Encoding:
    """The same by the ``tiktoken`` library."""
    ranks = {sequence: rank + NUM_SPECIAL for sequence, rank in RANKS.items()}
    return tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL)
