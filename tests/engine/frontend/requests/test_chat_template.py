"""Rendering a conversation with the model's chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.requests.chat_template import render
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tiny_tokenizer import write_model

USER = [{"role": "user", "content": "x"}]


def test_render_refuses_a_template_error_and_reserved_names(tmp_path: Path) -> None:
    codec = Codec(write_model(tmp_path / "model"))
    with pytest.raises(ApiError, match=r"chat_template_kwargs\.tokenize is not allowed"):
        render(codec, USER, None, tokenize=True)
    assert render(codec, USER, None, add_generation_prompt=True).endswith("assistant\n")
    refusing = Codec(write_model(tmp_path / "refusing", template="{{ raise_exception('no') }}"))
    with pytest.raises(ApiError, match="The chat template refused the messages: no"):
        render(refusing, USER, None)
