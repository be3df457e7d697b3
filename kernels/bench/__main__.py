"""Times the ops against their rooflines: ``python -m lockstep.kernels.bench``.

Writes ``kernels_gpu.csv`` on a machine with an NVIDIA card and ``kernels_cpu.csv`` on one without
(``kernels_cpu_avx2.csv`` in a process that numba's settings limit to AVX2).
The file has a row per case and implementation and is written after each case; rows of an earlier
run stay unless they are measured again. Ceilings are measured in the same run. A machine without a
card adds the GPU's missing rows as "not measured". ``goals`` summarises a file of rows, and
``plot`` draws it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import cpu_isa
from ..reference.column import Reference
from ..reference.fp8 import Quantised, widen_rows
from ..reference.paged import Selection
from ..table import ops_of
from .call import Call, Case
from .cases import cases
from .clock import Ceilings, measure_ceilings, time_of
from .first import first_cases
from .goals import summary
from .rows import FOLDER, NOT_MEASURED, Ledger, Row, blank_row

_AT_ONCE = 100
"""Cases compiled ahead together, so that the time does not end before the first is measured."""


@dataclass(frozen=True)
class Limits:
    """Seconds per implementation of a case, and the moment (``time.monotonic``) after which no case
    is started.
    """

    seconds: float
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lockstep.kernels.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the CSV files")
    parser.add_argument("--first", action="store_true", help="only the 42 cases that matter most, in order")
    parser.add_argument("--only", default="", help="cases whose op or shape contains this")
    parser.add_argument(
        "--seconds", type=float, default=420.0, help="for all cases; no case is started after that"
    )
    parser.add_argument("--each", type=float, default=0.0, help="seconds for one implementation of a case")
    parser.add_argument(
        "--resume", action="store_true", help="skip cases for which the file has a figure or a reason"
    )
    parser.add_argument("--commit", default="", help="commit in the rows if this is no git checkout")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    listed = first_cases() if arguments.first else cases()
    chosen = [case for case in listed if arguments.only in case.op or arguments.only in case.shape]
    if torch.cuda.is_available():
        ledger, chosen = Ledger(arguments.out / "kernels_gpu.csv"), [case for case in chosen if case.card]
        if arguments.resume:
            done = {
                (row.op, row.shape)
                for row in ledger.rows()
                if row.p50_us not in (NOT_MEASURED, f"{NOT_MEASURED}: out of time")
            }
            chosen = [case for case in chosen if (case.op, case.shape) not in done]
        _on_card(chosen, ledger, Limits(arguments.each or 0.15, end), arguments.commit)
        return
    small = [case for case in chosen if case.small]
    lesser = "" if cpu_isa.here() == cpu_isa.own() else f"_{cpu_isa.here()}"
    ledger = Ledger(arguments.out / f"kernels_cpu{lesser}.csv")
    limits = Limits(arguments.each or 0.5, end)
    _measure(
        small, torch.device("cpu"), [ops_of("cpu"), ops_of("reference")], (ledger, arguments.commit), limits
    )
    blank = replace(blank_row(None, None, arguments.commit), implementation="triton")
    missing = (replace(blank, op=case.op, shape=case.shape) for case in chosen if case.card)
    Ledger(arguments.out / "kernels_gpu.csv").add_missing(missing)


def _on_card(chosen: list[Case], ledger: Ledger, limits: Limits, commit: str) -> None:
    # Imported here, since Triton need not be installed on machines without a card.
    from ..triton.target import card_arch, card_name
    from ..triton.tiles import tiles_of
    from .compile import compile_ahead

    tiles = tiles_of(card_name(), arch=card_arch())
    columns = [ops_of("triton"), ops_of("reference")]
    for begin in range(0, len(chosen), _AT_ONCE):
        part = chosen[begin : begin + _AT_ONCE]
        start = time.monotonic()
        if start < limits.end:
            compile_ahead([(case.op, case.shape, tiles) for case in part])
            print(f"compiled {len(part)} cases ahead in {time.monotonic() - start:.0f} s")
        _measure(part, torch.device("cuda"), columns, (ledger, commit), limits)
    text = summary(ledger.rows())
    ledger.path.with_name(f"{ledger.path.stem}_goals.md").write_text(text, encoding="utf-8")
    print(text)


def _measure(
    chosen: list[Case],
    device: torch.device,
    columns: list[Reference],
    target: tuple[Ledger, str],
    limits: Limits,
) -> None:
    ledger, commit = target
    ceilings = measure_ceilings(device)
    blank = blank_row(device, ceilings, commit)
    for case in chosen:
        named = replace(blank, op=case.op, shape=case.shape)
        if time.monotonic() > limits.end:
            ledger.add_missing(
                [replace(named, implementation=columns[0].column, p50_us=f"{NOT_MEASURED}: out of time")]
            )
            continue
        ledger.mark(
            replace(
                named,
                implementation=columns[0].column,
                p50_us=f"{NOT_MEASURED}: the process did not outlive it",
            )
        )
        ledger.put(_rows(case, named, columns, ceilings, limits.seconds))
        if device.type == "cuda":
            # Raises if a kernel has broken the process for all that follow: start again with
            # --resume.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _rows(
    case: Case, named: Row, columns: list[Reference], ceilings: Ceilings, seconds: float
) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        call = case.make(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        yield replace(named, implementation=columns[0].column, p50_us=_why_not(error))
        return
    runs = {ops.column: call.bind(ops) for ops in columns if _runs(case, ops)}
    expected = call.expected or (runs.get("reference") if case.op not in IN_PLACE else None)
    for name, run in (runs | call.rivals).items():
        row = replace(named, implementation=name)
        try:
            off = error_of(run, expected) if name == columns[0].column and expected is not None else ""
            times = time_of(
                run, device, seconds, capture=name == columns[0].column or case.op not in READS_ON_HOST
            )
        # An implementation that cannot run becomes a row that says so; the others go on.
        except Exception as failure:
            yield replace(row, p50_us=_why_not(failure))
            continue
        yield _timed_row(row, times, call, ceilings, off)


# Other implementations of these ops read the device from the host, or copy from it, and cannot be
# captured.
READS_ON_HOST = ("sample", "edit_logits", "allow_only", "copy_pages", "permute", "gate")
# These ops change their input, so two results need not agree.
IN_PLACE = ("edit_logits", "penalise", "allow_only", "copy_pages", "add_time")


def _timed_row(
    row: Row, times: tuple[float, float, float], call: Call, ceilings: Ceilings, error: str
) -> Row:
    (p20, p50, p80), (roofline, bound) = times, ceilings.bound(call)
    return replace(
        row,
        p20_us=f"{p20:.1f}",
        p50_us=f"{p50:.1f}",
        p80_us=f"{p80:.1f}",
        roofline_us=f"{roofline:.1f}",
        bound=bound,
        share=f"{roofline / p50:.2f}",
        of_copy=f"{ceilings.memory_us(call) / p50:.2f}",
        of_matmul=f"{ceilings.compute_us(call) / p50:.2f}",
        error=error,
    )


def _why_not(error: BaseException) -> str:
    return f"{NOT_MEASURED}: {type(error).__name__}: {error}".split("\n")[0][:160]


def _runs(case: Case, ops: Reference) -> bool:
    """The references of experts are loops over pairs and not worth timing."""
    return not (ops.column == "reference" and (case.op.startswith("experts") or case.op == "from_e4m3"))


def error_of(run: Callable[[], object], expected: Callable[[], object]) -> str:
    """The largest relative error in norm of the numbers, or the share of integers that differ, or
    of chosen positions that are others; empty if there is nothing to compare.
    """
    try:
        result = run()
        wanted = expected()
        if isinstance(result, Selection) and isinstance(wanted, Selection):
            return f"{_missed(result.places_NK, wanted.places_NK):.1e}"
        pairs = list(zip(_parts(result), _parts(wanted), strict=True))
        errors = [_difference(got, wanted) for got, wanted in pairs]
    except (torch.OutOfMemoryError, NotImplementedError):
        return ""  # the op is still timed if only the comparison fails
    return f"{max(errors):.1e}" if errors else ""


def _parts(result: object) -> list[Tensor]:
    if isinstance(result, Quantised):
        return [widen_rows(result)]
    if isinstance(result, tuple):
        return [part for item in result for part in _parts(item)]
    return [result] if isinstance(result, Tensor) else []


def _difference(got: Tensor, wanted: Tensor) -> float:
    if not got.is_floating_point():
        return float((got != wanted).float().mean())
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))


def _missed(got_NK: Tensor, wanted_NK: Tensor) -> float:
    """The share of places that are not among those of the same token."""
    wanted_NK = wanted_NK.sort(1).values
    at_NK = torch.searchsorted(wanted_NK, got_NK.contiguous()).clamp_max(wanted_NK.shape[1] - 1)
    return float((wanted_NK.gather(1, at_NK) != got_NK).float().mean())


if __name__ == "__main__":
    main()
