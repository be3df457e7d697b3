"""Tells whether a text is the start of a JSON object, without the parsers under test."""

from __future__ import annotations

import json


def starts_an_object(text: str) -> bool:
    """Whether ``text`` can go on to a JSON object: tries to go on in the few ways there are."""
    if not text:
        return True
    closers, in_string, escaped = [], False, False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char in "}]":
            if not closers:
                return False
            closers.pop()
    end = "".join(reversed(closers))
    rest = (
        ['""', '"', '"', 'u0000"', '0000"', '000"', '00"', '0"']
        if in_string
        else ["", "0", '"":0', ":0", *("null"[at:] for at in (1, 2, 3)), *("true"[at:] for at in (1, 2, 3))]
        + ["alse", "lse", "se", "e", '"": 0']
    )
    tails = [tail + more for tail in rest for more in ("", ": 0")]
    for tail in tails:
        try:
            return isinstance(json.loads(text + tail + end), dict)
        except ValueError:
            continue
    return False
