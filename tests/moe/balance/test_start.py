"""Recorded loads: which files are read, and the placement that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lockstep
from lockstep.moe.balance.balance import imbalance
from lockstep.moe.balance.start import placement_of, read_loads, starting_placement

TRACE = Path(lockstep.__file__).parent / "recipes" / "demo" / "routing_trace.npz"


@pytest.mark.parametrize(
    "document", [[[1, 2], [3, 4]], {"phase": "serving", "expert_load": [[1, 2], [3, 4]]}]
)
def test_loads_of_an_answer_or_of_a_list(tmp_path: Path, document: object) -> None:
    (tmp_path / "loads.json").write_text(json.dumps(document))
    assert read_loads(tmp_path / "loads.json", 2, 2).tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2]]", r"loads of shape \[1, 2\]; the model has 2 MoE layers of 2 experts"),
        ("[[1, 2], [3]]", "holds no loads"),
        ('{"phase": "serving"}', "holds no loads"),
        ("nothing", "holds no loads"),
        ("[[1, 2], [3, -4]]", "at least 0"),
        ("[[1, 2], [3, NaN]]", "at least 0"),
    ],
)
def test_other_files_are_refused_naming_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loads.json").write_text(text)
    with pytest.raises(ValueError, match=rf"experts.loads = .*loads.json: .*{message}"):
        read_loads(tmp_path / "loads.json", 2, 2)
    with pytest.raises(ValueError, match=r"experts.loads = .*missing.json"):
        read_loads(tmp_path / "missing.json", 2, 2)


def test_the_demo_s_trace_starts_balanced_on_four_ranks() -> None:
    loads_LE = read_loads(TRACE, 4, 32)
    plain = starting_placement(4, 32, 4, 4)
    placement = starting_placement(4, 32, 4, 4, loads_LE)
    assert imbalance(loads_LE, plain).mean() > 1.04
    assert imbalance(loads_LE, placement).max() < 1.015


def test_a_placement_survives_packing() -> None:
    placement = starting_placement(2, 6, 3, 3)
    packed = placement.experts_LWS.tobytes()
    assert np.array_equal(placement_of(packed, 2, 6, 3).experts_LWS, placement.experts_LWS)
    assert placement_of(b"", 2, 6, 3).num_slots == 2
