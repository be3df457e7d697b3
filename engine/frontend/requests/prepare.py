"""Prepares a request for the engine: messages become text, text becomes tokens, tokens get hashes.

Everything here is for threads: it may take long (a 128k prompt) and touches no shared state.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from ...kv.hashing import chain_hashes, hash_root
from ..api.errors import bad_request
from ..api.generate import MAX_SEQUENCES
from ..api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from ..api.tools import NamedTool
from ..formats.choice import Manner
from .conversation import continued, conversation_text
from .model import ServedModel
from .prepared import Outline, PreparedRequest, Prompt
from .sampling import build_samplings, stop_rule
from .structure import begins_with, grammar_of, refuse_without_end
from .token_rules import check_ids, check_prompt, refuse_with_grammar, token_rules

FAR_CHARS = 16  # characters per token of the context, several times what tokens have


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of the cluster, see ``ClusterState``. ``page_size`` 0 when prefixes are not cached."""

    max_len: int
    page_size: int


def prepare(
    model: ServedModel, limits: EngineLimits, ask: GenerationRequest, request_id: str
) -> PreparedRequest:
    """Checks what depends on the model and does all work before the engine's. Raises ApiError."""
    manner: Manner | None = None
    if isinstance(ask, ChatRequest):
        text = chat_text(model, ask)
        manner = _manner(model, ask, text)
        prompts = [_prompt(model, limits, ask, text)]
    else:
        prompts = [_prompt(model, limits, ask, source) for source in _sources(ask)]
    claims = grammar_of(ask, manner, model.tag_id)
    if claims:
        refuse_without_end(model.defaults.eos_ids)
        refuse_with_grammar(ask)
    stop = stop_rule(ask, model.defaults, model.vocab_size)
    rules = token_rules(ask, model.codec, model.vocab_size, stop)
    samplings = build_samplings(ask, model.defaults, model.vocab_size, stop, rules)
    return PreparedRequest(
        outline=_outline(model.name, ask, request_id),
        prompts=prompts,
        samplings=samplings,
        stop=stop,
        manner=manner,
        claims=claims,
        priority=ask.priority or 0,
        affinity=_affinity(ask.prompt_cache_key),
        echo=bool(ask.echo),
        skip_special_tokens=ask.skip_special_tokens is not False,
    )


def _affinity(key: str | None) -> int:
    return 1 + crc32(key.encode("utf-8", "surrogatepass")) if key else 0


def chat_text(model: ServedModel, ask: ChatRequest) -> str:
    """The prompt text of a chat. Raises ApiError."""
    _check_tools(model, ask)
    _check_effort(model, ask)
    return conversation_text(model.codec, model.habits, ask)


def _check_tools(model: ServedModel, ask: ChatRequest) -> None:
    """Refuses tools that could not be shown to the model or not be found in its replies."""
    if not ask.offers_tools:
        return
    if not model.habits.shows_tools:
        raise bad_request(
            "tools: the model's chat template does not show tools to the model; put one that does into"
            " the model's directory as chat_template.jinja",
            "tools",
        )
    if model.formats.tools is None:
        raise bad_request(
            "tools: this server does not know how the model writes tool calls; set frontend.tool_parser",
            "tools",
        )


def _check_effort(model: ServedModel, ask: ChatRequest) -> None:
    """Refuses to turn off the thinking of a model whose template has no way to say so."""
    if ask.reasoning_effort == "none" and model.formats.reasoning and not model.habits.thinking.can_stop:
        raise bad_request(
            "reasoning_effort: none is not possible, because the model's chat template has no switch"
            " for thinking (enable_thinking or thinking)",
            "reasoning_effort",
        )


def _manner(model: ServedModel, ask: ChatRequest, text: str) -> Manner:
    """Chooses how replies to the prompt ``text`` are parsed."""
    tools = {tool.function.name: tool.function.parameters or {} for tool in ask.callable_tools}
    formats = model.formats
    thinking = formats.opens_reasoning(text, continued(ask))
    if not thinking and formats.reasoning is not None and begins_with(ask, formats.reasoning.open):
        formats = replace(formats, reasoning=None)  # the tag is content here: the client asks for it
    return Manner(
        formats=formats,
        thinking=thinking,
        answering=formats.closes_reasoning(text),
        show_reasoning=ask.include_reasoning is not False,
        tools=tools if ask.offers_tools else None,
        one_call=ask.one_call,
        named=isinstance(ask.tool_choice, NamedTool),
        custom=ask.custom_names,
    )


def _sources(ask: CompletionRequest) -> Sequence[str | list[int]]:
    """The prompts of a text completion, as text or token ids."""
    sources = ask.prompts
    if not sources:
        raise bad_request("prompt: at least one prompt is needed", "prompt")
    if len(sources) * (ask.n or 1) > MAX_SEQUENCES:
        raise bad_request(
            f"prompt: {len(sources)} prompts x n {ask.n or 1} are more than {MAX_SEQUENCES} sequences",
            "prompt",
        )
    return sources


def _prompt(
    model: ServedModel, limits: EngineLimits, ask: GenerationRequest, source: str | list[int]
) -> Prompt:
    """Encodes text or checks ids, fits them into the context, packs and hashes them."""
    if isinstance(source, str):
        special = ask.add_special_tokens
        if special is None:
            special = not isinstance(ask, ChatRequest)  # a chat template writes them itself
        if ask.truncate_prompt_tokens is None:
            _refuse_far_too_long(model, limits, ask, source)
        ids = model.codec.encode(source, special)
    else:
        ids = source
        check_ids(ids, model.vocab_size, "prompt")
    ids = _truncated(ids, limits, ask)
    check_prompt(ids, model.codec, model.vocab_size, _prompt_field(ask))
    if not ids:
        raise bad_request("The prompt is empty: at least one token is needed", _prompt_field(ask))
    budget = _output_budget(model, limits, ask, len(ids))
    packed, hashes = np.array(ids, "<i4").tobytes(), b""
    if limits.page_size:
        root = hash_root(model.revision, model.kv_format, salt=ask.cache_salt or "")
        hashes = chain_hashes(root, packed, limits.page_size)
    text = model.codec.text(ids, ask.skip_special_tokens is not False) if ask.echo else ""
    return Prompt(ids, packed, hashes, budget, text)


def _refuse_far_too_long(model: ServedModel, limits: EngineLimits, ask: GenerationRequest, text: str) -> None:
    """Refuses text whose start alone is twice as long as the context, at the cost of that start.
    The tokens of a prefix may differ from those of the whole text, but not by so many.
    """
    start = FAR_CHARS * limits.max_len
    if len(text) <= 2 * start:
        return
    if len(model.codec.encode(text[:start], False)) > 2 * limits.max_len:
        context = f"This model's maximum context length is {limits.max_len} tokens."
        text = f"{context} However, the prompt has more than {2 * limits.max_len} tokens."
        raise bad_request(f"{text} Please shorten the prompt.", _prompt_field(ask))


def _truncated(ids: list[int], limits: EngineLimits, ask: GenerationRequest) -> list[int]:
    """The last tokens of a prompt, as many as ``truncate_prompt_tokens`` says: with -1 as many as
    fit beside the output.
    """
    keep = ask.truncate_prompt_tokens
    if keep is None:
        return ids
    most = limits.max_len - (1 if ask.output_tokens is None else ask.output_tokens)
    if keep > limits.max_len:
        raise bad_request(
            f"truncate_prompt_tokens: should be at most {limits.max_len}, the maximum context length"
            f" (got {keep})",
            "truncate_prompt_tokens",
        )
    return ids[-keep:] if keep > 0 else ids[-most:] if most > 0 else ids


def _output_budget(model: ServedModel, limits: EngineLimits, ask: GenerationRequest, num_prompt: int) -> int:
    """The number of tokens that may follow a prompt of ``num_prompt``."""
    max_len = limits.max_len
    asked = ask.output_tokens
    context = f"This model's maximum context length is {max_len} tokens."
    if num_prompt >= max_len + (asked == 0):
        text = f"{context} However, the prompt has {num_prompt} tokens. Please shorten the prompt."
        raise bad_request(text, _prompt_field(ask))
    if asked is None:
        most = model.defaults.max_new_tokens
        room = max_len - num_prompt
        budget = room if most is None else max(1, min(room, most))
    elif num_prompt + asked > max_len:
        parts = f"{num_prompt} in the prompt, {asked} for the completion"
        text = f"{context} However, you requested {num_prompt + asked} tokens ({parts})."
        raise bad_request(f"{text} Please shorten one of them.", "max_tokens")
    else:
        budget = asked
    if ask.min_tokens and ask.min_tokens > budget:
        text = f"min_tokens {ask.min_tokens} is more than the {budget} tokens that may follow"
        raise bad_request(text, "min_tokens")
    return budget


def _prompt_field(ask: GenerationRequest) -> str:
    """The field of a request that its prompt comes from."""
    return "messages" if isinstance(ask, ChatRequest) else "prompt"


def _outline(model_name: str, ask: GenerationRequest, request_id: str) -> Outline:
    is_chat = isinstance(ask, ChatRequest)
    options = ask.stream_options
    return Outline(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        created=int(time.time()),
        model=model_name,
        chat=is_chat,
        num_logprobs=ask.num_logprobs,
        return_token_ids=bool(ask.return_token_ids),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        interval=ask.stream_interval or 1,
        num_prompt_logprobs=-1 if ask.prompt_logprobs is None else ask.prompt_logprobs,
        legacy_call=isinstance(ask, ChatRequest) and bool(ask.functions),
    )
