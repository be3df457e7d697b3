"""Kinds of values in a recipe: ``auto``, sizes with a unit, switches."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter

_SIZE = TypeAdapter(ByteSize)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "fp8_e4m3": "fp8"}
_COLLECTOR = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^\s?#]*)?")
_ENDPOINT = re.compile(r"tcp://(?P<host>\*|[0-9.]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)


def none_for_auto(value: object) -> object:
    """Reads ``auto`` as None and refuses a YAML null."""
    if value == "auto":
        return None
    if value is None:
        raise ValueError("should be auto or a whole number")
    return value


def switch(value: object) -> object:
    """Undoes YAML 1.1, which reads a bare ``on`` or ``off`` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def short_dtype(value: object) -> object:
    """The short name of a dtype, for any name in use."""
    if value in ("float16", "fp16", "half"):
        raise ValueError("nothing computes in float16; should be 'auto', 'bf16' or 'fp32'")
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _size(value: object, *, allowed: str = "a number of bytes, or a size such as 512MiB or 80GB") -> object:
    """Bytes from text; returns anything else as it is.

    ByteSize ignores text after the number, so that 1,5GB would be one byte: such text is refused.
    """
    if not isinstance(value, str):
        return value
    try:
        if ByteSize.byte_string_re.fullmatch(value.strip()):
            return int(_SIZE.validate_python(value))
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"should be {allowed}")


def _size_or_auto(value: object) -> object:
    allowed = "auto, a number of bytes, or a size such as 512MiB or 80GB"
    return None if value == "auto" else _size(value, allowed=allowed)


def origins(allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses values that no browser sends as the origin of a page."""
    for origin in allowed:
        if origin not in ("*", "null", "localhost") and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} should be an origin as browsers send it (scheme://host or scheme://host:port, "
                'lower case, no path, no default port), or localhost, or "*"'
            )
    if "*" in allowed and len(allowed) > 1:
        raise ValueError('"*" allows all origins and must be the only entry')
    return allowed


AutoInt = Annotated[int | None, BeforeValidator(none_for_auto)]
Size = Annotated[int, BeforeValidator(_size)]
AutoSize = Annotated[int | None, BeforeValidator(_size_or_auto)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


def endpoint(value: str) -> str:
    """Refuses addresses that a ZeroMQ socket cannot bind without a name server."""
    found = _ENDPOINT.fullmatch(value)
    try:
        if found is not None and 0 < int(found["port"]) < 65536 and found["host"] != "*":
            ip_address(found["host"].strip("[]"))
    except ValueError:
        found = None
    if value == "off" or (found is not None and 0 < int(found["port"]) < 65536):
        return value
    raise ValueError(
        "should be off or tcp://ADDRESS:PORT with an IP address of this machine, or tcp://*:PORT"
    )


def collector(value: str) -> str:
    """Refuses values that are no base URL of an OTLP collector. Its key belongs in
    OTEL_EXPORTER_OTLP_HEADERS, since recipes are shown.
    """
    if value in ("off", "on") or _COLLECTOR.fullmatch(value):
        return value
    raise ValueError("should be off, on or a URL such as http://collector:4318")
