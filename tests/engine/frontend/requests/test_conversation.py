"""The habits of a chat template are found by probes, and messages are given to it in its shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.requests.conversation import Habits, conversation_text, learn_habits
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tiny_tokenizer import TEMPLATE, TOOL_TEMPLATE, write_model

TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
ITEMS = (
    TOOLS + "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v }}</arg_value>{% endfor %}"
    "{% endfor %}{% endfor %}"
)
# As DeepSeek-V3: joins arguments as text, and looks for calls only where there is no content.
JOINED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}"
    "{{ c['type'] + ' ' + c['function']['name'] + '\\n' + c['function']['arguments'] }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
# As Mistral: an id must have nine characters.
NINE = (
    TOOLS + "{% for m in messages %}{% if m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "habits"),
    [
        (TEMPLATE, Habits()),
        (TOOL_TEMPLATE, Habits(shows_tools=True)),
        (ITEMS, Habits(shows_tools=True)),
        (JOINED, Habits(text_arguments=True, null_content=True)),
        (NINE, Habits(shows_tools=True)),
        ("{{ raise_exception('no') }}", Habits()),
    ],
    ids=["plain", "hermes", "items", "joined", "nine", "refusing"],
)
def test_habits(template: str, habits: Habits, tmp_path: Path) -> None:
    assert learn_habits(Codec(write_model(tmp_path, template=template))) == habits


def test_calls_are_written_in_the_way_of_the_template(tmp_path: Path) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    ask = ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    for template, expected in (
        (JOINED, 'function f\n{"a":  1}'),
        (ITEMS, "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>"),
    ):
        codec = Codec(write_model(tmp_path, template=template))
        assert conversation_text(codec, learn_habits(codec), ask) == expected


def test_arguments_that_are_no_object_are_refused_by_their_place(tmp_path: Path) -> None:
    codec = Codec(write_model(tmp_path, template=ITEMS))
    for bad in ("{", "[1]", "[" * 60_000):
        call = {"function": {"name": "f", "arguments": bad}}
        ask = ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})
        with pytest.raises(
            ApiError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: not a JSON object"
        ):
            conversation_text(codec, learn_habits(codec), ask)
