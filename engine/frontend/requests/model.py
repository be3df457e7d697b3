"""The frontend's view of the served model: tokenizer, defaults, chat template and reply formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...kv.hashing import hash_root
from ...models.description import description_file, read_description
from ...protocol.specs import FrontendSpec
from ...text.tokenizer import Codec
from ..formats.choice import Formats, choose
from .encodings import encoding_template
from .habits import Habits, learn_habits
from .sampling import Defaults, load_defaults


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Never changes after loading, so threads share it. ``revision`` names the weights in the
    hashes of prompts.
    """

    name: str
    codec: Codec
    defaults: Defaults
    vocab_size: int
    revision: str
    kv_format: str
    habits: Habits
    formats: Formats

    def tag_id(self, tag: str) -> int | None:
        """The token that ``tag`` is, if the tokenizer takes it out of text as a whole and the model
        can write it.
        """
        id = self.codec.added_id(tag)
        return id if id is not None and id < self.vocab_size else None


def load_model(spec: FrontendSpec) -> ServedModel:
    """Reads the model's directory. Raises ValueError naming the file or the key at fault."""
    path = Path(spec.model_path)
    codec = Codec(path)
    model_type = _model_type(path)
    template = encoding_template(path, model_type) if codec.chat_template is None else None
    if template is not None:
        codec.adopt_template(template)
    return ServedModel(
        name=spec.served_name,
        codec=codec,
        defaults=load_defaults(path, codec.eos_id),
        vocab_size=spec.vocab_size,
        revision=_revision(path),
        kv_format=spec.kv_format,
        habits=learn_habits(codec),
        formats=choose(codec.chat_template, model_type, spec.tool_parser, spec.reasoning_parser),
    )


def _revision(path: Path) -> str:
    """Names the weights by the directory's name and the model's description."""
    description = description_file(path)
    content = description.read_bytes() if description.exists() else b""
    return hash_root(path.name, content.decode("utf-8", "replace")).hex()


def _model_type(path: Path) -> str:
    found = read_description(path).raw("model_type") if description_file(path).exists() else None
    return found if isinstance(found, str) else ""
