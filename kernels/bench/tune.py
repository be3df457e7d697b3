"""Finds tile sizes on this machine's card: ``python -m lockstep.kernels.bench.tune``.

Times candidates on cases of the benchmark and writes ``kernels/triton/tuned/<card>.json``, which
the op table's Triton column then reads. Each group of tiles is searched completely before the next
begins; groups for which time runs out keep their defaults. Candidates are compiled ahead in
parallel; a candidate that asks for more than the card has is skipped.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..triton.column import Triton
from ..triton.target import card_arch, card_name
from ..triton.tiles import (
    DEFAULT,
    FOLDER,
    ExpertTile,
    LinearTile,
    ProductTile,
    Tiles,
    default_tiles,
    write_table,
)
from .cases import LINEAR_FP8, cases
from .clock import measure_ceilings, time_of
from .compile import compile_ahead
from .rows import blank_row, version_of

_SECONDS_PER_TIMING = 0.02
QWEN, DEEPSEEK = "Qwen3-30B-A3B EP 8: {} tokens, 16 slots", "DeepSeek-V3 EP 8: {} tokens, 32 slots"


@dataclass(frozen=True)
class Group:
    """Candidates for one place in the table, tried on cases (op, shape). Each of the search's
    ``stages`` starts from the best so far.
    """

    name: str
    cases: tuple[tuple[str, str], ...]
    stages: tuple[Callable[[Tiles], Iterator[Tiles]], ...]


def groups() -> Iterator[Group]:
    """All groups by importance; those with a goal come first."""
    for field, at, tokens in SEARCHED_EXPERTS:
        shapes = tuple((field, name.format(count)) for name in (QWEN, DEEPSEEK) for count in tokens)
        yield Group(f"{field}[{at}]", shapes, _product_stages(field, at, BLOCKS[field][at]))
    for suffix, pages in (("", ""), ("_fp8", ", FP8 pages")):
        heads, latents = f"Qwen3 decode{pages}: ", f"DeepSeek-V3 decode{pages}: "
        sizes = ("1 x 32768", "8 x 8192", "64 x 8192", "256 x 1024")
        shapes = tuple(("attend", heads + size) for size in sizes)
        yield Group(f"decode{suffix}", shapes, _attend_stages(f"decode{suffix}", DECODE))
        shapes = tuple(("mla_attend", latents + size) for size in sizes)
        field, candidates = f"latent_decode{suffix}", LATENT_DECODE_FP8 if suffix else LATENT_DECODE
        yield Group(field, shapes, _attend_stages(field, candidates))
    for suffix, pages in (("", ""), ("_fp8", ", FP8 pages")):
        heads, latents = f"Qwen3 extend{pages}: ", f"DeepSeek-V3 extend{pages}: "
        shapes = tuple(("attend", heads + shape) for shape in ("2048 over 0", "2048 over 8192"))
        yield Group(f"extend{suffix}", shapes, _attend_stages(f"extend{suffix}", EXTEND, programs=()))
        shapes = (("mla_attend", latents + "64 over 8192"),)
        field, candidates = f"latent_extend{suffix}", LATENT_EXTEND_FP8 if suffix else LATENT_EXTEND
        yield Group(field, shapes, _attend_stages(field, candidates, programs=()))
    shapes = tuple(
        ("mla_attend", f"DeepSeek-V3 extend: {shape}") for shape in ("2048 over 0", "2048 over 8192")
    )
    yield Group("prefill", shapes, _attend_stages("prefill", PREFILL, programs=()))
    yield Group("expand", shapes, (_expansions,))
    for at, (counts, candidates) in enumerate(LINEAR):
        shapes = tuple(
            ("linear_fp8", f"{name}: {rows} x {d} to {n}") for rows in counts for name, d, n in LINEAR_FP8
        )
        yield Group(f"linear_fp8[{at}]", shapes, _linear_stages(at, candidates))


SEARCHED_EXPERTS = (
    ("experts", 0, (4, 16)),
    ("experts_fp8", 0, (4, 16)),
    ("experts", 2, (1024, 4096)),
    ("experts_fp8", 1, (1024, 4096)),
    ("experts", 1, (64, 256)),
)
Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Blocks:
    """Numbers of rows per block; then columns, depth, warps and stages of the first and of the
    second product.
    """

    rows: tuple[int, ...]
    up: tuple[Size, ...]
    down: tuple[Size, ...]


# Candidates by place in the table. None of these spills registers for sm_90.
BLOCKS: dict[str, tuple[Blocks, ...]] = {
    "experts": (
        Blocks(
            (16,),
            (
                (16, 128, 4, 5),
                (32, 128, 4, 4),
                (32, 256, 4, 3),
                (32, 64, 2, 6),
                (64, 128, 4, 4),
                (64, 64, 4, 5),
            ),
            (
                (16, 128, 4, 6),
                (32, 128, 4, 5),
                (32, 256, 4, 4),
                (32, 64, 2, 6),
                (64, 128, 4, 4),
                (128, 64, 4, 4),
            ),
        ),
        Blocks(
            (16, 32, 64),
            ((32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 3)),
            ((32, 128, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4)),
        ),
        Blocks(
            (64, 128),
            ((64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 8, 4)),
            ((128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (128, 128, 8, 3)),
        ),
    ),
    "experts_fp8": (
        Blocks(
            (16,),
            (
                (16, 128, 4, 6),
                (32, 128, 4, 4),
                (32, 128, 4, 6),
                (64, 128, 4, 4),
                (128, 128, 4, 3),
                (128, 128, 8, 4),
            ),
            ((16, 128, 4, 6), (32, 128, 4, 4), (32, 128, 4, 6), (64, 128, 4, 4), (128, 128, 4, 3)),
        ),
        Blocks(
            (64,),
            ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 128, 4, 3)),
            ((128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 4), (64, 128, 4, 4)),
        ),
    ),
}
# Queries, keys, warps, stages.
DECODE: tuple[Size, ...] = (
    (16, 64, 4, 3),
    (16, 64, 4, 4),
    (16, 32, 4, 4),
    (16, 32, 4, 6),
    (16, 64, 8, 3),
    (16, 32, 2, 4),
)
LATENT_DECODE: tuple[Size, ...] = (
    (64, 64, 8, 2),
    (64, 32, 8, 3),
    (64, 32, 8, 2),
    (32, 64, 8, 2),
    (32, 32, 8, 3),
    (16, 32, 4, 3),
)
LATENT_DECODE_FP8: tuple[Size, ...] = (
    (64, 64, 8, 3),
    (64, 64, 8, 2),
    (64, 32, 8, 3),
    (64, 32, 8, 2),
    (32, 32, 8, 3),
    (32, 64, 8, 2),
)
EXTEND: tuple[Size, ...] = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3))
LATENT_EXTEND: tuple[Size, ...] = ((64, 64, 8, 2), (64, 32, 8, 3), (32, 64, 8, 2))
LATENT_EXTEND_FP8: tuple[Size, ...] = (
    (64, 64, 8, 3),
    (64, 64, 8, 2),
    (64, 32, 8, 3),
    (64, 32, 8, 2),
    (32, 32, 8, 3),
)
PREFILL: tuple[Size, ...] = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2))
PROGRAMS = (2, 4, 8)
# Columns, depth, warps, stages.
EXPAND: tuple[Size, ...] = ((128, 128, 4, 3), (128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3))
# Numbers of rows to time, and candidates: rows and columns of a block, warps, stages.
LINEAR: tuple[tuple[tuple[int, ...], tuple[Size, ...]], ...] = (
    ((1,), ((16, 32, 4, 4), (16, 64, 4, 4), (16, 32, 4, 5), (16, 32, 2, 4))),
    ((64,), ((64, 64, 4, 4), (64, 32, 4, 4), (64, 128, 4, 3))),
    ((4096,), ((128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 3))),
)


def _product_stages(field: str, at: int, blocks: Blocks) -> tuple[Callable[[Tiles], Iterator[Tiles]], ...]:
    def first(tiles: Tiles) -> Iterator[Tiles]:
        for count, up in itertools.product(blocks.rows, blocks.up):
            yield _with_entry(tiles, field, at, rows=count, up=ProductTile(*up))

    def second(tiles: Tiles) -> Iterator[Tiles]:
        for down in blocks.down:
            yield _with_entry(tiles, field, at, down=ProductTile(*down))

    return first, second


def _with_entry(tiles: Tiles, field: str, at: int, **changes: object) -> Tiles:
    entries: list[ExpertTile] = list(getattr(tiles, field))
    entries[at] = replace(entries[at], **changes)  # type: ignore[arg-type]
    return replace(tiles, **{field: tuple(entries)})  # type: ignore[arg-type]


def _linear_stages(at: int, candidates: Sequence[Size]) -> tuple[Callable[[Tiles], Iterator[Tiles]], ...]:
    def sizes(tiles: Tiles) -> Iterator[Tiles]:
        for candidate in candidates:
            entries = list(tiles.linear_fp8)
            entries[at] = LinearTile(entries[at].up_to, *candidate)
            yield replace(tiles, linear_fp8=tuple(entries))

    return (sizes,)


def _expansions(tiles: Tiles) -> Iterator[Tiles]:
    for candidate in EXPAND:
        yield replace(tiles, expand=ProductTile(*candidate))


def _attend_stages(
    field: str, candidates: Sequence[Size], programs: Sequence[int] = PROGRAMS
) -> tuple[Callable[[Tiles], Iterator[Tiles]], ...]:
    def shapes(tiles: Tiles) -> Iterator[Tiles]:
        for candidate in candidates:
            sizes = dict(zip(("queries", "keys", "warps", "stages"), candidate, strict=True))
            tile = replace(getattr(tiles, field), **sizes)
            for serial in dict.fromkeys((tile.serial, False)):  # smaller blocks leave room for a buffer more
                yield replace(tiles, **{field: replace(tile, serial=serial)})

    def splits(tiles: Tiles) -> Iterator[Tiles]:
        for count in programs:
            yield replace(tiles, **{field: replace(getattr(tiles, field), programs=count)})

    return (shapes, splits) if programs else (shapes,)


def jobs(every: Sequence[Group]) -> list[tuple[str, str, Tiles]]:
    """Every launch the search may make, for compiling ahead. The stages of a group compile
    independently of each other.
    """
    return [
        (*case, tiles)
        for group in every
        for stage in group.stages
        for tiles in stage(DEFAULT)
        for case in group.cases
    ]


def search(group: Group, tiles: Tiles, clock: Callable[[tuple[str, str], Tiles], float]) -> tuple[Tiles, str]:
    """The tiles with the group's best candidate in place, and a line that reports the find.
    ``clock`` returns microseconds, infinity for a candidate that cannot run.
    """
    spread = 1.0
    for stage in group.stages:
        times = {
            candidate: [clock(case, candidate) for case in group.cases]
            for candidate in dict.fromkeys([tiles, *stage(tiles)])
        }
        least = [min(column) for column in zip(*times.values(), strict=True)]
        slower = {candidate: _mean_ratio(row, least) for candidate, row in times.items()}
        tiles = min(slower, key=lambda candidate: slower[candidate])
        worst = max((value for value in slower.values() if math.isfinite(value)), default=1.0)
        spread *= worst / slower[tiles]
    return tiles, f"{group.name}: worst candidate {spread:.2f} times the time of the chosen one"


def _mean_ratio(times: list[float], least: list[float]) -> float:
    if not all(map(math.isfinite, times)):
        return math.inf
    return math.exp(sum(math.log(time / best) for time, best in zip(times, least, strict=True)) / len(times))


class CardClock:
    """Times a case of the benchmark with given tiles. Keeps the tensors of the last group's
    cases.
    """

    def __init__(self) -> None:
        self._cases = {(case.op, case.shape): case for case in cases()}
        self._calls: dict[tuple[str, str], object] = {}

    def drop_tensors(self) -> None:
        self._calls.clear()
        torch.cuda.empty_cache()

    def __call__(self, name: tuple[str, str], tiles: Tiles) -> float:
        device = torch.device("cuda")
        call = self._calls.get(name) or self._cases[name].make(device)
        self._calls[name] = call
        try:
            bound = call.bind(Triton(tiles))  # type: ignore[attr-defined]
            return time_of(bound, device, _SECONDS_PER_TIMING)[1]
        except Exception as error:  # needs more shared memory or registers than there are
            print(f"  {name[1]}: {type(error).__name__}: {str(error)[:80]}")
            return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lockstep.kernels.bench.tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the tables")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="groups not searched by then keep their defaults"
    )
    parser.add_argument("--commit", default="", help="commit in the table if this is no git checkout")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.bench.tune: no NVIDIA card here; tiles can only be tuned on one")
    end = time.monotonic() + arguments.seconds
    every = list(groups())
    candidates = jobs(every)
    failures = compile_ahead(candidates)
    left = end - time.monotonic()
    print(f"{len(failures)} of {len(candidates)} candidates do not compile; {left:.0f} s left")
    device = torch.device("cuda")
    clock = CardClock()
    tiles = default_tiles(card_arch())
    ceilings = measure_ceilings(device)
    record = {
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": arguments.commit or blank_row(None, None).commit,
        "copy_gb_s": f"{ceilings.bytes_per_s / 1e9:.0f}",
        "matmul_tflop_s": f"{ceilings.flops / 1e12:.0f}",
    }
    for group in every:
        if time.monotonic() > end:
            print(f"{group.name}: out of time, default")
            continue
        tiles, line = search(group, tiles, clock)
        clock.drop_tensors()
        print(line, flush=True)
        path = write_table(card_name(), tiles, record, arguments.out)
    print(path)


if __name__ == "__main__":
    main()
