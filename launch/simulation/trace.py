"""Traffic to simulate: a trace of requests read from a file, or a made one.

A file holds a JSON object a line, as the public Mooncake traces do (arXiv 2407.00079):
``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``,
which name the blocks of the prompt, each with everything before it; where a trace has none, no two
prompts begin alike. What else stands in a line is not looked at. Nothing in a trace says which
tokens an answer had, so that a later turn finds the prompts of earlier ones in the cache, and not
their answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.kv.hashing import chain_hashes, hash_root
from ...engine.planner.settings import Settings
from ...engine.protocol.frontends import Submit
from ...engine.protocol.message import Sampling
from ...engine.simulation.simulation import Arrival
from ...kernels.splitmix import mix64
from ..defaults import BLOCK

MADE = "poisson:"
_MADE_KEYS = "poisson:rate=R,input=N,output=N,count=N[,seed=N]"
_MOST = 10_000_000  # tokens, or requests of a made trace
_LONGEST = 1e9  # seconds from the first request to the last: beyond it, virtual time would not tell microseconds apart
_LAST_ID = (1 << 62) - 1
_NOBODYS = np.uint64(1 << 63)  # blocks that the trace does not name are their request's own


class TraceError(ValueError):
    """A trace that cannot be used; the message names the line and the field."""


@dataclass(frozen=True)
class Ask:
    """A request: when it arrives in seconds, tokens of its prompt and of its answer, and the names
    of the prompt's first blocks.
    """

    seconds: float
    num_input: int
    num_output: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, the first at 0. ``block``: tokens of a named
    block.
    """

    source: str
    asks: tuple[Ask, ...]
    block: int = BLOCK

    def arrivals(self, settings: Settings) -> Iterator[Arrival]:
        """What a frontend sends when a request comes; handles count from 0 on. A prompt is made
        when it is its turn.
        """
        root = hash_root("simulated", "simulated")
        for number, ask in enumerate(self.asks):
            limit = ask.num_input + ask.num_output
            # What is too long is refused unread, and has no need of a prompt.
            prompt = b"" if limit > settings.max_len else self.prompt(number)
            hashes = chain_hashes(root, prompt, settings.page_size) if settings.spec.prefix_caching else b""
            yield ask.seconds, Submit(number, str(number), prompt, hashes, limit, Sampling(seed=number))

    def prompt(self, number: int) -> bytes:
        """Tokens of a request's prompt, int32: equal where the names of blocks are equal, and
        nowhere else.
        """
        ask = self.asks[number]
        own = (
            np.arange(-(-ask.num_input // self.block) - len(ask.ids), dtype=np.uint64)
            + np.uint64(number << 32)
            + _NOBODYS
        )
        keys = mix64(np.concatenate([np.array(ask.ids, np.uint64), own]))
        tokens: NDArray[np.uint64] = keys[:, None] ^ np.arange(self.block, dtype=np.uint64)
        return (tokens.reshape(-1)[: ask.num_input] & np.uint64(0x7FFF_FFFF)).astype(np.int32).tobytes()


def read_trace(text: str, requests: int | None = None, speed: float = 1.0, block: int = BLOCK) -> Trace:
    """The trace that ``--trace`` names: its first ``requests``, arriving ``speed`` times as fast.
    Raises TraceError.
    """
    asks = (
        _made(text, requests)
        if text.startswith(MADE)
        else list(_lines(Path(text).expanduser(), requests, block))
    )
    if not asks:
        raise TraceError(f"--trace {text}: holds no request")
    first, last = min(ask.seconds for ask in asks), max(ask.seconds for ask in asks)
    if not (last - first) / speed <= _LONGEST:
        took = f"its requests arrive over {(last - first) / speed:g} s at --speed {speed:g}"
        raise TraceError(f"--trace {text}: {took}; should be {_LONGEST:g} s at most")
    moved = [Ask((ask.seconds - first) / speed, ask.num_input, ask.num_output, ask.ids) for ask in asks]
    return Trace(text, tuple(sorted(moved, key=lambda ask: ask.seconds)), block)


# --------------------------------------------------------------------------- made traffic


def _made(text: str, requests: int | None) -> list[Ask]:
    """Arrivals at random and independent of each other, ``rate`` a second on average; all lengths
    are the same.
    """
    given: dict[str, str] = {}
    for pair in text.removeprefix(MADE).split(","):
        key, _, value = pair.partition("=")
        if key not in ("rate", "input", "output", "count", "seed") or key in given:
            raise TraceError(
                f"--trace {text}: {key!r} is {'given twice' if key in given else 'unknown'}; should be {_MADE_KEYS}"
            )
        given[key] = value
    for key in ("rate", "input", "output", "count"):
        if key not in given:
            raise TraceError(f"--trace {text}: {key} is missing; should be {_MADE_KEYS}")
    count = _whole(text, "count", given["count"], 1)
    num_input, num_output = (
        _whole(text, "input", given["input"], 1),
        _whole(text, "output", given["output"], 1),
    )
    try:
        rate = float(given["rate"])
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf or math.isinf(1 / rate):
        raise TraceError(
            f"--trace {text}: rate = {given['rate']}: should be a number of requests a second above 0"
        )
    random = np.random.default_rng(_whole(text, "seed", given.get("seed", "0"), 0))
    times = np.cumsum(random.exponential(1 / rate, count)).tolist()[:requests]
    return [Ask(seconds, num_input, num_output) for seconds in times]


def _whole(text: str, key: str, value: str, least: int) -> int:
    if not value.isascii() or not value.isdigit() or not least <= int(value) <= _MOST:
        raise TraceError(
            f"--trace {text}: {key} = {value}: should be a whole number from {least} to {_MOST:,}"
        )
    return int(value)


# --------------------------------------------------------------------------- a file


def _lines(path: Path, requests: int | None, block: int) -> Iterator[Ask]:
    found = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if found == requests:
                    return
                if line.strip():
                    found += 1
                    yield _ask(line, f"{path}: line {number}", block)
    except OSError as error:
        raise TraceError(
            f"--trace {path}: cannot be read: {error.strerror}; a file, or {_MADE_KEYS}"
        ) from None


def _ask(line: bytes, where: str, block: int) -> Ask:
    try:
        fields = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise TraceError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; should be an object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: should be an object with timestamp, input_length and output_length")
    for name in ("timestamp", "input_length", "output_length"):
        if name not in fields:
            raise TraceError(f"{where}: {name}: missing")
    timestamp = fields["timestamp"]
    if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not 0 <= timestamp <= 1e15:
        raise TraceError(
            f"{where}: timestamp = {_show(timestamp)}: should be milliseconds, a number from 0 on"
        )
    lengths = {}
    for name in ("input_length", "output_length"):
        value = fields[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise TraceError(
                f"{where}: {name} = {_show(value)}: should be a whole number of tokens from 1 to {_MOST:,}"
            )
        lengths[name] = value
    ids = _ids(fields.get("hash_ids", ()), where, lengths["input_length"], block)
    return Ask(timestamp / 1000, lengths["input_length"], lengths["output_length"], ids)


def _ids(value: Any, where: str, num_input: int, block: int) -> tuple[int, ...]:
    """Names of blocks; a last one that is not full may be named or not."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TraceError(
            f"{where}: hash_ids = {_show(value)}: should be a list of whole numbers, one for every {block} tokens"
        )
    for one in value:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one <= _LAST_ID:
            raise TraceError(
                f"{where}: hash_ids: {_show(one)}: should be a whole number from 0 to {_LAST_ID}"
            )
    if value and not num_input // block <= len(value) <= -(-num_input // block):
        want = f"{-(-num_input // block)}, one for every {block} tokens of its {num_input} (--block says how many a block has)"
        raise TraceError(f"{where}: hash_ids: has {len(value)} blocks, should be {want}")
    return tuple(value)


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
