"""No message is left out of the prompt without a word: its role is one that the template writes, or
stands for one, or is refused by its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.requests.conversation import conversation_text
from lockstep.engine.frontend.requests.habits import learn_habits
from lockstep.engine.frontend.requests.roles import Roles, learn_roles
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tiny_tokenizer import TEMPLATE, write_model

# Writes four roles and says nothing of others: the usual shape.
SILENT = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool'] %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
RAISING = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no ' ~ m['role']) }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
# System only in front; nothing but user and assistant behind it, in turn.
TURNS = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' or m.role == 'assistant' %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
ONLY_USERS = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}"
OBSERVING = SILENT.replace("'tool'", "'observation'")
AFTER_CALLS = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% elif m.role == 'tool' and"
    " messages[loop.index0 - 1].tool_calls %}<tool>{{ m.content }}{% endif %}{% endfor %}"
)


def rendered(path: Path, template: str, *said: tuple[str, str]) -> str:
    codec = Codec(write_model(path, template=template))
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    return conversation_text(codec, learn_habits(codec), ChatRequest.model_validate({"messages": messages}))


@pytest.mark.parametrize("template", [SILENT, RAISING])
def test_developer_is_a_system_message(template: str, tmp_path: Path) -> None:
    text = rendered(tmp_path, template, ("developer", "French!"), ("user", "hi"), ("developer", "Now!"))
    assert text == "<system>French!<user>hi<system>Now!"
    assert "<system>French!" in rendered(tmp_path, TURNS, ("developer", "French!"), ("user", "hi"))


def test_a_template_that_knows_developer_keeps_it(tmp_path: Path) -> None:
    assert "<|im_start|>developer\nFrench!" in rendered(tmp_path, TEMPLATE, ("developer", "French!"))


def test_the_result_of_a_function_is_that_of_a_tool(tmp_path: Path) -> None:
    assert rendered(tmp_path, SILENT, ("user", "hi"), ("function", "12")) == "<user>hi<tool>12"


def test_roles_that_the_template_names_are_found(tmp_path: Path) -> None:
    assert rendered(tmp_path, OBSERVING, ("user", "hi"), ("observation", "12")) == "<user>hi<observation>12"
    calls = learn_habits(Codec(write_model(tmp_path, template=AFTER_CALLS))).roles
    assert calls.written_as("function", 2) == "tool"


@pytest.mark.parametrize(
    ("template", "said", "index"),
    [
        (SILENT, [("user", "a"), ("critic", "b")], 1),
        (SILENT, [("critic", "a"), ("user", "b")], 0),
        (RAISING, [("user", "a"), ("critic", "b")], 1),
        (TURNS, [("user", "a"), ("system", "b")], 1),
        (TURNS, [("system", "a"), ("developer", "b"), ("user", "c")], 1),
        (TURNS, [("user", "a"), ("assistant", "b"), ("tool", "c")], 2),
        (ONLY_USERS, [("system", "a"), ("user", "b")], 0),
        (ONLY_USERS, [("developer", "a"), ("user", "b")], 0),
        (ONLY_USERS, [("user", "a"), ("function", "b")], 1),
        (OBSERVING, [("user", "a"), ("tool", "b")], 1),
    ],
)
def test_a_message_that_would_be_left_out_is_refused(
    template: str, said: list[tuple[str, str]], index: int, tmp_path: Path
) -> None:
    with pytest.raises(ApiError) as refused:
        rendered(tmp_path, template, *said)
    assert refused.value.status_code == 400
    assert refused.value.param == f"messages[{index}].role"
    assert f"messages[{index}].role" in refused.value.detail
    assert repr(said[index][0]) in refused.value.detail


def test_nothing_is_known_of_a_template_that_refuses_every_probe() -> None:
    assert learn_roles("", lambda messages: None) == Roles()
    assert Roles().written_as("developer", 0) == "developer"
