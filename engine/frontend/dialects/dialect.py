"""Dialects other than chat: each translates its request into a chat, and the reply's pieces into
its own events and documents. Between these, a request is handled as any chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel, BeforeValidator, Discriminator, ValidationError
from pydantic_core import PydanticCustomError

from ..api.errors import ApiError, bad_request, from_validation, shown
from ..api.generate import NOT_SERVED, REMOVED
from ..api.schemas import ChatRequest, GenerationRequest
from ..formats.speech import Piece
from ..reply import Reply
from ..requests.generation import Generation
from .renames import Renames

# Fields of chat that every dialect takes under the same name, or refuses as chat does.
SHARED = (
    *("min_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "ignore_eos", "stop", "stop_token_ids", "allowed_token_ids", "bad_words"),
    *("include_stop_str_in_output", "structured_outputs", "skip_special_tokens", "include_reasoning"),
    *("chat_template_kwargs", "cache_salt", "prompt_cache_key", "priority", "stream_interval"),
    "truncate_prompt_tokens",
    *REMOVED,
    *(name for name in NOT_SERVED if name not in ("functions", "function_call")),
)
# Fields of chat that would change the answer, but whose result has no place in another dialect.
_NO_PLACE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
}


class Narrator(Protocol):
    """Writes one reply as the events of a stream, each as bytes. Pieces may have any size."""

    def opening(self) -> bytes:
        """The events before the first piece."""

    def tell(self, pieces: Sequence[Piece]) -> bytes:
        """The events of the next pieces."""

    def ending(self) -> bytes:
        """The events after the last piece: the generation has finished."""

    def failing(self, error: ApiError) -> bytes:
        """The events of a reply that broke off."""


class Asked(Protocol):
    """A request in its dialect, and its translation into a chat."""

    @property
    def chat(self) -> GenerationRequest: ...

    def blamed(self, error: ApiError) -> ApiError:
        """An error of the chat, with the field names of this request."""

    def document(self, reply: Reply) -> dict[str, Any]:
        """The answer that is not streamed."""


class Narrated(Asked, Protocol):
    """A request whose streams are named events."""

    def narrator(self, reply: Reply) -> Narrator:
        """A new narrator of the reply."""


def pieces_of(generation: Generation) -> list[Piece]:
    """The pieces that have come since the last call."""
    if generation.parser is not None:
        return generation.parser.take().pieces
    text = generation.take_text()
    return [Piece(text)] if text else []


def shared_fields(body: BaseModel) -> dict[str, Any]:
    """The fields of ``SHARED`` that ``body`` has in addition to its own. Raises ApiError for one
    whose result could not be shown.
    """
    sent = body.model_extra or {}
    for name, neutral in _NO_PLACE.items():
        value = sent.get(name)
        if value is not None and value not in neutral:
            raise bad_request(f"{name} is not supported here: use /v1/chat/completions", name)
    return {name: sent[name] for name in SHARED if name in sent}


def as_chat(fields: dict[str, Any], renames: Renames) -> ChatRequest:
    """The validated chat. Raises ApiError with the field names of the dialect."""
    try:
        return ChatRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        raise renames.apply(from_validation(error)) from None


def by_type(kinds: dict[str, str], default: str) -> Discriminator:
    """Chooses the tag of an object by its ``type``: ``kinds`` maps types to tags, ``default`` is a
    type.
    """

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return kinds.get(str(kind), kinds[default])

    return Discriminator(tag)


def of_type(*allowed: str, default: str | None = None) -> BeforeValidator:
    """Refuses an object whose ``type`` is not one of ``allowed``, by its name."""

    def check(value: Any) -> Any:
        given = value.get("type", default) if isinstance(value, dict) else None
        if isinstance(value, dict) and given not in allowed:
            raise PydanticCustomError(
                "not_served",
                "type {given} is not supported by this server, only {allowed}",
                {"given": shown(given), "allowed": ", ".join(allowed)},
            )
        return value

    return BeforeValidator(check)
