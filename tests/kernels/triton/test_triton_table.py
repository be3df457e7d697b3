"""The op table: one choice per process, logged; columns of one signature."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import pytest
import torch

from lockstep.kernels.reference.column import Reference
from lockstep.kernels.table import Column, column_for, ops_of

COLUMNS: tuple[Column, ...] = ("reference", "cpu", "triton")


def test_columns_have_the_parameters_of_their_op() -> None:
    """A column may add parameters with defaults at the end."""
    reference = ops_of("reference")
    ops = [
        name for name in vars(Reference) if not name.startswith("_") and callable(getattr(reference, name))
    ]
    assert len(ops) > 25
    for name in ops:
        expected = list(inspect.signature(getattr(reference, name)).parameters)
        for column in COLUMNS:
            parameters = list(inspect.signature(getattr(ops_of(column), name)).parameters.values())
            assert [parameter.name for parameter in parameters[: len(expected)]] == expected, (column, name)
            assert all(
                parameter.default is not parameter.empty for parameter in parameters[len(expected) :]
            ), (column, name)


def test_the_choice_is_made_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops_of.cache_clear()
    with caplog.at_level(logging.INFO, "lockstep.kernels.table"):
        assert ops_of("cpu") is ops_of("cpu")
        assert ops_of("triton") is ops_of("triton")
    messages = [record.message for record in caplog.records if record.name == "lockstep.kernels.table"]
    assert messages == ["kernels: column cpu", "kernels: column triton"]


def test_devices_and_unknown_columns() -> None:
    assert column_for(torch.device("cpu")) == "cpu"
    assert column_for(torch.device("cuda", 3)) == "triton"
    with pytest.raises(ValueError, match=r"kernels: 'tirton' is no column; allowed: reference, cpu, triton"):
        ops_of("tirton")  # type: ignore[arg-type]


def test_a_cpu_process_does_not_import_triton() -> None:
    code = "import sys; from lockstep.kernels.table import ops_of; ops_of('cpu'); "
    code += "sys.exit('triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr or "the cpu column imports triton"
