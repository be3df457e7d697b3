"""The roles of messages that a chat template writes, found by rendering probes.

Templates differ in their handling of unknown roles: some raise, some silently leave the message
out. We never leave a message out: it is written under a role that the template knows, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Probe = Callable[[list[dict[str, Any]]], str | None]  # the prompt, None where the template raises

PROBE_TEXT = "probe_text"
_UNKNOWN = "probe_role"
_USUAL = ("system", "developer", "tool", "function")
_ALWAYS = ("user", "assistant")
# Roles that stand for another one where the template does not write them.
STANDS_FOR = {"developer": "system", "function": "tool"}
_LITERAL = re.compile(r"""['"]([A-Za-z][\w-]{1,63})['"]""")
_MAX_LITERALS = 128


class Fate(Enum):
    """The treatment of a message by the template."""

    WRITTEN = "written"
    DROPPED = "dropped"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Roles:
    """``fates`` by role and whether the message is the first one; ``others`` are those of roles
    that are not listed. A role in neither is written as it is.
    """

    fates: Mapping[tuple[str, bool], Fate] = field(default_factory=dict)
    others: Mapping[bool, Fate] = field(default_factory=dict)

    def fate(self, role: str, index: int) -> Fate:
        """The treatment of message number ``index`` of a conversation."""
        if role in _ALWAYS:
            return Fate.WRITTEN
        first = index == 0
        return self.fates.get((role, first), self.others.get(first, Fate.WRITTEN))

    def written_as(self, role: str, index: int) -> str:
        """The role under which the template writes message number ``index``; ``role`` itself where
        there is none.
        """
        other = STANDS_FOR.get(role)
        if other is None or self.fate(role, index) is Fate.WRITTEN:
            return role
        return other if self.fate(other, index) is Fate.WRITTEN else role


def learn_roles(template: str, probe: Probe) -> Roles:
    """Tries every role that the template's source may name, the usual roles and an unknown one, as
    the first and as a later message of a conversation.
    """
    if PROBE_TEXT not in (probe([_message("user")]) or ""):
        return Roles()
    unknown = {first: _fate(probe, _UNKNOWN, first) for first in (True, False)}
    others = {first: fate for first, fate in unknown.items() if fate is not Fate.WRITTEN}
    names = dict.fromkeys(_USUAL)
    if others:
        names |= dict.fromkeys(_LITERAL.findall(template)[:_MAX_LITERALS])
    fates = {
        (role, first): _fate(probe, role, first)
        for role in names
        if role not in _ALWAYS
        for first in (True, False)
    }
    return Roles({key: fate for key, fate in fates.items() if fate is not unknown[key[1]]}, others)


def _fate(probe: Probe, role: str, first: bool) -> Fate:
    """The best fate of a message of ``role`` in the usual places of a conversation."""
    message = {**_message(role), "name": "probe_function", "tool_call_id": "probe0001"}
    user = {"role": "user", "content": "x"}
    reply = {"role": "assistant", "content": "y"}
    function = {"name": "probe_function", "arguments": {}}
    call = {"id": "probe0001", "type": "function", "function": function}
    caller = {"role": "assistant", "content": "", "tool_calls": [call]}
    as_text = {**call, "function": {**function, "arguments": "{}"}}
    text_caller = {"role": "assistant", "content": None, "tool_calls": [as_text]}
    places: list[list[dict[str, Any]]] = (
        [[message, user], [message]]
        if first
        else [
            [user, message],
            [user, reply, message],
            [user, caller, message],
            [user, text_caller, message],
            [user, reply, message, user],
        ]
    )
    fate = Fate.REFUSED
    for place in places:
        text = probe(place)
        if text is not None and PROBE_TEXT in text:
            return Fate.WRITTEN
        if text is not None:
            fate = Fate.DROPPED
    return fate


def _message(role: str) -> dict[str, Any]:
    return {"role": role, "content": PROBE_TEXT}
