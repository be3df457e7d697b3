"""CPU instruction sets: derived from features, limited by a setting, and consistent with the
libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from llvmlite import binding

from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu_isa import Form, Isa
from lockstep.launch.environment import isa_settings

SKYLAKE = {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
LUNAR_LAKE = {"avx2", "avxvnni", "avxvnniint8", "avxneconvert"}
KINDS: list[tuple[set[str], Isa]] = [
    (set(), "avx2"),
    ({"avx2", "avx512f"}, "avx2"),  # a Xeon Phi
    (SKYLAKE, "avx512"),
    (LUNAR_LAKE, "avx2"),
    ({"neon"}, "avx2"),
    ({"neon", "bf16"}, "avx2"),
    (SKYLAKE | {"avx512bf16"}, "avx512_bf16"),
    (SKYLAKE | {"avx512bf16", "amx-bf16"}, "avx512_bf16"),  # no tiles
    (SKYLAKE | {"avx512bf16", "amx-bf16", "amx-tile"}, "amx"),
]


@pytest.mark.parametrize(("features", "isa"), KINDS)
def test_the_kind_of_a_cpu_is_told_from_its_features(features: set[str], isa: Isa) -> None:
    assert cpu_isa.isa_of(features) == isa


FORMS: list[tuple[Isa, int, int, Form, Form]] = [
    ("avx2", 64, 32, "blocks", "blocks"),
    ("avx512", 64, 32, "blocks", "blocks"),
    ("amx", 64, 32, "blocks", "blocks"),
    ("avx2", 64, 12, "blocks", "plain"),
    ("avx512", 64, 12, "blocks", "plain"),
    ("avx512_bf16", 64, 32, "blocks", "blocks"),
    ("avx512_bf16", 64, 12, "blocks", "plain"),  # hidden 64, experts 12 wide: no blocks of 12 columns
    ("avx512_bf16", 12, 64, "onednn", "plain"),
]


@pytest.mark.parametrize(("isa", "columns", "inner", "weight", "slots"), FORMS)
def test_how_weights_are_held(isa: Isa, columns: int, inner: int, weight: Form, slots: Form) -> None:
    assert cpu_isa.weight_form(isa, columns, inner) == weight
    assert cpu_isa.slot_form(columns, inner) == slots


def test_onednn_computes_in_bf16_where_it_is_taken_to() -> None:
    if cpu_isa.here() != "avx2":
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_more_than_the_cpu_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_isa, "here", lambda: "avx512")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: dict.fromkeys(SKYLAKE, True))
    cpu_isa.check()
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx2": True, "avx512f": False})
    with pytest.raises(ValueError, match=r"cluster.isa = avx512: this CPU has avx2 only; use auto or avx2"):
        cpu_isa.check()


@pytest.mark.parametrize("limit", ["avx2", "avx512", "avx512_bf16"])
def test_a_limited_process_computes_on_what_is_left(limit: Isa) -> None:
    if cpu_isa.lesser(limit, cpu_isa.here()) != limit:
        pytest.skip(f"this CPU has {cpu_isa.here()} only")
    code = "import torch; from lockstep.kernels import cpu_isa; cpu_isa.check(); print(cpu_isa.here());"
    code += "print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    environment = os.environ | isa_settings(limit)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert result.stdout.split() == [limit, str(limit != "avx2")], result.stderr
