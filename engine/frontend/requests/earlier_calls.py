"""The calls of earlier turns in the shape that a chat template takes. Their arguments may be any
text that a model has written: cut in the middle, or no object at all.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from ..api.outline import PLAIN_BYTES
from ..formats.json_text import start_of_object
from .habits import Habits

MAX_DEPTH = 64  # nesting of arguments given as an object; templates render them recursively
# The shortest texts that complete a value, wherever its text ends.
_ENDS = (
    *("", '"', '": null', ": null", "null", "0"),
    *("ull", "ll", "l", "rue", "ue", "e", "alse", "lse", "se"),
    *('\\"', '0"', '00"', '000"', '0000"', '"": null', '\\": null'),
)


def call_arguments_for(habits: Habits, given: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """Arguments as text or object. Text that is no JSON object stays as it is where the template
    writes it so; else it is completed to an object, or becomes the only member of one.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        given = {}
    if habits.text_arguments:
        return given if isinstance(given, str) else msgspec.json.encode(given).decode()
    if not isinstance(given, str):
        return given
    found = _object(given)
    if found is not None:
        return found
    return given if habits.raw_arguments else _completed(given)


def one_by_one(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with each call in a message of its own, followed by its results."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            found.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for call in calls:
            found.append({**message, "tool_calls": [call]})
            mine = [result for result in results if result.get("tool_call_id") == call.get("id")]
            found += mine
            results = [result for result in results if result not in mine]
            message = {"role": message["role"], "content": message["content"] and ""}
        found += results
    return found


def object_of(text: str) -> dict[str, Any]:
    """Arguments that a model has written, as an object; completed where they break off."""
    found = _object(text)
    return _completed(text) if found is None else found


def _object(text: str) -> dict[str, Any] | None:
    """The object of a JSON text; None if there is none that can be passed on unchanged."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if _is_shallow(found) else None


def _completed(text: str) -> dict[str, Any]:
    start, _ = start_of_object(text) if len(text) <= PLAIN_BYTES else ("", "")
    if start and (start == text.strip() or start_of_object(text[len(start) :])[1]):
        closers, in_string = _open_at_the_end(start)
        base = start if in_string else start.rstrip().removesuffix(",")
        for end in _ENDS:
            found = _lenient(base + end + closers)
            if found is not None:
                return found
    return {"arguments": text}


def _lenient(text: str) -> dict[str, Any] | None:
    """The object of a JSON text, in which numbers that are too large are text."""
    try:
        found = json.loads(text, parse_float=_number, parse_int=_whole)
        msgspec.json.encode(found)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    return found if isinstance(found, dict) and _is_shallow(found) else None


def _number(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text


def _whole(text: str) -> int | str:
    return int(text) if len(text) < 20 else text


def _open_at_the_end(text: str) -> tuple[str, bool]:
    """The brackets that close those open at the end of ``text``, the start of a JSON value, and
    whether it ends in a string.
    """
    closers: list[str] = []
    at, in_string = 0, False
    while at < len(text):
        char = text[at]
        if in_string:
            at += char == "\\"
            in_string = char != '"'
        elif char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char in "}]":
            closers.pop()
        at += 1
    return "".join(reversed(closers)), in_string


def _is_shallow(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        members = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for each in members for inner in each if isinstance(inner, dict | list)]
        if not level:
            return True
    return False
