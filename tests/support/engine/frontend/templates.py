"""Chat templates in the manners of several families."""

from __future__ import annotations

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
# As Qwen3 and Kimi-K2: arguments as text or object.
STRINGS = (
    TOOLS + "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}:"
    "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
)
