"""A conversation rendered by the model's chat template. Rendering may take long: for threads."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ...text.tokenizer import Codec
from ..api.errors import bad_request, shown

# Arguments of the renderer and of apply_chat_template, and functions that every template may call.
RESERVED_KWARGS = (
    "self",
    "conversations",
    "return_assistant_tokens_mask",
    "tokenize",
    "chat_template",
    "conversation",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
    "raise_exception",
    "strftime_now",
    "dict",
    "namespace",
    "range",
    "cycler",
    "joiner",
    "lipsum",
)


def render(
    codec: Codec, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, /, **kwargs: Any
) -> str:
    """The prompt text of a conversation; ``kwargs`` are variables of the template. Raises ApiError
    where there is no template or it refuses the messages.
    """
    if codec.chat_template is None:
        raise bad_request("This model has no chat template: use /v1/completions", "messages")
    for name in RESERVED_KWARGS:
        if name in kwargs:
            reason = f"chat_template_kwargs.{name} is not allowed: the renderer uses that name itself"
            raise bad_request(reason, "chat_template_kwargs")
    documents = kwargs.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        reason = f"chat_template_kwargs.documents should be a list of objects (got {shown(documents)})"
        raise bad_request(reason, "chat_template_kwargs")
    variables = {**codec.special_tokens, **kwargs}
    try:
        # apply_chat_template drops keys that are None, and templates test whether content is none.
        text: str = render_jinja_template(
            [messages],
            tools=[*tools] if tools else None,
            chat_template=codec.template_for(tools),
            **variables,
        )[0][0]
    except Exception as error:  # a template may raise anything: jinja errors, TypeError, ValueError
        reason = f"The chat template refused the messages: {str(error)[:300]}"
        raise bad_request(reason, "messages") from error
    return text
