"""Rows of the benchmark: kept, merged, compared with the goals, drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.kernels.bench.clock import Ceilings
from lockstep.kernels.bench.goals import summary
from lockstep.kernels.bench.rows import NOT_MEASURED, Ledger, Row, blank_row

BLANK = blank_row(None, Ceilings(4e12, 8e14, 1.5e15), "abc")


def row(
    op: str,
    shape: str,
    implementation: str,
    us: float,
    of_copy: float,
    of_matmul: float = 0.1,
    error: str = "",
) -> Row:
    share = max(of_copy, of_matmul)
    return replace(
        BLANK,
        op=op,
        shape=shape,
        implementation=implementation,
        p20_us=f"{us}",
        p50_us=f"{us}",
        p80_us=f"{us}",
        bound="memory",
        share=f"{share}",
        of_copy=f"{of_copy}",
        of_matmul=f"{of_matmul}",
        hardware="a card",
        error=error,
    )


def unmeasured(op: str, shape: str, why: str = "") -> Row:
    return replace(BLANK, op=op, shape=shape, implementation="triton", p50_us=NOT_MEASURED + why)


def test_rows_are_kept_until_they_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    ledger = Ledger(path)
    ledger.add_missing([unmeasured("a", "1"), unmeasured("a", "2")])
    ledger.put([row("a", "1", "triton", 5.0, 0.5), row("a", "1", "rival", 6.0, 0.4)])
    ledger = Ledger(path)
    assert [(found.shape, found.implementation, found.p50_us) for found in ledger.rows()] == [
        ("1", "triton", "5.0"),
        ("2", "triton", NOT_MEASURED),
        ("1", "rival", "6.0"),
    ]
    ledger.put([row("a", "1", "triton", 4.0, 0.6), unmeasured("a", "2", ": no memory")])
    ledger.add_missing([unmeasured("a", "1")])
    ledger.put([unmeasured("a", "1", ": out of time")])
    ledger.mark(unmeasured("a", "1", ": broke"))
    assert {
        (found.shape, found.p50_us) for found in Ledger(path).rows() if found.implementation == "triton"
    } == {
        ("1", "4.0"),
        ("2", f"{NOT_MEASURED}: no memory"),
    }


def test_a_case_that_kills_the_process_is_on_record(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.csv")
    ledger.mark(unmeasured("a", "1", ": broke"))

    def breaks() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.put(breaks() for _ in range(1))  # type: ignore[misc]
    assert [found.p50_us for found in Ledger(tmp_path / "rows.csv").rows()] == [f"{NOT_MEASURED}: broke"]


def test_rows_of_an_older_form_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("op,shape,implementation,p50_us\na,1,cpu,3.0\n", encoding="utf-8")
    (old,) = Ledger(tmp_path / "old.csv").rows()
    assert old.key == ("a", "1", "cpu") and old.measured and old.error == ""


def test_goals_are_counted_and_rows_that_miss_are_named() -> None:
    rows = [
        row("attend", "Qwen3 decode: 1 x 1024", "triton", 10.0, 0.5),
        row("attend", "Qwen3 decode: 8 x 1024", "triton", 10.0, 0.85, error="2e-1"),
        row("attend", "Qwen3 extend: 2048 over 0", "triton", 10.0, 0.1),
        unmeasured("mla_attend", "DeepSeek-V3 decode: 1 x 1024"),
        row("experts", "Q EP 8: 64 tokens, 16 slots", "triton", 10.0, 0.81),
        row("experts", "Q EP 8: 64 tokens, 16 slots", "torch._grouped_mm", 9.0, 0.9),
        row("experts_fp8", "Q EP 8: 4096 tokens, 16 slots", "triton", 10.0, 0.2, of_matmul=0.61),
        row("experts", "Q EP 8: 4096 tokens, 16 slots", "triton", 10.0, 0.2, of_matmul=0.4),
        row("experts", "Q EP 8: 4096 tokens, 16 slots", "torch._grouped_mm", 15.0, 0.2),
        replace(
            row("experts", "Q EP 8: 1 tokens, 16 slots", "triton", 1.0, 1.0),
            p50_us=f"{NOT_MEASURED}: out of time",
        ),
    ]
    text = summary(rows)
    assert text.startswith("# Goals on a card\n") and "6 of 8 cases measured." in text
    assert "| attention decode, share of the copy bandwidth | 0.8 | 1 of 3 | 0.85 | 0.50 |" in text
    assert "| experts of up to 64 tokens, share of the copy bandwidth | 0.8 | 1 of 2 | 0.81 | 0.81 |" in text
    assert "| experts of 4096 tokens, share of the matmul rate | 0.6 | 1 of 2 | 0.61 | 0.40 |" in text
    assert "| time of torch._grouped_mm over ours | 1.0 | 1 of 2 | 1.50 | 0.90 |" in text
    assert "attend Qwen3 decode: 1 x 1024: 0.50 (memory)" in text and "extend" not in text
    assert "- behind torch._grouped_mm: experts Q EP 8: 64 tokens, 16 slots: 0.90" in text
    assert "- error 2e-1: attend Qwen3 decode: 8 x 1024" in text


def test_without_figures_the_summary_says_so() -> None:
    text = summary([unmeasured("attend", "Qwen3 decode: 1 x 1024")])
    assert (
        "# Goals on no card yet" in text
        and "0 of 1 cases measured." in text
        and "| not measured | not measured |" in text
    )


def test_plots_show_what_was_measured_and_are_the_same_each_time(tmp_path: Path) -> None:
    draw = pytest.importorskip(
        "lockstep.kernels.bench.plot", reason="matplotlib is a dependency of development only"
    ).draw
    ledger = Ledger(tmp_path / "kernels_gpu.csv")
    ledger.put(
        [row("experts", f"Q EP 8: {tokens} tokens, 16 slots", "triton", 10.0, 0.5) for tokens in (1, 4, 64)]
    )
    ledger.put(
        [
            unmeasured("attend", "Qwen3 decode: 1 x 1024"),
            unmeasured("experts", "Q EP 8: 256 tokens, 16 slots"),
        ]
    )
    (path,) = draw(ledger.path)
    first = path.read_text(encoding="utf-8")
    assert (
        path.name == "kernels_gpu_experts.svg"
        and "a card" in first
        and "Q EP 8: n tokens, 16 slots (1 not measured)" in first
    )
    (path,) = draw(ledger.path)
    assert path.read_text(encoding="utf-8") == first
