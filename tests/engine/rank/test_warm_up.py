"""After the warm-up the real model needs no kernel that has not been compiled or read from the
disk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.engine.models import checkpoints

_CONFIGS = {"qwen3_moe": checkpoints.qwen3_moe_config, "deepseek_v3": checkpoints.deepseek_v3_config}
_TESTS = Path(checkpoints.__file__).parents[3]

# In a process of its own, which has used no kernel yet. ``taken`` counts the forms of kernels that
# were compiled or read.
_SCRIPT = """
import functools, gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from lockstep.engine.models.config import load_config
from lockstep.engine.rank.warm_up import Pages, warm_up
from lockstep.kernels.reference.sampling import SamplingParams
from support.moe.dispatchers import dispatcher_of
from support.engine.models.local_model import FORMATS, Stepper, load_local
torch.set_num_threads(2)
path, dtype, pages, dispatch = sys.argv[2:6]
path, dtype, pages = Path(path), getattr(torch, dtype), getattr(torch, pages)
def taken():
    kernels = [x for x in gc.get_objects() if isinstance(x, Dispatcher)]
    kernels = [x for x in kernels if x.py_func.__module__.startswith("lockstep.")]
    return sorted((k.__name__, len(k.signatures)) for k in kernels if k.signatures)
warm_up(load_config(path), dtype, Pages(FORMATS[pages], 8), functools.partial(dispatcher_of, dispatch), print)
before = taken()
model = load_local(path, dtype, dispatch=dispatch)
model.pack()
stepper = Stepper(model, pages)
steps = ({0: 40}, 0), ({0: 1, 1: 20}, 1), ({0: 1, 1: 1}, 2), ({2: 3}, 0), ({3: 600}, 0), ({4: 1}, 0)
for tokens, num_decode in steps:
    stepper.step({sequence: [3] * count for sequence, count in tokens.items()}, num_decode)
rows = torch.randn(5, 8000)
column = lambda values, dtype: np.array(values, dtype)
temperatures, top_ks = column([0, 1, 1, 1, 1], "f4"), column([0, 0, 3, 0, 5], "i8")
top_ps, min_ps = column([1, 1, 1, 0.5, 0.9], "f4"), column([0, 0, 0, 0.1, 0], "f4")
some = SamplingParams(temperatures, top_ks, top_ps, min_ps)
tokens_R = model.ops.sample(rows.clone(), some, np.full(5, 0.3))
for num_top in (0, 7):
    model.ops.logprobs(rows, tokens_R, num_top)
assert before, "no kernel was compiled"
new = sorted(set(taken()) - set(before))
assert not new, f"not warm: {new}"
"""


@pytest.mark.parametrize(
    ("family", "dtype", "pages", "dispatch"),
    [
        ("qwen3_moe", "float32", "float32", "all_to_all"),
        ("deepseek_v3", "bfloat16", "bfloat16", "local"),
        ("deepseek_v3", "bfloat16", "uint8", "all_gather"),
        ("qwen3_moe", "bfloat16", "uint8", "all_gather"),
    ],
)
def test_the_model_compiles_nothing_after_the_warm_up(
    family: str, dtype: str, pages: str, dispatch: str, tmp_path: Path
) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "model", _CONFIGS[family]())
    command = [sys.executable, "-c", _SCRIPT, str(_TESTS), str(path), dtype, pages, dispatch]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
