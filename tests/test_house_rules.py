"""The rules of the house that a machine can hold: which way imports point, what stays free of torch
and of ranks, sizes.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lockstep

ROOT = Path(lockstep.__file__).parent
FOLDERS = ("launch", "engine", "moe", "parallel", "kernels", "recipes")
MAY_IMPORT = {
    "launch": {"launch", "engine", "moe", "parallel", "kernels", "recipes"},
    "engine": {"engine", "moe", "parallel", "kernels"},
    "moe": {"moe", "parallel", "kernels"},
    "parallel": {"parallel"},
    "kernels": {"kernels"},
    "recipes": {"recipes", "kernels"},  # the demo model is trained with the gate that serves it
}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
WITH_TORCH = ("engine.rank.process", "engine.rank.executor", "engine.rank.page_pool", "engine.models.weights")
TORCH_FREE = (
    "engine.protocol.plan",
    "engine.protocol.sockets",
    "engine.protocol.slot_table",
    "engine.protocol.lobby",
    "engine.planner.planner",
    "engine.controller.controller",
    "engine.rank.grammars",
    "engine.simulation.simulated_rank",
    "engine.simulation.simulation",
    "engine.models.checkpoint",
    "engine.models.config",
    "engine.kv.hashing",
    "engine.kv.manager",
    "engine.frontend.process",
    "moe.balance.placement",
    "kernels.cpu_isa",
    "launch.cli",
    "launch.commands.main",
    "launch.recipe.recipe",
    "launch.cluster.entry",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 80, 7
RANK_WORDS = re.compile(
    r"torch\.distributed|\bdist\.|process_group|all_gather|all_reduce|all_to_all|reduce_scatter|\b(?:\w+_)?ranks?\b|world_size",
    re.IGNORECASE,
)
LOW_RANK = re.compile(
    r"\b(?:q|kv)_(?:lora_)?rank\b|\blow[- ]rank\b"
)  # the rank of a factor (MLA) is not one of a group
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module below lockstep) of every import of ours in the file, wherever it stands."""
    package = ("lockstep", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (
            (node.lineno, name.removeprefix("lockstep.")) for name in names if name.startswith("lockstep.")
        )


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_imports_point_down() -> None:
    wrong = [
        f"{where(path, line)}: {name}"
        for path in SOURCES
        for line, name in imported(path)
        if name != "__version__" and name.split(".")[0] not in MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    ]
    assert not wrong


def test_imports_inside_the_package_are_relative() -> None:
    wrong = [
        where(path, node.lineno)
        for path in SOURCES
        for node in ast.walk(tree(path))
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == "lockstep"
        )
        or (
            isinstance(node, ast.Import)
            and any(alias.name.split(".")[0] == "lockstep" for alias in node.names)
        )
    ]
    assert not wrong


def test_no_import_cycles() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in SOURCES
        if path.name != "__init__.py"
    }
    edges = {
        module: {
            target
            for _, name in imported(path)
            for target in (name, name.rpartition(".")[0])
            if target in modules
        }
        - {module}
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "cycle: " + " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, lockstep.{module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr or f"importing lockstep.{module} imports torch"


@pytest.mark.parametrize("module", WITH_TORCH)
def test_the_torch_check_can_fail(module: str) -> None:
    code = f"import sys, lockstep.{module}; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode
        == 1
    )


def test_models_and_kernels_know_nothing_of_ranks() -> None:
    wrong = [
        f"{where(path, number)}: {line.strip()}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "engine/models") or path.is_relative_to(ROOT / "kernels")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if RANK_WORDS.search(LOW_RANK.sub("", line))
    ]
    assert not wrong


def test_the_environment_is_read_in_launch_only() -> None:
    readers = {
        path for path in SOURCES if re.search(r"os\.environ|getenv|putenv", path.read_text(encoding="utf-8"))
    }
    assert not [str(path) for path in readers if not path.is_relative_to(ROOT / "launch")]
    assert ROOT / "launch" / "environment.py" in readers


def test_files_are_one_noun_and_not_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}
    assert not [name for name in lengths if Path(name).stem in FORBIDDEN_NAMES]


def exempt(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Kernels of Triton and Numba take arrays and may be long, and a command's parameters are its
    options.
    """
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(name in decorators for name in ("triton", "njit", "inner(", "intrinsic", "command"))


def test_functions_are_short() -> None:
    wrong = [
        f"{where(path, function.lineno)}: {function.name}, {(function.end_lineno or 0) - function.lineno + 1} lines"
        for path in SOURCES
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES and not exempt(function)
    ]
    assert not wrong


def test_many_parameters_mean_a_dataclass() -> None:
    wrong = []
    for path in SOURCES:
        for function in functions(path):
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
            if count > MAX_PARAMETERS and not exempt(function):
                wrong.append(f"{where(path, function.lineno)}: {function.name}, {count} parameters")
    assert not wrong


def test_no_module_level_mutable_state() -> None:
    """Nothing to fill at module level (an empty list, dict or set), and no ``global``."""
    wrong = []
    for path in SOURCES:
        for node in tree(path).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            empty = (isinstance(value, ast.List | ast.Set) and not value.elts) or (
                isinstance(value, ast.Dict) and not value.keys
            )
            made = isinstance(value, ast.Call) and ast.unparse(value.func) in (
                "list",
                "dict",
                "set",
                "defaultdict",
                "deque",
            )
            if empty or made:
                wrong.append(where(path, node.lineno))
        wrong += [where(path, node.lineno) for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert not wrong


def test_packages_are_listed() -> None:
    """setup lists the packages by hand; a new folder must be in it, or it is missing from an
    installed copy.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    for folder in folders:
        assert f'"lockstep.{".".join(folder.parts)}"' in text, folder


def test_the_package_is_the_checkout() -> None:
    spec = importlib.util.find_spec("lockstep")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == (Path(__file__).parent.parent / "__init__.py").resolve()
