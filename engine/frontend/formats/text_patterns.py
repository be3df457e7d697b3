"""Patterns of the texts that the string keywords of JSON schema allow, as regular expressions that
match a text from start to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ANY = r"(.|\n)*"
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_MONTHS = (
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    r"02-(0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"[0-9]{{3}}[1-9]-{_MONTHS}"  # there is no year 0
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,8}}"
# Some of the texts of every format, never others. A format that is not here restricts nothing.
FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P([0-9]{1,9}D(T[0-9]{1,9}H)?|T[0-9]{1,9}[HMS]|[0-9]{1,9}[YMW])",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"[a-z][a-z0-9+.-]{{0,15}}://{_HOST}(:[0-9]{{1,4}})?(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?",
}


def text_patterns(schemas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Patterns all of which a text must match that follows each of ``schemas``; none if any text
    does.
    """
    found = [searching(schema["pattern"]) for schema in schemas if "pattern" in schema]
    names = [schema["format"] for schema in schemas if "format" in schema]
    found += [FORMATS[name] for name in names if name in FORMATS]
    least = max((schema.get("minLength", 0) for schema in schemas), default=0)
    most = min((schema["maxLength"] for schema in schemas if "maxLength" in schema), default=None)
    if most is not None and most < least:
        raise ValueError(f"minLength ({least}) is greater than maxLength ({most})")
    if least or most is not None:
        found.append(f"(.|\\n){{{least},{'' if most is None else most}}}")
    return found


def searching(pattern: str) -> str:
    """A pattern for all texts in which ``pattern`` is found somewhere."""
    return "|".join(map(_padded, _alternatives(pattern)))


def _padded(pattern: str) -> str:
    at_start = pattern.startswith("^")
    body = pattern[at_start:]
    at_end = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    body = body[:-1] if at_end else body
    return f"{'' if at_start else ANY}({body}){'' if at_end else ANY}"


def _alternatives(pattern: str) -> Iterator[str]:
    """The parts of a pattern between bars outside groups and classes."""
    start = at = depth = 0
    in_class = False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            yield pattern[start:at]
            start = at + 1
        at += 1
    yield pattern[start:]
