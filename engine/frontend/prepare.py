"""From what a client sent to what the engine needs: messages to text, text to tokens, tokens to hashes.

Everything here is for threads: it may take long (a 128k prompt) and touches no shared state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..kv.hashing import chain_hashes, hash_root
from .errors import bad_request
from .sampling import Defaults, check_ids, output_budget
from .schemas import Conversation, Message
from .tokenizer import Codec


@dataclass(frozen=True, slots=True)
class Model:
    """What this frontend knows about the model. ``revision`` names the weights in prompt hashes."""

    name: str
    codec: Codec
    defaults: Defaults
    vocab_size: int
    revision: str
    kv_format: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What the controller has said: see ``ClusterState``. ``page_size`` 0 when prefixes are not cached."""

    max_len: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready to be submitted: its ids, packed and hashed, and how many tokens may follow."""

    ids: list[int]
    packed_i32: bytes
    hashes_h128: bytes
    max_tokens: int


def model_revision(model_path: Path) -> str:
    """Names the weights: the directory's name and its config.json."""
    config = model_path / "config.json"
    content = config.read_bytes() if config.exists() else b""
    return hash_root(model_path.name, content.decode("utf-8", "replace")).hex()


def conversation_text(codec: Codec, ask: Conversation, tools: list[dict[str, Any]] | None) -> str:
    """The prompt text of a conversation. Raises ApiError."""
    options = dict(ask.chat_template_kwargs or {})
    if ask.reasoning_effort is not None:
        options.setdefault("reasoning_effort", ask.reasoning_effort)
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in options:
            raise bad_request(f"chat_template_kwargs.{name} is not allowed: {name} is a field of its own", "chat_template_kwargs")
    messages = [_plain(index, message) for index, message in enumerate(ask.messages)]
    generate = ask.add_generation_prompt and not ask.continue_final_message
    return codec.render(messages, tools, add_generation_prompt=generate, continue_final_message=ask.continue_final_message, **options)


def prepare(model: Model, limits: Limits, source: str | list[int], special: bool, asked: int | None, salt: str) -> Prompt:
    """Encodes (``source`` text) or checks (ids), fits into the context, packs and hashes. Raises ApiError."""
    if isinstance(source, str):
        ids = model.codec.encode(source, special)
    else:
        ids = source
        check_ids(ids, model.vocab_size, "prompt")
    if not ids:
        raise bad_request("The prompt is empty: at least one token is needed", "prompt")
    budget = output_budget(len(ids), asked, limits.max_len, model.defaults) if asked != 0 else 0
    packed = np.array(ids, "<i4").tobytes()
    if not limits.page_size:
        return Prompt(ids, packed, b"", budget)
    root = hash_root(model.revision, model.kv_format, salt=salt)
    return Prompt(ids, packed, chain_hashes(root, packed, limits.page_size), budget)


def _plain(index: int, message: Message) -> dict[str, Any]:
    """A message as templates expect it: text content, both names of reasoning, tool arguments as objects."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _content(index, message)
    thoughts = message.reasoning if message.reasoning is not None else message.reasoning_content
    if thoughts is not None:
        plain["reasoning"] = plain["reasoning_content"] = thoughts
    for call in plain.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = msgspec.json.decode(function["arguments"] or "{}")
            except msgspec.DecodeError as error:
                raise bad_request(f"messages[{index}].tool_calls: arguments are not valid JSON: {error}", "messages") from error
    return plain


def _content(index: int, message: Message) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = []
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise bad_request(f"messages[{index}].content: only text parts are supported (got {part.type!r})", "messages")
        texts.append(part.text)
    return "\n".join(texts)
