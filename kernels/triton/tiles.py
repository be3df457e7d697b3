"""Tile sizes of the Triton kernels: defaults for any card, and tuned sizes per card.

A card's table is ``kernels/triton/tuned/<card>.json``, written by ``python -m
lockstep.kernels.bench.tune`` on that card. It holds the driver's name of the card, the versions and
commit it was tuned with, and the tiles. Tiles missing from a table keep their defaults. The
defaults come from the compiler's register and shared memory figures for sm_90; no card has timed
them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

FOLDER = Path(__file__).parent / "tuned"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProductTile:
    """One program of a grouped product: ``columns`` outputs, in steps of ``depth`` along the inner
    dim.
    """

    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpertTile:
    """Tile for up to ``per_slot`` pairs per slot when spread evenly (0: any number): blocks of
    ``rows`` pairs, and both products.
    """

    per_slot: int
    rows: int
    up: ProductTile
    down: ProductTile


@dataclass(frozen=True)
class LinearTile:
    """One program of a product with one matrix, for up to ``up_to`` rows (0: any number): ``rows``
    by ``columns`` outputs.
    """

    up_to: int
    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttendTile:
    """``queries`` pairs of query and head by ``keys`` cache positions. Decode rows are split until
    there are ``programs`` per processor, or into ``splits`` unless that is 0. Over latents: so many
    values of them are widened and multiplied at a time (``chunk``; in FP8 at least the 128 that
    share a scale), and the sums may be kept transposed (``turned``). ``hoisted``: the
    compiler may move addresses out of the loop over keys, which takes registers (latents and
    ``prefill``; over heads it always may). ``serial``: on sm_100, a block's product with the values
    ends before the next block's scores begin, so that latents need one buffer less.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int = 4
    splits: int = 0
    chunk: int = 128
    turned: bool = False
    hoisted: bool = False
    serial: bool = False


@dataclass(frozen=True)
class Tiles:
    """The tiles of one card. ``latent_*``: over latents as they are. ``prefill``: over expanded
    latents, for rows of more than ``most_absorbed`` queries (None: from the break-even in
    operations), in a workspace of about ``prefill_bytes``; ``expand``: of the expansion.
    """

    experts: tuple[ExpertTile, ...] = (
        ExpertTile(16, 16, ProductTile(32, 128, 4, 4), ProductTile(32, 128, 4, 5)),
        ExpertTile(64, 64, ProductTile(64, 64, 4, 4), ProductTile(128, 64, 4, 4)),
        ExpertTile(0, 128, ProductTile(128, 64, 8, 3), ProductTile(256, 64, 8, 3)),
    )
    experts_fp8: tuple[ExpertTile, ...] = (
        ExpertTile(16, 16, ProductTile(32, 128, 4, 4), ProductTile(32, 128, 4, 4)),
        ExpertTile(0, 64, ProductTile(128, 128, 8, 4), ProductTile(128, 128, 4, 4)),
    )
    linear_fp8: tuple[LinearTile, ...] = (
        LinearTile(16, 16, 32, 4, 4),
        LinearTile(64, 64, 64, 4, 4),
        LinearTile(0, 128, 128, 8, 3),
    )
    decode: AttendTile = AttendTile(16, 64, 4, 3)
    decode_fp8: AttendTile = AttendTile(16, 64, 4, 4)
    extend: AttendTile = AttendTile(128, 64, 8, 3)
    extend_fp8: AttendTile = AttendTile(128, 64, 8, 3)
    latent_decode: AttendTile = AttendTile(64, 64, 8, 2)
    latent_decode_fp8: AttendTile = AttendTile(64, 64, 8, 3)
    latent_extend: AttendTile = AttendTile(64, 64, 8, 2)
    latent_extend_fp8: AttendTile = AttendTile(64, 64, 8, 3)
    prefill: AttendTile = AttendTile(128, 64, 8, 2)
    expand: ProductTile = ProductTile(128, 128, 4, 3)
    most_absorbed: int | None = None
    prefill_bytes: int = 512 << 20

    def of_experts(self, num_pairs: int, num_slots: int, fp8: bool = False) -> ExpertTile:
        """Many pairs are padding if most experts live elsewhere, so a block's rows grow late."""
        entries = self.experts_fp8 if fp8 else self.experts
        return next(
            entry for entry in entries if not entry.per_slot or num_pairs <= entry.per_slot * num_slots
        )

    def of_linear_fp8(self, num_rows: int) -> LinearTile:
        """The tile of a product of so many rows."""
        return next(entry for entry in self.linear_fp8 if not entry.up_to or num_rows <= entry.up_to)


DEFAULT = Tiles()

BLACKWELL = Tiles(
    extend=AttendTile(128, 64, 8, 2),
    latent_decode=AttendTile(64, 64, 8, 2, chunk=512, serial=True),
    latent_decode_fp8=AttendTile(64, 64, 8, 2, turned=True),
    latent_extend=AttendTile(64, 64, 8, 2, chunk=512, serial=True),
    latent_extend_fp8=AttendTile(64, 32, 8, 2, turned=True),
)
"""Without a table of the card, on sm_100: three stages do not fit, or spill, and the sums of 64
heads over latents fill the tensor memory unless they are one chunk or turned (Triton 3.7, 3.9).
Blocks of 64 latents in bf16 take 213,544 bytes of shared memory; unless serial, 287,280."""


GEFORCE = Tiles(
    experts=(DEFAULT.experts[0], dataclasses.replace(DEFAULT.experts[1], per_slot=0)),
    experts_fp8=(
        DEFAULT.experts_fp8[0],
        ExpertTile(0, 64, ProductTile(128, 128, 8, 3), ProductTile(128, 128, 4, 4)),
    ),
    linear_fp8=(*DEFAULT.linear_fp8[:2], LinearTile(0, 128, 64, 8, 4)),
    extend=AttendTile(64, 64, 8, 2),
    extend_fp8=AttendTile(64, 64, 8, 2),
    latent_decode=AttendTile(32, 32, 8, 2, hoisted=True),
    latent_decode_fp8=AttendTile(32, 32, 8, 3, hoisted=True),
    latent_extend=AttendTile(32, 32, 8, 2, hoisted=True),
    latent_extend_fp8=AttendTile(32, 32, 8, 3, hoisted=True),
    prefill=AttendTile(64, 64, 8, 2, hoisted=True),
    expand=ProductTile(128, 64, 4, 3),
)
"""Without a table of the card, on sm_120: a program has 99 KiB of shared memory, and operands of
the matrix units lie in registers, so larger tiles spill (Triton 3.6 to 3.9)."""


def default_tiles(arch: int) -> Tiles:
    """Tiles that fit a card of that kind: 90 for an H100, 100 for a B200, 120 for an RTX 5090."""
    if arch < 100:
        return DEFAULT
    if arch >= 120:
        return GEFORCE
    if not triton.__version__.startswith("3.6."):
        return BLACKWELL
    # Its pass that pipelines loads fails an assertion where sums are turned.
    turned = ("latent_decode_fp8", "latent_extend_fp8")
    changed = {name: dataclasses.replace(getattr(BLACKWELL, name), stages=1) for name in turned}
    return dataclasses.replace(BLACKWELL, **changed)


def tiles_of(card: str, folder: Path = FOLDER, arch: int = 90) -> Tiles:
    """The tiles for the card of that name (empty: the interpreter's), which is of the kind
    ``arch``. Logs where they come from.

    Raises ValueError for an invalid table.
    """
    path = folder / f"{file_stem(card)}.json"
    if not card:
        return DEFAULT
    if not path.exists():
        known = ", ".join(sorted(table.stem for table in folder.glob("*.json"))) or "none"
        _log.warning("kernels: no tuning table for %s (there are: %s); default tile sizes", card, known)
        return default_tiles(arch)
    table = json.loads(path.read_text(encoding="utf-8"))
    try:
        tiles = _parse(table["tiles"])
        _log.info(
            "kernels: tile sizes tuned on %s (triton %s, commit %s)",
            table["card"],
            table["triton"],
            table["commit"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no tuning table: {error!r}; write it anew with python -m lockstep.kernels.bench.tune"
        ) from None
    return tiles


def write_table(card: str, tiles: Tiles, found_with: dict[str, str], folder: Path = FOLDER) -> Path:
    """Writes a card's table. ``found_with`` goes on record with it: versions, commit, measured
    ceilings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(card)}.json"
    path.write_text(
        json.dumps({"card": card} | found_with | {"tiles": dataclasses.asdict(tiles)}, indent=1) + "\n",
        encoding="utf-8",
    )
    return path


def file_stem(card: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _parse(table: dict[str, Any]) -> Tiles:
    unknown = sorted(table.keys() - {field.name for field in dataclasses.fields(Tiles)})
    if unknown:
        raise ValueError(f"unknown ops {', '.join(unknown)}")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name.startswith("experts"):
            found[name] = tuple(
                ExpertTile(**(entry | {key: ProductTile(**entry[key]) for key in ("up", "down")}))
                for entry in value
            )
            if not found[name] or found[name][-1].per_slot:
                raise ValueError(f"{name}: the last entry must hold for any number of pairs (per_slot 0)")
        elif name == "linear_fp8":
            found[name] = tuple(LinearTile(**entry) for entry in value)
            if not found[name] or found[name][-1].up_to:
                raise ValueError(f"{name}: the last entry must hold for any number of rows (up_to 0)")
        elif name == "expand":
            found[name] = ProductTile(**value)
        else:
            found[name] = AttendTile(**value) if isinstance(value, dict) else value
    return Tiles(**found)
