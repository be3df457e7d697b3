"""Asks a server the prompts of the canary, one after the other, greedily."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from .answers import Alternative, AnsweredToken, CanaryAnswer, CanaryPrompt
from .server import Server, ServerError, ask_json

_ALTERNATIVES = 5


async def server_version(server: Server) -> str:
    """The version that the server says it has."""
    found = await ask_json(server, "GET", "/version")
    return str(found.get("version", "unknown")) if isinstance(found, dict) else "unknown"


async def ask_canary(
    server: Server, model: str, prompts: Sequence[CanaryPrompt], max_tokens: int
) -> AsyncIterator[CanaryAnswer]:
    """The answers in order, each as soon as it has come. Raises ServerError.

    One request at a time: the shapes of a step, and with them its rounding, depend on the company.
    A salt of its own keeps pages out that were cached before: every prompt is computed again.
    """
    salt = secrets.token_hex(8)
    for prompt in prompts:
        try:
            yield await _ask(server, {"model": model, "cache_salt": salt}, prompt, max_tokens)
        except ServerError as error:
            raise ServerError(error.kind, f"prompt {prompt.name!r}: {error}", error.status) from None


async def _ask(
    server: Server, common: Mapping[str, str], prompt: CanaryPrompt, max_tokens: int
) -> CanaryAnswer:
    body: dict[str, Any] = {
        **common,
        "max_tokens": prompt.max_tokens or max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if prompt.messages is None:
        path = "/v1/completions"
        body |= {"prompt": prompt.prompt, "logprobs": _ALTERNATIVES}
    else:
        path = "/v1/chat/completions"
        body |= {"messages": prompt.messages, "logprobs": True, "top_logprobs": _ALTERNATIVES}
    document = await ask_json(server, "POST", path, body)
    try:
        choice = document["choices"][0]
        ids = [int(each) for each in choice["token_ids"]]
        told = _of_text(choice["logprobs"]) if prompt.messages is None else _of_chat(choice["logprobs"])
        tokens = [
            AnsweredToken(number, *each) for number, each in zip(ids, told, strict=True)
        ]  # the same order
        # vLLM has a conversation's tokens beside its choices, those of a text inside.
        prompt_ids = choice.get("prompt_token_ids") or document.get("prompt_token_ids") or []
        return CanaryAnswer(prompt, [int(each) for each in prompt_ids], tokens)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"{server.url}: POST {path} answers without token ids or log-probabilities"
        raise ServerError("no logprobs", f"{problem} ({type(error).__name__}: {error})") from None


_Told = tuple[str, float, list[Alternative]]


def _of_text(logprobs: Mapping[str, Any]) -> list[_Told]:
    """Tokens of a completion."""
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        (str(token), _number(value), [Alternative(text, _number(each)) for text, each in top.items()])
        for token, value, top in columns
    ]


def _of_chat(logprobs: Mapping[str, Any]) -> list[_Told]:
    """Tokens of a chat's answer."""
    return [
        (
            str(entry["token"]),
            _number(entry["logprob"]),
            [Alternative(each["token"], _number(each["logprob"])) for each in entry["top_logprobs"]],
        )
        for entry in logprobs["content"]
    ]


def _number(value: Any) -> float:
    """JSON has null for what is no number, as broken weights give."""
    return math.nan if value is None else float(value)
