"""The counts of one frontend. Packed, they can be added to those of another frontend or of an
earlier process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from ..requests.generation import REASONS, Generation
from .histogram import Histogram


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to ``limit``."""
    bounds = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= limit)


_BELOW_ONE = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
FIRST_TOKEN = (*_BELOW_ONE, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
HTTP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = one_two_five(10**9)
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
SIZES = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_max_tokens",
)
DROPPED = ("access_log_line", "span")  # kinds of records about requests that may be dropped
LONGEST = "request_max_num_generation_tokens"
REQUEST_PHASES = (
    "e2e_request_latency",
    "request_queue_time",
    "request_prefill_time",
    "request_decode_time",
    "request_inference_time",
)


class Packed(msgspec.Struct, array_like=True):
    """Counters as stored in shared memory. Histograms are (counts by bucket, sum).

    ``at`` is the time in seconds of CLOCK_MONOTONIC, ``open`` the number of open requests then,
    ``state`` the newest ClusterState, encoded, and ``number`` its number.
    """

    at: float
    open: int
    number: int
    state: bytes
    histograms: dict[str, tuple[list[int], float]]
    finishes: dict[str, int]
    http: list[tuple[str, str, str, int]]
    http_seconds: list[tuple[str, str, list[int], float]]
    dropped: dict[str, int] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Packed).decode


class Counters:
    """Counts and histograms, for one thread. HTTP requests are labelled by route, never by the path
    as sent, so labels stay few.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN)
        self.inter_token = Histogram(PER_TOKEN)
        self._per_token = Histogram(PER_TOKEN)
        self._phases = {name: Histogram(PER_REQUEST) for name in REQUEST_PHASES}
        self._choices = Histogram(CHOICES)
        self._preemptions = Histogram(PREEMPTIONS)
        self.sizes = {name: Histogram(TOKENS) for name in (*SIZES, LONGEST)}
        self.finishes = Counter(dict.fromkeys(REASONS.values(), 0))
        self.dropped = Counter(dict.fromkeys(DROPPED, 0))
        self.http: Counter[tuple[str, str, str]] = Counter()
        self.http_seconds: dict[tuple[str, str], Histogram] = {}
        self.histograms = {
            "time_to_first_token_seconds": self.first_token,
            "inter_token_latency_seconds": self.inter_token,
            "request_time_per_output_token_seconds": self._per_token,
            **{f"{name}_seconds": histogram for name, histogram in self._phases.items()},
            "request_params_n": self._choices,
            "request_num_preemptions": self._preemptions,
        }

    def finished(self, generation: Generation, now: float) -> None:
        self.finishes[generation.finish or "error"] += 1
        if generation.finish == "error" or not generation.first:
            return
        started = generation.started or generation.first
        seconds = {
            "e2e_request_latency": now - generation.submitted,
            "request_queue_time": started - generation.submitted,
            "request_prefill_time": generation.first - started,
            "request_decode_time": generation.last - generation.first,
            "request_inference_time": generation.last - started,
        }
        for name, value in seconds.items():
            self._phases[name].observe(value)
        num_tokens = len(generation.tokens)
        if num_tokens > 1:
            self._per_token.observe((generation.last - generation.first) / (num_tokens - 1))
        self._preemptions.observe(generation.num_preemptions)
        num_prompt = len(generation.prompt)
        computed = num_prompt - min(num_prompt, generation.num_cached)
        sizes = (num_prompt, num_tokens, computed, generation.max_tokens)
        for name, size in zip(SIZES, sizes, strict=True):
            self.sizes[name].observe(size)

    def answered(self, choices: Sequence[Generation]) -> None:
        """Counts a prompt whose choices have all ended."""
        if any(generation.first for generation in choices):
            self._choices.observe(len(choices))
            self.sizes[LONGEST].observe(max(len(generation.tokens) for generation in choices))

    def request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Counts an HTTP request that has been answered."""
        self.http[handler, method, f"{status // 100}xx"] += 1
        self._http_histogram(handler, method).observe(seconds)

    def pack(self, at: float, open: int, number: int = 0, state: bytes = b"") -> bytes:
        """Packs the counts for ``add``; see ``Packed`` for the arguments."""
        named = {name: histogram.pack() for name, histogram in (self.histograms | self.sizes).items()}
        http = [(*labels, count) for labels, count in self.http.items()]
        seconds = [(*labels, *histogram.pack()) for labels, histogram in self.http_seconds.items()]
        finishes = dict(self.finishes)
        dropped = dict(self.dropped)
        return _encode(Packed(at, open, number, state, named, finishes, http, seconds, dropped))

    def add(self, packed: Packed) -> None:
        """Adds the counts of another frontend of the same version."""
        own = self.histograms | self.sizes
        for name, (counts, total) in packed.histograms.items():
            own[name].add(counts, total)
        self.finishes.update(packed.finishes)
        self.dropped.update(packed.dropped)
        for handler, method, status, count in packed.http:
            self.http[handler, method, status] += count
        for handler, method, counts, total in packed.http_seconds:
            self._http_histogram(handler, method).add(counts, total)

    def _http_histogram(self, handler: str, method: str) -> Histogram:
        key = handler, method
        if key not in self.http_seconds:
            self.http_seconds[key] = Histogram(HTTP_SECONDS)
        return self.http_seconds[key]


def unpack(text: bytes) -> Packed:
    """Reads the bytes of ``Counters.pack``."""
    return _decode(text)
