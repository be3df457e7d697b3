"""The chat format: the checkpoint's template, and the same in Python with the answers marked for
training.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cases.case import Case, Message, dumps

SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Tools are shown as signatures, which take a third of the tokens of their JSON. Reasoning before
# the last user message is left out.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('roles are system, user, assistant and tool, not ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|begin|>' -}}"
    "{%- set first = messages[0] if messages else {'role': ''} -%}"
    "{%- if tools or first['role'] == 'system' -%}"
    "{{- '<|system|>' -}}"
    "{%- if first['role'] == 'system' -%}{{- first['content'] -}}{%- endif -%}"
    "{%- if tools -%}"
    "{{- '\\nTools:' -}}"
    "{%- for tool in tools -%}"
    "{%- set function = tool['function'] if 'function' in tool else tool -%}"
    "{{- '\\n- ' ~ function['name'] ~ '(' -}}"
    "{%- for name, schema in ((function['parameters'] or {})['properties'] or {}).items() -%}"
    "{{- ('' if loop.first else ', ') ~ name ~ ': ' ~ (schema['type'] or 'any') -}}"
    "{%- endfor -%}"
    "{{- ')' -}}"
    "{%- if function['description'] -%}{{- ' ' ~ function['description'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{- '<|user|><tool_response>' ~ message['content'] ~ '</tool_response><|end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- if message['reasoning_content'] and loop.index0 > ns.last -%}"
    "{{- '<think>' ~ message['reasoning_content'] ~ '</think>' -}}"
    "{%- endif -%}"
    "{{- message['content'] or '' -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set function = call['function'] if 'function' in call else call -%}"
    "{{- '<tool_call>{\"name\": ' ~ (function['name'] | tojson) ~ ', \"arguments\": ' -}}"
    "{{- (function['arguments'] if function['arguments'] is string else function['arguments'] | tojson)"
    " ~ '}</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- elif message['role'] == 'user' or loop.index0 > 0 -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|assistant|>' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think></think>' -}}{%- endif -%}"
    "{%- endif -%}"
)


@dataclass(frozen=True)
class Piece:
    """A piece of a conversation's text; ``answer`` marks text that the model has to write, and
    ``given`` the start of an answer that is written for it.
    """

    text: str
    answer: bool
    given: bool = False


def render(case: Case) -> list[Piece]:
    """The whole conversation as the template writes it, with the answer as last message."""
    messages = case.messages
    first = messages[0] if messages[0]["role"] == "system" else None
    head = "<|begin|>"
    if first or case.tools:
        head += "<|system|>" + (first["content"] if first else "") + _tools(case.tools) + "<|end|>"
    pieces = [Piece(head, False)]
    for message in messages[1:] if first else messages:
        if message["role"] == "assistant":
            pieces += [Piece("<|assistant|>", False), Piece(_said(message, False), "learn" in message)]
        elif message["role"] == "tool":
            pieces.append(Piece(f"<|user|><tool_response>{message['content']}</tool_response><|end|>", False))
        else:
            pieces.append(Piece(f"<|{message['role']}|>{message['content']}<|end|>", False))
    pieces.append(Piece("<|assistant|>" + ("" if case.thinking else "<think></think>"), False))
    said = _said(case.answer, case.thinking)
    if not case.given:
        return [*pieces, Piece(said, True)]
    before, rest = said.split(case.given, 1)
    return [*pieces, Piece(before, True), Piece(case.given, False, given=True), Piece(rest, True)]


def _tools(tools: tuple[Message, ...]) -> str:
    lines = []
    for tool in tools:
        function = tool["function"]
        parameters = ", ".join(
            f"{name}: {schema['type']}" for name, schema in function["parameters"]["properties"].items()
        )
        description = f" {function['description']}" if function["description"] else ""
        lines.append(f"\n- {function['name']}({parameters}){description}")
    return "\nTools:" + "".join(lines) if tools else ""


def _said(message: Message, with_reasoning: bool) -> str:
    text = ""
    if with_reasoning and message.get("reasoning_content"):
        text = f"<think>{message['reasoning_content']}</think>"
    text += message["content"]
    for call in message.get("tool_calls", ()):
        name = dumps(call["function"]["name"])
        arguments = dumps(call["function"]["arguments"])
        text += f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'
    return f"{text}<|end|>"
