"""Rendering a conversation with the model's chat template."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.requests.chat_template import RESERVED_KWARGS, render
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


def test_names_of_the_renderer_are_refused_and_all_others_work(tmp_path: Path) -> None:
    codec = Codec(write_model(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    own = inspect.signature(render_jinja_template).parameters
    functions = _compile_jinja_template(codec.chat_template).environment.globals
    values = {"conversations", "chat_template", "return_assistant_tokens_mask", "self", *functions}
    assert values <= set(RESERVED_KWARGS)
    given_by_us = {"tools", "add_generation_prompt", "continue_final_message", "documents", "kwargs"}
    assert set(own) - values <= given_by_us, "the renderer has got another argument"
    for name in RESERVED_KWARGS:
        with pytest.raises(ApiError, match=rf"chat_template_kwargs\.{name} is not allowed") as refused:
            render(codec, USER, None, **{name: 5})
        assert refused.value.param == "chat_template_kwargs"
    for name in (
        "kwargs",
        "args",
        "codec",
        "loop",
        "caller",
        "context",
        "environment",
        "super",
        "m",
        "",
        "a b",
    ):
        assert render(codec, USER, None, **{name: 5}) == "x", name
    for wrong in (5, "x", {}, [1]):
        with pytest.raises(ApiError, match=r"chat_template_kwargs\.documents should be a list of objects"):
            render(codec, USER, None, documents=wrong)
    assert render(codec, USER, None, documents=[{"text": "t"}]) == "x"


@pytest.mark.parametrize("in_files", [False, True])
def test_several_templates_one_of_them_for_tools(in_files: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if in_files:
        (path / "chat_template.jinja").write_text("PLAIN")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    else:
        settings["chat_template"] = [
            {"name": "default", "template": "PLAIN"},
            {"name": "tool_use", "template": "TOOLS"},
        ]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    codec = Codec(path)
    assert codec.template_for(None) == "PLAIN"
    assert codec.template_for([{"type": "function", "function": {"name": "f"}}]) == "TOOLS"
    assert codec.chat_template is not None
    assert sorted(codec.chat_template.split("\n")) == ["PLAIN", "TOOLS"]
