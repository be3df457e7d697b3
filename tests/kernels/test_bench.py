"""The benchmark program: its list of cases, and a run of one of them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lockstep.kernels.bench import NOT_MEASURED, Ceilings
from lockstep.kernels.bench_cases import Call, ExpertShape, cases
from lockstep.kernels.table import ops_of


def test_cases_are_distinct_and_name_every_expert_size() -> None:
    names = [(case.op, case.shape) for case in cases()]
    assert len(set(names)) == len(names)
    for spread, slots in ((1, 128), (8, 16), (32, 4), (72, 2)):
        assert ("experts", f"Qwen3-30B-A3B EP {spread}: 4096 tokens, {slots} slots") in names
    for spread, slots in ((8, 32), (32, 8), (72, 4)):
        assert ("experts_fp8", f"DeepSeek-V3 EP {spread}: 1 tokens, {slots} slots") in names
    for op in ("attend", "mla_attend"):
        assert len([name for name in names if name[0] == op and "decode" in name[1]]) == 18


def test_a_roofline_is_the_slower_of_two_ceilings() -> None:
    ceilings = Ceilings(bytes_per_s=1e12, flops=1e15)
    assert ceilings.bound(Call(lambda ops: None, num_bytes=2e6, flops=1e9)) == (pytest.approx(2.0), "memory")
    assert ceilings.bound(Call(lambda ops: None, num_bytes=2e6, flops=1e10)) == (pytest.approx(10.0), "compute")
    assert ceilings.bound(Call(lambda ops: None, num_bytes=2e6, flops=1e10, fp8=True)) == (pytest.approx(5.0), "compute")


def test_experts_and_their_rival_compute_the_same() -> None:
    call = ExpertShape(slots=3, hidden=32, width=16, pairs=11).bf16(torch.device("cpu"))
    rival = call.rivals["torch._grouped_mm"]()
    assert isinstance(rival, torch.Tensor)
    torch.testing.assert_close(rival, call.run(ops_of("cpu")), rtol=2e-2, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the card")
def test_a_machine_without_a_card_measures_its_own_rows_and_leaves_the_others_open(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lockstep.kernels.bench", "--out", str(tmp_path), "--only", "Qwen3: 1 tokens"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (row,) = (row for row in rows_of(tmp_path / "kernels_cpu.csv") if row["op"] == "gate")
    assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) and float(row["copy_gb_s"]) > 0
    assert row["hardware"] and row["torch"] == torch.__version__ and row["commit"]
    assert {row["p50_us"] for row in rows_of(tmp_path / "kernels_gpu.csv")} == {NOT_MEASURED}
    # What a card has measured since is not this machine's to overwrite.
    (tmp_path / "kernels_gpu.csv").write_text("measured on a card", encoding="utf-8")
    assert subprocess.run(command, capture_output=True, timeout=100, check=False, cwd=tmp_path).returncode == 0
    assert (tmp_path / "kernels_gpu.csv").read_text(encoding="utf-8") == "measured on a card"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
