"""The body of /invocations: of a chat if it has messages, else of a text completion."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from .schemas import ChatRequest, CompletionRequest


def _kind(body: Any) -> str:
    return (
        "ChatRequest" if isinstance(body, dict) and body.get("messages") is not None else "CompletionRequest"
    )


Invocation = Annotated[
    Annotated[ChatRequest, Tag("ChatRequest")] | Annotated[CompletionRequest, Tag("CompletionRequest")],
    Discriminator(_kind),
]
