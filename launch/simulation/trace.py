"""Request traces: read from a file, or generated.

A file holds one JSON object per line, as the public Mooncake traces do (arXiv 2407.00079):
``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``,
which name the blocks of the prompt; an id stands for its block and all blocks before it. Without
them no two prompts share a prefix. Other fields are ignored. A trace does not say which tokens an
answer had: a later turn of a conversation finds earlier prompts in the cache, but not the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from ...engine.kv.hashing import chain_hashes, hash_root
from ...engine.planner.settings import Settings
from ...engine.protocol.frontends import Submit
from ...engine.protocol.message import Sampling
from ...engine.simulation.simulation import Arrival
from ...kernels.splitmix import mix64
from ..defaults import BLOCK

GENERATED = "poisson:"
_GENERATED_KEYS = "poisson:rate=R,input=N,output=N,count=N[,seed=N]"
_MOST = 10_000_000  # tokens, or generated requests
_LAST_ID = (1 << 62) - 1
_LONGEST = 1e9  # seconds; beyond it float64 does not resolve microseconds
_UNNAMED = np.uint64(1 << 63)  # first key of blocks without a name, which no other request shares

_Tokens = Annotated[int, Meta(ge=1, le=_MOST)]
_BlockId = Annotated[int, Meta(ge=0, le=_LAST_ID)]
_PATH = re.compile(r" - at `\$\.(\w+)(?:\[(\d+)\])?`$")
_FIELD = re.compile(r"^Object (missing required|contains unknown) field `(.*)`$")
_BYTE = re.compile(r" \(byte (\d+)\)$")


class TraceError(ValueError):
    """A trace that cannot be used; the message names the line and the field."""


class _Line(msgspec.Struct):
    """A line of a file."""

    timestamp: Annotated[float, Meta(ge=0, le=1e15)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_BlockId, ...] = ()


class _Poisson(msgspec.Struct, forbid_unknown_fields=True):
    """Generated requests: ``rate`` per second on average, all of the same lengths."""

    rate: Annotated[float, Meta(ge=1e-300, le=1e300)]  # 1 / rate stays finite
    input: _Tokens
    output: _Tokens
    count: _Tokens
    seed: Annotated[int, Meta(ge=0, le=_MOST)] = 0


_WHOLE = f"should be a whole number from 1 to {_MOST:,}"
_LENGTH = f"should be a whole number of tokens from 1 to {_MOST:,}"
_ALLOWED = {
    "timestamp": "should be milliseconds, a number from 0 on",
    "input_length": _LENGTH,
    "output_length": _LENGTH,
    "hash_ids": f"should be a list of whole numbers from 0 to {_LAST_ID}",
    "rate": "should be a number of requests per second above 0",
    "input": _WHOLE,
    "output": _WHOLE,
    "count": _WHOLE,
    "seed": f"should be a whole number from 0 to {_MOST:,}",
}


@dataclass(frozen=True)
class TraceRequest:
    """Arrival in seconds, tokens of prompt and answer, and names of the prompt's first blocks."""

    seconds: float
    num_input: int
    num_output: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests by arrival, the first at 0 s. ``block``: tokens per named block."""

    source: str
    requests: tuple[TraceRequest, ...]
    block: int = BLOCK

    def arrivals(self, settings: Settings) -> Iterator[Arrival]:
        """The messages of a frontend, with handles from 0 on. A prompt is made when it arrives."""
        root = hash_root("simulated", "simulated")
        for number, request in enumerate(self.requests):
            limit = request.num_input + request.num_output
            # The planner refuses a request that is too long without reading its prompt.
            prompt = b"" if limit > settings.max_len else self.prompt(number)
            hashes = chain_hashes(root, prompt, settings.page_size) if settings.spec.prefix_caching else b""
            yield request.seconds, Submit(number, str(number), prompt, hashes, limit, Sampling(seed=number))

    def prompt(self, number: int) -> bytes:
        """A request's prompt, int32: blocks are equal if and only if their names are."""
        request = self.requests[number]
        unnamed = np.arange(-(-request.num_input // self.block) - len(request.ids), dtype=np.uint64)
        own = unnamed + np.uint64(number << 32) + _UNNAMED
        keys = mix64(np.concatenate([np.array(request.ids, np.uint64), own]))
        tokens: NDArray[np.uint64] = keys[:, None] ^ np.arange(self.block, dtype=np.uint64)
        return (tokens.reshape(-1)[: request.num_input] & np.uint64(0x7FFF_FFFF)).astype(np.int32).tobytes()


def read_trace(text: str, limit: int | None = None, speed: float = 1.0, block: int = BLOCK) -> Trace:
    """The trace that ``--trace`` names: its first ``limit`` requests, arriving ``speed`` times as
    fast. Raises TraceError.
    """
    if text.startswith(GENERATED):
        found = _generate(text, limit)
    else:
        found = list(_read(Path(text).expanduser(), limit, block))
    if not found:
        raise TraceError(f"--trace {text}: holds no request")
    first = min(request.seconds for request in found)
    last = max(request.seconds for request in found)
    span = (last - first) / speed
    if not span <= _LONGEST:
        problem = f"its requests arrive over {span:g} s at --speed {speed:g}"
        raise TraceError(f"--trace {text}: {problem}; should be {_LONGEST:g} s at most")
    moved = [
        TraceRequest((request.seconds - first) / speed, request.num_input, request.num_output, request.ids)
        for request in found
    ]
    return Trace(text, tuple(sorted(moved, key=lambda request: request.seconds)), block)


def _generate(text: str, limit: int | None) -> list[TraceRequest]:
    """A Poisson process."""
    given: dict[str, str] = {}
    for pair in text.removeprefix(GENERATED).split(","):
        key, _, value = pair.partition("=")
        if key in given:
            raise TraceError(f"--trace {text}: {key!r} is given twice; should be {_GENERATED_KEYS}")
        given[key] = value
    try:
        made = msgspec.convert(given, _Poisson, strict=False)
    except msgspec.ValidationError as error:
        if field := _FIELD.match(str(error)):
            problem = f"{field[2]} is missing" if "missing" in field[1] else f"{field[2]!r} is unknown"
            raise TraceError(f"--trace {text}: {problem}; should be {_GENERATED_KEYS}") from None
        key = _field_of(error)[0]
        raise TraceError(f"--trace {text}: {key} = {given[key]}: {_ALLOWED[key]}") from None
    random = np.random.default_rng(made.seed)
    times = np.cumsum(random.exponential(1 / made.rate, made.count)).tolist()[:limit]
    return [TraceRequest(seconds, made.input, made.output) for seconds in times]


def _read(path: Path, limit: int | None, block: int) -> Iterator[TraceRequest]:
    decoder, found = msgspec.json.Decoder(_Line), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if found == limit:
                    return
                if line.strip():
                    found += 1
                    yield _request(decoder, line.rstrip(), f"{path}: line {number}", block)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; should be a file, or {_GENERATED_KEYS}"
        raise TraceError(f"--trace {path}: {problem}") from None


def _request(decoder: msgspec.json.Decoder[_Line], text: bytes, where: str, block: int) -> TraceRequest:
    try:
        line = decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TraceError(f"{where}: {_problem(text, error)}") from None
    most = -(-line.input_length // block)
    if line.hash_ids and not line.input_length // block <= len(line.hash_ids) <= most:
        allowed = f"{most}, one per {block} tokens of input_length = {line.input_length}"
        raise TraceError(
            f"{where}: hash_ids: has {len(line.hash_ids)} blocks, should be {allowed} "
            "(--block sets the tokens per block)"
        )
    return TraceRequest(line.timestamp / 1000, line.input_length, line.output_length, line.hash_ids)


def _problem(text: bytes, error: Exception) -> str:
    """The error of a line: its field, value and what is allowed, or the column that is not JSON."""
    try:
        fields: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as malformed:
        problem = str(malformed).removeprefix("JSON is malformed: ")
        if found := _BYTE.search(problem):
            problem = f"{problem[: found.start()]} at column {int(found[1]) + 1}"
        elif "truncated" in problem:
            problem = f"ends too early, at column {len(text) + 1}"
        return f"not JSON: {problem}; expected one JSON object per line"
    if field := _FIELD.match(str(error)):
        return f"{field[2]}: missing"
    if not isinstance(fields, dict):
        return "should be an object with timestamp, input_length and output_length"
    name, index = _field_of(error)
    value = fields[name] if index is None else fields[name][index]
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    place = name if index is None else f"{name}[{index}]"
    return f"{place} = {shown}: {_ALLOWED[name]}"


def _field_of(error: Exception) -> tuple[str, int | None]:
    """The field that a msgspec error names, and the place in its list."""
    found = _PATH.search(str(error))
    assert found is not None, f"a message of msgspec without a field: {error}"
    return found[1], None if found[2] is None else int(found[2])
