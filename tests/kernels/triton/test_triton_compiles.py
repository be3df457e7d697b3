"""The Triton kernels through the real compiler for sm_90 (H100, H200), sm_100 (B200, GB200) and
sm_120 (RTX 5090, RTX PRO 6000), which needs no card: types, shared memory, spills.

The interpreter shows a kernel's results, but accepts programs that the compiler refuses.
``LOCKSTEP_COMPILE=all`` compiles every case for each kind of card; ``LOCKSTEP_TRITON=FOLDER`` by
the Triton in that folder (``pip install --target FOLDER --no-deps triton==3.9.0``).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.kernels.triton.tiles import default_tiles

# A case takes 3 to 20 s on two cores of an EPYC Genoa; the limit ends a compiler that hangs.
pytestmark = pytest.mark.timeout(900)
# Shared memory of a program (CUDA programming guide, compute capabilities).
SHARED_PER_PROGRAM = {90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
PROGRAM = Path(__file__).parent.parent.parent / "support" / "kernels" / "triton_compile.py"
_PLACING = {"grouping._count_kernel", "grouping._place_kernel"}
_ATTENDING = {"attend._attend_kernel", "attend._join_kernel"}
_LATENTS = {"attend_latents._attend_latents_kernel", "attend._join_kernel"}
_PREFILLING = {"mla_prefill._expand_kernel", "mla_prefill._attend_window_kernel"}
# Cases of the program, and the kernels each compiles.
CASES = {
    "gates": {"gate._choose_kernel"},
    "groupings": _PLACING | {"grouping._permute_kernel", "grouping._unpermute_kernel"},
    "experts": _PLACING | {"experts._up_kernel", "experts._down_kernel", "experts._weighted_sum_kernel"},
    "fp8": _PLACING
    | {"experts_fp8._up_fp8_kernel", "experts_fp8._down_fp8_kernel"}
    | {"fp8._quantise_kernel", "fp8._silu_mul_fp8_kernel", "linear_fp8._linear_fp8_kernel"},
    "four_bit": _PLACING | {"experts_four_bit._up_four_bit_kernel", "experts_four_bit._down_four_bit_kernel"},
    "norms": {"norm._rms_norm_kernel", "norm._silu_mul_kernel"},
    "rotations": {"rope._rotate_and_write_kernel", "rope._rotate_and_write_latent_kernel"},
    "indexers": {"indexer._scores_kernel", "rope._rotate_and_write_kernel"},
    "attentions": _ATTENDING,
    "latent_attentions": _LATENTS | _PREFILLING,
    "latent_attentions_fp8": _LATENTS | _PREFILLING,
    "pages": {"pages._copy_pages_kernel"},
    "clocks": {"clock._add_time_kernel"},
    "samplers": {f"sampling._{name}_kernel" for name in ("allow", "bias", "logsumexp", "mask", "penalty")}
    | {f"draw._{name}_kernel" for name in ("best", "narrow", "mass", "pick")},
}
MATRIX_KERNELS = _PREFILLING | {
    "experts._up_kernel",
    "experts._down_kernel",
    "experts_fp8._up_fp8_kernel",
    "experts_fp8._down_fp8_kernel",
    "linear_fp8._linear_fp8_kernel",
    "experts_four_bit._up_four_bit_kernel",
    "experts_four_bit._down_four_bit_kernel",
    "attend._attend_kernel",
    "attend_latents._attend_latents_kernel",
}


def test_every_kernel_is_compiled_by_some_case() -> None:
    folder = Path(__file__).parent.parent.parent.parent / "kernels" / "triton"
    kernels = set()
    for path in folder.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        defined = [line for before, line in itertools.pairwise(lines) if before.startswith("@triton.jit")]
        names = [line.removeprefix("def ").partition("(")[0] for line in defined]
        kernels |= {f"{path.stem}.{name}" for name in names if name.endswith("_kernel")}
    assert set().union(*CASES.values()) == kernels


class Compilers:
    """A process for each kind of card, which compiles one case after the other: to import PyTorch
    and Triton takes longer than many a case.
    """

    def __init__(self, cache: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = [os.environ.get("LOCKSTEP_TRITON"), os.environ.get("PYTHONPATH")]
        self._environment = environment | {
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        self._running: dict[int, subprocess.Popen[str]] = {}

    def needs(self, case: str, arch: int) -> dict[str, list[dict[str, Any]]]:
        """The needs of each kernel of ``case``, by its variants."""
        if arch not in self._running:
            self._running[arch] = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(arch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        process = self._running[arch]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{case}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:  # its own words are in the captured output
            del self._running[arch]
            raise AssertionError(f"the compiler ended with {process.wait()}")
        answer = json.loads(line)
        assert isinstance(answer, dict), answer
        return answer

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilers]:
    found = Compilers(tmp_path_factory.mktemp("triton"))
    yield found
    found.close()


# Those that use most registers and shared memory.
_LATENT_CASES = {"latent_attentions", "latent_attentions_fp8"}
BY_DEFAULT = {
    90: set(CASES),
    100: {"attentions", "clocks", "fp8"} | _LATENT_CASES,
    120: {"clocks", "latent_attentions_fp8"},
}
# The units that 64 heads over latents take (32 on sm_120, whose operands lie in registers).
LATENT_UNITS = {90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}


def kinds() -> list[tuple[str, int]]:
    every = os.environ.get("LOCKSTEP_COMPILE") == "all"
    return [(case, arch) for case in CASES for arch, some in BY_DEFAULT.items() if every or case in some]


@pytest.mark.parametrize(("case", "arch"), kinds())
def test_kernels_compile_fit_spill_nothing_and_use_the_matrix_units(
    case: str, arch: int, compilers: Compilers
) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
    needs = compilers.needs(case, arch)
    assert set(needs) == CASES[case]
    for name, variants in needs.items():
        assert variants
        for variant in variants:
            assert variant["shared"] <= SHARED_PER_PROGRAM[arch], (name, variant)
            assert variant["spilled"] == 0, (name, variant)
            assert variant["units"] or name not in MATRIX_KERNELS, (name, variant)
            if name == "attend_latents._attend_latents_kernel":
                assert variant["units"] == [LATENT_UNITS[arch]], variant


def test_64_heads_widen_each_latent_once(compilers: Compilers) -> None:
    """In a loop that the compiler has not unrolled, values widened by a program are those of a
    block: its keys and then its values.
    """
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
    tiles = default_tiles(90)
    blocks = {512 * tile.keys for tile in (tiles.latent_decode_fp8, tiles.latent_extend_fp8)}
    assert tiles.latent_decode_fp8.queries == 64 and blocks == {512 * 64}
    needs = compilers.needs("latent_attentions_fp8", 90)
    assert {variant["widened"] for variant in needs["attend_latents._attend_latents_kernel"]} == blocks


def test_the_clock_is_one_kernel_for_all_places_and_signs(compilers: Compilers) -> None:
    """So it is compiled before the first step, whichever group that waits for first."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
    assert len(compilers.needs("clocks", 90)["clock._add_time_kernel"]) == 1
