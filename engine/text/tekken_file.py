"""Loads a tokenizer from ``tekken.json``, as Mistral's checkpoints have it: byte sequences by rank
after the special tokens, and the pattern that splits text. transformers reads the file.

The chat template is ``chat_template.jinja`` beside it, or where the package mistral-common is
installed the one that it writes for this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import processors

FILE = "tekken.json"
DECODER = {"type": "ByteLevel"}  # as tokenizer.json would describe it


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder. Raises ValueError naming the file at fault."""
    try:
        from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer
    except ImportError:
        raise ValueError(f"{FILE} needs a transformers that reads it, such as 5.24") from None
    try:
        tokenizer: Any = convert_tekken_tokenizer(str(folder / FILE))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{FILE}: not readable as Mistral's tokenizer: {error!r}") from error
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer
