"""After the warm-up the real model needs no kernel that has not been compiled or read from the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import checkpoints

_CONFIGS = {"qwen3_moe": checkpoints.qwen3_moe_config, "deepseek_v3": checkpoints.deepseek_v3_config}
_SUPPORT = Path(checkpoints.__file__).parent.parent

# In a process of its own, which has used no kernel yet. ``taken`` counts the forms of kernels that were compiled or read.
_SCRIPT = """
import gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from numba.core.dispatcher import Dispatcher
from lockstep.engine.models.config import load_config
from lockstep.engine.warm_up import warm_up
from support.local_model import FORMATS, Stepper, load_local
torch.set_num_threads(2)
path, dtype, pages = Path(sys.argv[2]), getattr(torch, sys.argv[3]), getattr(torch, sys.argv[4])
def taken():
    kernels = [x for x in gc.get_objects() if isinstance(x, Dispatcher) and x.py_func.__module__.startswith("lockstep.")]
    return sorted((k.__name__, len(k.signatures)) for k in kernels if k.signatures)
warm_up(load_config(path), dtype, FORMATS[pages], 8, print)
before = taken()
model = load_local(path, dtype)
model.pack()
stepper = Stepper(model, pages)
for tokens, num_decode in (({0: 40}, 0), ({0: 1, 1: 20}, 1), ({0: 1, 1: 1}, 2), ({2: 3}, 0)):
    stepper.step({sequence: [3] * count for sequence, count in tokens.items()}, num_decode)
assert before, "no kernel was compiled"
new = sorted(set(taken()) - set(before))
assert not new, f"not warm: {new}"
"""


@pytest.mark.parametrize(("dtype", "pages"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "uint8")])
@pytest.mark.parametrize("family", _CONFIGS)
def test_the_model_compiles_nothing_after_the_warm_up(family: str, dtype: str, pages: str, tmp_path: Path) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "model", _CONFIGS[family]())
    command = [sys.executable, "-c", _SCRIPT, str(_SUPPORT), str(path), dtype, pages]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr
