"""The benchmark program: its list of cases, their results, and a run of one of them."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lockstep.kernels.bench.__main__ import error_of
from lockstep.kernels.bench.call import Call
from lockstep.kernels.bench.cases import ExpertShape, cases
from lockstep.kernels.bench.clock import Ceilings
from lockstep.kernels.bench.fma_rate import fma_flops
from lockstep.kernels.bench.rows import NOT_MEASURED
from lockstep.kernels.reference.column import Reference
from lockstep.kernels.table import ops_of

CPU, META = torch.device("cpu"), torch.device("meta")


def test_cases_are_distinct_and_name_every_size() -> None:
    names = [(case.op, case.shape) for case in cases()]
    assert len(set(names)) == len(names)
    for spread, slots in ((1, 128), (8, 16), (32, 4), (72, 2)):
        assert ("experts", f"Qwen3-30B-A3B EP {spread}: 4096 tokens, {slots} slots") in names
    for spread, slots in ((8, 32), (32, 8), (72, 4)):
        assert ("experts_fp8", f"DeepSeek-V3 EP {spread}: 1 tokens, {slots} slots") in names
    for op, model in (("attend", "Qwen3"), ("mla_attend", "DeepSeek-V3")):
        for kind in ("", ", FP8 pages"):
            decode = [
                name for name in names if name[0] == op and name[1].startswith(f"{model} decode{kind}: ")
            ]
            assert len(decode) == 18 and (op, f"{model} extend{kind}: 2048 over 8192") in names


def test_every_op_of_the_table_has_a_case() -> None:
    plain = {"column", "merges_shared_experts", "takes_narrow_gates", "linear", "pack", "pack_slots"}
    moved = {"group_pairs", "unpermute", "sample_slots"}  # timed with permute, and with sample on a card
    at_load_time = {"pack_four_bit"}
    # Their cases give the cost of the parts; bench_vllm.py measures the whole.
    made_of_others = {
        "add_norm",
        "project",
        "norm_project",
        "choose_experts",
        "norm_rows",
        "project_normed",
        "attention_sublayer",
        "experts_sublayer",
        "routed_sublayer",
    }
    ops = {name for name in vars(Reference) if not name.startswith("_")}
    missing = ops - plain - moved - at_load_time - made_of_others - {case.op for case in cases()}
    # One costs the same as with a residual; tests/kernels/cpu compare the other with bf16.
    assert missing == {"rms_norm_fp8"}


def test_a_roofline_is_the_slower_of_two_ceilings() -> None:
    ceilings = Ceilings(bytes_per_s=1e12, flops=1e15)

    def call(flops: float, fp8: bool = False) -> Call:
        return Call(lambda ops: lambda: None, num_bytes=2e6, flops=flops, fp8=fp8)

    assert ceilings.bound(call(1e9)) == (pytest.approx(2.0), "memory")
    assert ceilings.bound(call(1e10)) == (pytest.approx(10.0), "compute")
    assert ceilings.bound(call(1e10, fp8=True)) == (pytest.approx(5.0), "compute")
    assert Ceilings(1e12, 1e15, fp8_flops=1e16).bound(call(1e10, fp8=True)) == (pytest.approx(2.0), "memory")


def test_experts_and_their_rival_compute_the_same() -> None:
    call = ExpertShape(slots=3, hidden=32, width=16, pairs=11).bf16(CPU)
    assert call.expected is not None
    assert 0 < float(error_of(call.bind(ops_of("cpu")), call.expected)) < 2e-2
    assert 0 < float(error_of(call.rivals["oneDNN, slot by slot"], call.expected)) < 2e-2
    assert set(call.rivals) == {"torch._grouped_mm", "oneDNN, slot by slot"}, "vLLM's kernels need a card"


@pytest.mark.parametrize("shape", ["Qwen3 decode: 1 x 1024", "Qwen3 decode, FP8 pages: 1 x 1024"])
def test_attention_and_its_rival_compute_the_same(shape: str) -> None:
    (case,) = (case for case in cases() if (case.op, case.shape) == ("attend", shape))
    call = case.make(CPU)
    got, rival = call.bind(ops_of("reference"))(), call.rivals["sdpa on gathered pages"]()
    assert isinstance(got, torch.Tensor) and isinstance(rival, torch.Tensor)
    torch.testing.assert_close(got, rival.flatten(1, 2), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("pages", ["", ", FP8 pages"])
def test_an_indexer_and_its_rival_choose_the_same(pages: str) -> None:
    shape = f"DeepSeek-V3.2 decode{pages}: 1 x 8192"
    (case,) = (case for case in cases() if (case.op, case.shape) == ("select_positions", shape))
    call = case.make(CPU)
    chosen, (rival,) = call.bind(ops_of("reference")), call.rivals.values()
    assert error_of(chosen, chosen) == "0.0e+00"
    assert float(error_of(rival, chosen)) < 0.05, "scores in bf16 tie at the last place"
    other = replace(chosen(), places_NK=torch.arange(2048)[None])  # type: ignore[type-var]
    assert 0.6 < float(error_of(lambda: other, chosen)) < 0.9, "a quarter by chance"


def test_a_linear_layer_and_its_rival_compute_the_same() -> None:
    (case,) = (case for case in cases() if (case.op, case.shape) == ("linear", "2 rows, 2048 x 2048"))
    call = case.make(CPU)
    assert call.expected is not None
    for run in (call.bind(ops_of("cpu")), call.rivals["oneDNN"]):
        assert 0 <= float(error_of(run, call.expected)) < 2e-2


def test_a_cpu_is_also_bound_by_its_multiply_adds() -> None:
    call = Call(lambda ops: lambda: None, num_bytes=1.0, flops=1e12)
    assert Ceilings(1e12, 1e12, fma_flops=2e12).bound(call) == (pytest.approx(5e5), "compute")
    assert 1e9 < fma_flops() < 1e14


def test_errors_are_norms_of_numbers_and_shares_of_integers() -> None:
    x = torch.tensor([3.0, 4.0])
    assert error_of(lambda: x * 1.01, lambda: x) == "1.0e-02"
    assert (
        error_of(lambda: (x, torch.tensor([1, 2, 3, 4])), lambda: (x, torch.tensor([1, 2, 3, 5])))
        == "2.5e-01"
    )
    assert error_of(lambda: None, lambda: None) == ""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the kernels launched from here on; the launches do nothing."""
    launched: list[str] = []

    def note(self: Any, *args: Any, **options: Any) -> None:
        launched.append(self.fn.__name__)

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", note)
    return launched


def test_no_size_of_a_step_is_read_by_the_host(launches: list[str]) -> None:
    """Tensors on ``meta`` have shapes but no values, so any read by the host fails, grids
    included.
    """
    seen = set()
    for case in cases():
        if case.card and (case.op, case.shape.partition(":")[0]) not in seen:
            seen.add((case.op, case.shape.partition(":")[0]))
            before = len(launches)
            case.make(META).bind(ops_of("triton"))()
            assert len(launches) > before, f"{case.op} launches no kernel"


@pytest.mark.parametrize(("op", "shape"), [("experts_fp8", "EP 8"), ("sample", "top-k 50")])
def test_the_check_for_host_reads_can_fail(op: str, shape: str) -> None:
    """References may read values on the host."""
    case = next(case for case in cases() if case.op == op and shape in case.shape)
    call = case.make(META)
    with pytest.raises((RuntimeError, NotImplementedError)):
        call.bind(ops_of("reference"))()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the card")
def test_a_machine_without_a_card_measures_its_own_rows_and_leaves_the_others_open(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lockstep.kernels.bench",
        "--out",
        str(tmp_path),
        "--only",
        "Qwen3: 1 tokens",
        "--each",
        "0.05",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row, plain = (row for row in rows_of(next(tmp_path.glob("kernels_cpu*.csv"))) if row["op"] == "gate")
    assert (row["implementation"], plain["implementation"]) == ("cpu", "reference") and float(
        row["error"]
    ) < 1e-2
    assert (
        float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) and float(row["copy_gb_s"]) > 0
    )
    assert row["hardware"] and row["torch"] == torch.__version__ and row["commit"]
    assert {row["p50_us"] for row in rows_of(tmp_path / "kernels_gpu.csv")} == {NOT_MEASURED}
    # A row that a card has measured since must not be overwritten on this machine.
    text = (tmp_path / "kernels_gpu.csv").read_text(encoding="utf-8").replace(NOT_MEASURED, "7.0")
    (tmp_path / "kernels_gpu.csv").write_text(text, encoding="utf-8")
    assert (
        subprocess.run(command, capture_output=True, timeout=280, check=False, cwd=tmp_path).returncode == 0
    )
    assert (tmp_path / "kernels_gpu.csv").read_text(encoding="utf-8") == text


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
