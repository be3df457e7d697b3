"""Times runs and measures their ceilings in the same run: the bandwidth of a copy and the rates of
large products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .call import Call

_FLUSHED_BYTES = 256 << 20  # more than any card's L2 cache
_FEWEST, _MOST = 5, 200

Run = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_s of a copy (read and written); flops of a product in
    bf16 and in FP8 (0: not measured, taken as twice the bf16 rate); on a CPU also those of fused
    multiply-adds in float32.
    """

    bytes_per_s: float
    flops: float
    fp8_flops: float = 0.0
    fma_flops: float = 0.0

    def memory_us(self, call: Call) -> float:
        return call.num_bytes / self.bytes_per_s * 1e6

    def compute_us(self, call: Call) -> float:
        flops = max(self.flops, self.fma_flops)
        return call.flops / ((self.fp8_flops or 2 * flops) if call.fp8 else flops) * 1e6

    def bound(self, call: Call) -> tuple[float, str]:
        """The least time in microseconds, and the ceiling that sets it."""
        memory = self.memory_us(call)
        compute = self.compute_us(call)
        return max(memory, compute), "memory" if memory >= compute else "compute"


def measure_ceilings(device: torch.device) -> Ceilings:
    """Times a copy far larger than the caches, and square products of random numbers."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    copy = time_of(lambda: target.copy_(source), device)[1]
    product = time_of(lambda: a @ a, device)[1]
    fp8_flops = 0.0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        a8 = a.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        product8 = time_of(
            lambda: torch._scaled_mm(a8, a8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device
        )[1]
        fp8_flops = 2 * side**3 / product8 * 1e6
    fma = 0.0
    if device.type == "cpu":
        from .fma_rate import fma_flops  # compiles a kernel

        fma = fma_flops()
    return Ceilings(2 * size / copy * 1e6, 2 * side**3 / product * 1e6, fp8_flops, fma)


def time_of(
    run: Run, device: torch.device, seconds: float = 0.5, capture: bool = True
) -> tuple[float, float, float]:
    """p20, p50 and p80 in microseconds, over at least five runs. On a card, with a cold L2 cache,
    as a captured graph or as plain calls.
    """
    for _ in range(2):
        run()
    samples = (
        _cuda_samples(run, device, seconds, capture) if device.type == "cuda" else _cpu_samples(run, seconds)
    )
    cuts = statistics.quantiles(samples, n=10)
    return cuts[1], statistics.median(samples), cuts[7]


def _cpu_samples(run: Run, seconds: float) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < _FEWEST or (time.perf_counter() < end and len(samples) < _MOST):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def _cuda_samples(run: Run, device: torch.device, seconds: float, capture: bool) -> list[float]:
    replay = run
    if capture:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            replay = graph.replay
        except RuntimeError as error:
            print(f"  not captured, timed as it is called: {str(error)[:80]}")
            torch.cuda.synchronize()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    (first,) = _timed(replay, flushed, 1)
    return _timed(replay, flushed, max(_FEWEST, min(_MOST // 4, int(seconds / (first * 1e-6 + 2e-4)))))


def _timed(replay: Run, flushed: torch.Tensor, count: int) -> list[float]:
    events = []
    for _ in range(count):
        flushed.zero_()
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]
