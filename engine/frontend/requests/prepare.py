"""From what a client sent to what the engine needs: messages to text, text to tokens, tokens to
hashes.

Everything here is for threads: it may take long (a 128k prompt) and touches no shared state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from ...kv.hashing import chain_hashes, hash_root
from ...protocol.specs import FrontendSpec
from ...text.tokenizer import Codec
from ..api.errors import ApiError, bad_request
from ..api.schemas import ChatRequest, CompletionRequest, Generate, NamedTool
from ..formats.choice import Formats, Manner, choose
from .conversation import Habits, continued, conversation_text, learn_habits
from .sampling import Defaults, check_ids, load_defaults, output_budget
from .structure import GrammarCheck, grammar_of, refuse_without_end


@dataclass(frozen=True, slots=True)
class Model:
    """What this frontend knows about the model. ``revision`` names the weights in prompt hashes."""

    name: str
    codec: Codec
    defaults: Defaults
    vocab_size: int
    revision: str
    kv_format: str
    habits: Habits
    formats: Formats
    check: GrammarCheck

    def special_id(self, tag: str) -> int | None:
        """The id of a tag that the tokenizer calls special."""
        return next(iter(self.codec.ids_of([tag]) & self.codec.special_ids), None)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the controller has said: see ``ClusterState``. ``page_size`` 0 when prefixes are not
    cached.
    """

    max_len: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready to be submitted: its ids, packed and hashed, how many tokens may follow, and
    how they are read.

    ``grammar`` is what the reply must follow, empty where it is free.
    """

    ids: list[int]
    packed_i32: bytes
    hashes_h128: bytes
    max_tokens: int
    manner: Manner | None = None
    grammar: str = ""


def model_revision(model_path: Path) -> str:
    """Names the weights: the directory's name and its config.json."""
    config = model_path / "config.json"
    content = config.read_bytes() if config.exists() else b""
    return hash_root(model_path.name, content.decode("utf-8", "replace")).hex()


def load_model(spec: FrontendSpec) -> Model:
    """Reads what a frontend needs of the model's directory. Raises ValueError."""
    path = Path(spec.model_path)
    codec = Codec(path)
    return Model(
        name=spec.served_name,
        codec=codec,
        defaults=load_defaults(path, codec.eos_id),
        vocab_size=spec.vocab_size,
        revision=model_revision(path),
        kv_format=spec.kv_format,
        habits=learn_habits(codec),
        formats=choose(codec.chat_template, _model_type(path), spec.tool_parser, spec.reasoning_parser),
        check=GrammarCheck(),
    )


def prepare_chat(model: Model, limits: Limits, ask: ChatRequest) -> Prompt:
    """The prompt of a conversation, and how the reply to it is to be read. Raises ApiError."""
    if ask.offers_tools:
        _check_tools(model)
    text = conversation_text(model.codec, model.habits, ask)
    try:
        prompt = prepare(
            model, limits, text, bool(ask.add_special_tokens), ask.output_tokens, ask.cache_salt or ""
        )
    except ApiError as error:
        error.param = "messages" if error.param == "prompt" else error.param
        raise
    tools = {tool.function.name: tool.function.parameters or {} for tool in ask.tools or ()}
    manner = Manner(
        formats=model.formats,
        thinking=model.formats.opens_reasoning(text, continued(ask)),
        answering=model.formats.closes_reasoning(text),
        show_reasoning=ask.include_reasoning is not False,
        tools=tools if ask.offers_tools else None,
        one_call=ask.parallel_tool_calls is False,
        named=isinstance(ask.tool_choice, NamedTool),
    )
    return replace(prompt, manner=manner, grammar=_grammar(model, ask, manner))


def prepare_texts(model: Model, limits: Limits, ask: CompletionRequest) -> list[Prompt]:
    """The prompts of a text completion. Raises ApiError."""
    grammar, salt, special = (
        _grammar(model, ask, None),
        ask.cache_salt or "",
        ask.add_special_tokens is not False,
    )
    return [
        replace(prepare(model, limits, source, special, ask.output_tokens, salt), grammar=grammar)
        for source in ask.prompts
    ]


def prepare(
    model: Model, limits: Limits, source: str | list[int], special: bool, asked: int | None, salt: str
) -> Prompt:
    """Encodes (``source`` text) or checks (ids), fits into the context, packs and hashes. Raises
    ApiError.
    """
    if isinstance(source, str):
        ids = model.codec.encode(source, special)
    else:
        ids = source
        check_ids(ids, model.vocab_size, "prompt")
    if not ids:
        raise bad_request("The prompt is empty: at least one token is needed", "prompt")
    budget = output_budget(len(ids), asked, limits.max_len, model.defaults)
    packed = np.array(ids, "<i4").tobytes()
    if not limits.page_size:
        return Prompt(ids, packed, b"", budget)
    root = hash_root(model.revision, model.kv_format, salt=salt)
    return Prompt(ids, packed, chain_hashes(root, packed, limits.page_size), budget)


def _grammar(model: Model, ask: Generate, manner: Manner | None) -> str:
    grammar = grammar_of(ask, manner, model.special_id, model.check)
    if grammar:
        refuse_without_end(model.defaults.eos_ids)
    return grammar


def _check_tools(model: Model) -> None:
    """Raises ApiError where tools could be neither shown to the model nor found in its replies."""
    if not model.habits.shows_tools:
        text = "the chat template of this model does not show tools to it; one that does can be put into the model's directory"
        raise bad_request(f"tools: {text} as chat_template.jinja", "tools")
    if model.formats.tools is None:
        raise bad_request(
            "tools: this server does not know how this model writes tool calls; frontend.tool_parser says it",
            "tools",
        )


def _model_type(path: Path) -> str:
    config = path / "config.json"
    found = msgspec.json.decode(config.read_bytes()).get("model_type") if config.exists() else None
    return found if isinstance(found, str) else ""
