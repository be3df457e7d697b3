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
# As gpt-oss: one call a message, no content beside reasoning and a call, results named by the call.
HARMONY = (
    TOOLS + "{% set last = namespace(name='') %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls is defined %}{% set call = m.tool_calls[0].function %}"
    "{% if m.content and m.thinking %}{{ raise_exception('content and thinking') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.content or m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}"
    "<|call|>{% set last.name = call.name %}"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}{{ '' if last.name else raise_exception('no call') }}"
    "<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As Qwen3 and Kimi-K2: arguments as text or object.
STRINGS = (
    TOOLS + "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}:"
    "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
)
