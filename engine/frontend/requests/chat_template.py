"""A conversation rendered by the model's chat template. Rendering may take long: for threads."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ...text.tokenizer import Codec
from ..api.errors import bad_request

RESERVED_KWARGS = (
    "tokenize",
    "chat_template",
    "conversation",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
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
            raise bad_request(f"chat_template_kwargs.{name} is not allowed", "chat_template_kwargs")
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
