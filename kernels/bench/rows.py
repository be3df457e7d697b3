"""Rows of the benchmark, and the CSV file that keeps them."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .clock import Ceilings

NOT_MEASURED = "not measured"
FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@dataclass(frozen=True)
class Row:
    """Times in microseconds. ``roofline_us``: the ceilings' limit. ``bound``: the ceiling that sets
    it. ``share``: roofline / p50. ``of_copy`` and ``of_matmul``: the same for memory and for the
    matrix units alone. ``error``: against the column reference, or against a rival if that is a
    loop. A missing time gives its reason in ``p50_us``.
    """

    op: str
    shape: str
    implementation: str
    p20_us: str
    p50_us: str
    p80_us: str
    roofline_us: str
    bound: str
    share: str
    of_copy: str
    of_matmul: str
    error: str
    copy_gb_s: str
    matmul_tflop_s: str
    fp8_tflop_s: str
    hardware: str
    torch: str
    triton: str
    commit: str
    fma_tflop_s: str = NOT_MEASURED

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.implementation

    @property
    def measured(self) -> bool:
        return not self.p50_us.startswith(NOT_MEASURED)


class Ledger:
    """The rows of a file, one for each op, shape and implementation. Every change rewrites the
    file, so that measured rows survive whatever happens to the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str, str], Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for record in csv.DictReader(file):
                    row = Row(**{name: record.get(name) or "" for name in Row.__dataclass_fields__})
                    self._rows[row.key] = row

    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def put(self, rows: Iterable[Row]) -> None:
        """Replaces rows of the same key. A row that could not be measured does not replace one that
        was.
        """
        for row in rows:
            name = f"{row.op:24} {row.shape:52} {row.implementation:24}"
            print(f"{name} {row.p50_us:>12} us  {row.share:>5} of {row.bound or 'roofline'}", flush=True)
            old = self._rows.get(row.key)
            if row.measured or old is None or not old.measured:
                self._rows[row.key] = row
        self._write()

    def mark(self, row: Row) -> None:
        """Records in advance that a case failed, in case the process dies in it."""
        if row.key not in self._rows or not self._rows[row.key].measured:
            self._rows[row.key] = row
            self._write()

    def add_missing(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._rows.setdefault(row.key, row)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self._rows.values())
        os.replace(new, self.path)


def blank_row(device: torch.device | None, ceilings: Ceilings | None, commit: str = "") -> Row:
    """A row without a case. Without a device it counts as not measured."""
    hardware = NOT_MEASURED
    if device is not None and device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    elif device is not None:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    times = dict.fromkeys(("p20_us", "p50_us", "p80_us"), NOT_MEASURED if device is None else "")
    fp8_flops = ceilings.fp8_flops if ceilings else 0.0
    known = {
        "copy_gb_s": f"{ceilings.bytes_per_s / 1e9:.1f}" if ceilings else NOT_MEASURED,
        "matmul_tflop_s": f"{ceilings.flops / 1e12:.2f}" if ceilings else NOT_MEASURED,
        "fma_tflop_s": f"{ceilings.fma_flops / 1e12:.2f}"
        if ceilings and ceilings.fma_flops
        else NOT_MEASURED,
        "fp8_tflop_s": f"{fp8_flops / 1e12:.1f}" if fp8_flops else NOT_MEASURED,
        "hardware": hardware,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit or _commit(),
    }
    return Row(**dict.fromkeys(Row.__dataclass_fields__, "") | times | known)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Commit of the checkout, marked if it has changes."""
    command = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"
