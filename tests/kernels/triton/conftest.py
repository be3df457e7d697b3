"""Kernels run in every version of Triton's interpreter, or in none: from 3.9 on it refuses a mask
made of a tensor and a scalar, which it holds as integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder


@pytest.fixture(autouse=True)
def masks_are_of_bools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        run = getattr(InterpreterBuilder, name)

        def strict(builder: Any, *args: Any, run: Any = run, place: int = place) -> Any:
            held = args[place].data.dtype
            assert held == np.bool_, f"a mask of {held}: of a tensor and a scalar, which Triton 3.9 refuses"
            return run(builder, *args)

        monkeypatch.setattr(InterpreterBuilder, name, strict)
