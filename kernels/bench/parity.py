"""Compares kernels with the reference at the sizes of real models: ``python -m
lockstep.kernels.bench.parity``.

Writes ``parity.csv``, a row per case of ``first_cases`` after each. The exit status is 1 if a
kernel fails or errs by more than is allowed. Without a card the column of the CPU is
compared, at sizes that are small.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from ..table import Column, ops_of
from .__main__ import IN_PLACE, error_of
from .call import Case
from .first import first_cases

ALLOWED = 0.05
"""The largest relative error in norm, or share of other integers. Two FP8 formats of one tensor
differ by about 0.03."""

_FIELDS = ("op", "shape", "error", "allowed", "status")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lockstep.kernels.bench.parity", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of parity.csv")
    parser.add_argument("--seconds", type=float, default=40.0, help="no case is begun after that")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    on_card = torch.cuda.is_available()
    chosen = [case for case in first_cases() if on_card or case.small]
    if on_card:
        from ..triton.target import card_arch, card_name
        from ..triton.tiles import tiles_of
        from .compile import compile_ahead

        tiles = tiles_of(card_name(), arch=card_arch())
        compile_ahead([(case.op, case.shape, tiles) for case in chosen])
    with (arguments.out / "parity.csv").open("w", encoding="utf-8", newline="") as file:
        return compare(chosen, torch.device("cuda" if on_card else "cpu"), end, file)


def compare(chosen: Sequence[Case], device: torch.device, end: float, file: TextIO) -> int:
    """Writes a row for each case to ``file``, but begins none after ``end`` (``time.monotonic``).
    Returns the exit status.
    """
    rows = csv.writer(file)
    rows.writerow(_FIELDS)
    column: Column = "triton" if device.type == "cuda" else "cpu"
    failed = 0
    for case in chosen:
        error, status = "", "out of time"
        if time.monotonic() < end:
            error, status = _compared(case, device, column)
        failed += status not in ("ok", "out of time", "nothing to compare with")
        rows.writerow([case.op, case.shape, error, ALLOWED, status])
        file.flush()
        print(f"{case.op} {case.shape}: {status} {error}")
    return int(failed > 0)


def _compared(case: Case, device: torch.device, column: Column) -> tuple[str, str]:
    """The error of a case and its status."""
    try:
        call = case.make(device)
        own = call.bind(ops_of(column))
        own()
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as failure:  # every kernel gets its row; a broken process fails them all
        return "", f"{type(failure).__name__}: {failure}".split("\n")[0][:160]
    wanted = call.expected
    if wanted is None and case.op not in IN_PLACE and not case.op.startswith("experts"):
        wanted = call.bind(ops_of("reference"))
    try:
        error = "" if wanted is None else error_of(own, wanted)
    except Exception as failure:
        return "", f"{type(failure).__name__}: {failure}".split("\n")[0][:160]
    if not error:
        return "", "nothing to compare with"
    return error, "ok" if float(error) <= ALLOWED else "too large"


if __name__ == "__main__":
    sys.exit(main())
