"""Tuning tables: written, found by the card's name, and the defaults of an unknown card."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from lockstep.kernels.triton.tiles import (
    DEFAULT,
    FOLDER,
    AttendTile,
    ExpertTile,
    LinearTile,
    ProductTile,
    file_stem,
    tiles_of,
    write_table,
)

FOUND = dataclasses.replace(
    DEFAULT,
    decode=AttendTile(16, 128, 2, 5, programs=8),
    experts=(ExpertTile(0, 32, ProductTile(64, 64, 4, 3), ProductTile(128, 64, 8, 2)),),
    linear_fp8=(LinearTile(0, 64, 64, 4, 3),),
    expand=ProductTile(64, 128, 4, 2),
    most_absorbed=99,
)
RECORD = {"torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}


def test_a_table_is_found_by_the_name_of_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table("NVIDIA H100 80GB HBM3", FOUND, RECORD, tmp_path)
    assert (
        path.name == "nvidia-h100-80gb-hbm3.json"
        and json.loads(path.read_text())["card"] == "NVIDIA H100 80GB HBM3"
    )
    with caplog.at_level(logging.INFO, "lockstep.kernels.triton.tiles"):
        assert tiles_of("NVIDIA H100 80GB HBM3", tmp_path) == FOUND
    (message,) = (record.message for record in caplog.records)
    assert message == "kernels: tile sizes tuned on NVIDIA H100 80GB HBM3 (triton 3.6.0, commit abc)"


def test_an_unknown_card_gets_the_defaults_and_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table("NVIDIA H100 80GB HBM3", FOUND, RECORD, tmp_path)
    assert tiles_of("NVIDIA B200", tmp_path) == DEFAULT
    (message,) = (record.message for record in caplog.records)
    assert (
        message
        == "kernels: no tuning table for NVIDIA B200 (there are: nvidia-h100-80gb-hbm3); default tile sizes"
    )


def test_without_a_card_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert tiles_of("", tmp_path) == DEFAULT and not caplog.records


def test_what_a_table_leaves_out_stays_at_its_default(tmp_path: Path) -> None:
    table = {"card": "C", **RECORD, "tiles": {"decode": dataclasses.asdict(FOUND.decode)}}
    (tmp_path / "c.json").write_text(json.dumps(table))
    assert tiles_of("C", tmp_path) == dataclasses.replace(DEFAULT, decode=FOUND.decode)


FEW = ExpertTile(8, 16, ProductTile(1, 1, 1, 1), ProductTile(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("tiles", "complaint"),
    [
        ({"decoded": {}}, "unknown ops decoded"),
        ({"decode": {"queries": 1}}, "missing"),
        ({"experts": [dataclasses.asdict(FEW)]}, "the last entry must hold"),
    ],
)
def test_an_invalid_table_is_refused(tiles: object, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"card": "C", **RECORD, "tiles": tiles}))
    with pytest.raises(ValueError, match=rf"c\.json: no tuning table: .*{complaint}"):
        tiles_of("C", tmp_path)


def test_tables_of_the_package_are_read() -> None:
    for path in FOLDER.glob("*.json"):
        card = json.loads(path.read_text(encoding="utf-8"))["card"]
        assert file_stem(card) == path.stem
        tiles_of(card)
