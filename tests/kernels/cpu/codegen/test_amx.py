"""Products by AMX: compiled on every x86 machine, run where the CPU has its tiles."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray

from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu.codegen import amx
from lockstep.kernels.cpu.codegen.arrays import array
from lockstep.kernels.cpu.linear import linear, pack

SAPPHIRE_RAPIDS = {
    "NUMBA_CPU_NAME": "sapphirerapids",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512bf16,+amx-tile,+amx-bf16",
}

# Nothing is run, so it does not matter whether Linux grants tiles.
_COMPILE = """
import ctypes
import numba, torch
libc = ctypes.CDLL(None)
class Granting:
    syscall = staticmethod(lambda *_: 0)
    def __getattr__(self, name):
        return getattr(libc, name)
ctypes.CDLL = lambda *_, **__: Granting()
from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu.codegen import blocks
assert cpu_isa.here() == "amx"
place, one, two = numba.intp, numba.int64[::1], numba.uint16[:, ::1]
kernel = blocks.multiply_slots
kernel.compile((place, place, place, place, numba.types.UniTuple(one, 3), two, two, place))
print(*kernel.inspect_asm().values())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86 CPUs")
def test_a_step_loads_five_tiles_for_four_products_and_spills_none(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env=os.environ | SAPPHIRE_RAPIDS | {"NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    names = Counter(line.split()[0] for line in result.stdout.splitlines() if line.strip())
    copies = names["tilezero"] // 4
    assert copies > 0 and names["tdpbf16ps"] == 8 * copies  # whole steps, and the last units
    assert names["tileloadd"] == (2 * 5 + 4) * copies and names["tilestored"] == 4 * copies
    assert names["ldtilecfg"] and names["tilerelease"]


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_that_linux_refuses_are_an_error_that_says_the_setting(
    granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses where a process's stack for signals is too small for its registers."""
    libc = SimpleNamespace(syscall=lambda *_: 0 if granted else -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.ENOSPC)
    if granted:
        amx.ask_for_tiles()
        return
    with pytest.raises(RuntimeError, match=r"refuses AMX \(No space .*\): set cluster\.isa = avx512_bf16"):
        amx.ask_for_tiles()


@pytest.mark.skipif(cpu_isa.here() != "amx", reason="this process computes without AMX")
@pytest.mark.parametrize("inner", [2, 30, 32, 90, 256, 258, 300, 1024])
def test_any_number_of_rows_and_of_inner_values(inner: int) -> None:
    """Whole tiles and pieces of them, and inner dims that end within one; each row as if alone,
    though a tile beside it holds rows that are not numbers.
    """
    draw = torch.Generator().manual_seed(inner)
    x, weight = (torch.randn(n, inner, generator=draw).bfloat16() for n in (600, 80))
    packed = pack(weight)
    whole, exact = linear(x, packed), F.linear(x.double(), weight.double())
    torch.testing.assert_close(whole.double(), exact, rtol=2**-8, atol=1e-4 * inner**0.5)
    for start, stop in ((0, 1), (0, 16), (3, 20), (15, 48), (40, 296), (0, 257)):
        assert torch.equal(linear(x[start:stop], packed), whole[start:stop])
    x[7] = float("nan")
    assert torch.equal(linear(x, packed)[8:], whole[8:])


@pytest.mark.skipif(cpu_isa.here() != "amx", reason="this process computes without AMX")
@pytest.mark.parametrize("num_rows", [1, 7, 16])
def test_products_of_units_are_those_of_their_numbers(num_rows: int) -> None:
    """Scores of 64 positions, and sums over them, of which only the rows asked for are written."""
    draw = torch.Generator().manual_seed(num_rows)
    q, k, v, shares = (torch.randn(*shape, generator=draw).bfloat16() for shape in SHAPES)
    sums, shrink = torch.randn(20, 96, generator=draw), torch.rand(16, generator=draw)
    expected = (
        sums[2 : 2 + num_rows].double() * shrink[:num_rows, None] + (shares.double() @ v.double())[:num_rows]
    )
    turned = array(k).view(np.uint32).T.copy()
    paired = array(v.view(32, 2, 96).transpose(1, 2).contiguous()).reshape(32, -1).view(np.uint32)
    scores, written = np.empty((16, 64), np.float32), sums.numpy().copy()
    _multiply(scores, _units(q), turned, written, num_rows, shrink.numpy(), _units(shares), paired)
    torch.testing.assert_close(
        torch.from_numpy(scores[:num_rows]).double(),
        (q[3 : 3 + num_rows].double() @ k.double().T),
        rtol=1e-5,
        atol=1e-4,
    )
    torch.testing.assert_close(
        torch.from_numpy(written[2 : 2 + num_rows]).double(), expected, rtol=1e-5, atol=1e-4
    )
    assert np.array_equal(written[2 + num_rows :], sums.numpy()[2 + num_rows :])


SHAPES = ((20, 96), (64, 96), (64, 96), (16, 64))  # queries, keys, values, shares


def _units(numbers: torch.Tensor) -> NDArray[np.uint32]:
    return array(numbers).view(np.uint32)


@njit
def _multiply(scores, q, turned, sums, num_rows, shrink, shares, paired):  # type: ignore[no-untyped-def]
    like = np.empty(0, np.uint16)
    amx.begin_tiles(like, num_rows)
    amx.multiply_units(scores, q, 3, turned)
    amx.add_units(sums, 2, num_rows, shrink, shares, paired)
    amx.end_tiles(like)
