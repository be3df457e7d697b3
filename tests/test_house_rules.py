"""Rules of the house that a machine can hold: directions of imports, rooms free of torch and of
ranks, sizes, names, documents.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
WINGS = ("engine.planner", "engine.rank", "engine.frontend")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("README.md"), ROOT / "recipes" / "demo" / "README.md"]
)
# Rooms all of whose modules import without torch, and single modules of other rooms.
TORCH_FREE = (
    "engine.controller",
    "engine.frontend",
    "engine.kv",
    "engine.planner",
    "engine.protocol",
    "engine.recording",
    "engine.simulation",
    "engine.text",
    "engine.tracing",
    "launch",
    "engine.models.checkpoint",
    "engine.models.config",
    "engine.models.families",
    "engine.models.shape",
    "engine.rank.contract",
    "engine.rank.grammars",
    "moe.balance",
    "kernels.cpu_isa",
)
WITH_TORCH = (
    "engine.rank.process",
    "engine.rank.imports_on_cpu",
    "engine.rank.executor",
    "engine.rank.page_pool",
    "engine.models.weights",
)
MAX_PARAMETERS = 7
RANK_WORDS = re.compile(
    r"torch\.distributed|\bdist\.|process_group|all_gather|all_reduce|all_to_all|reduce_scatter|"
    r"\b(?:\w+_)?ranks?\b|world_size",
    re.IGNORECASE,
)
# The rank of a factor (MLA) is not one of a group.
LOW_RANK = re.compile(r"\b(?:q|kv)_(?:lora_)?rank\b|\blow[- ]rank\b")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
RIDDLES = ("What ", "Where ", "Who ", "Of ", "That of ")


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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def import_graph() -> dict[str, frozenset[str]]:
    """The modules and packages that each of ours imports, lazily or not."""
    modules = {module_of(path): path for path in SOURCES}
    return {
        module: frozenset(
            target
            for _, name in imported(path)
            for target in ([name] if name in modules else [name.rpartition(".")[0]])
            if target in modules
        )
        - {module}
        for module, path in modules.items()
    }


def first_cycle(edges: dict[str, Iterable[str]]) -> list[str]:
    """The nodes of a cycle, its first one again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for target in sorted(edges.get(node, ())):
                if found := visit(target, [*trail, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def way_into(start: str, goal: str) -> list[str]:
    """The imports that lead from a module of room ``start`` to one of ``goal``; empty if none."""
    edges = import_graph()
    came_from = {module: "" for module in edges if module.startswith(start + ".")}
    waiting = sorted(came_from)
    for module in waiting:
        if module.startswith(goal + "."):
            trail = [module]
            while came_from[trail[0]]:
                trail.insert(0, came_from[trail[0]])
            return trail
        for target in sorted(edges[module] - came_from.keys()):
            came_from[target] = module
            waiting.append(target)
    return []


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
    found = first_cycle(dict(import_graph()))
    assert not found, " -> ".join(found)


def test_no_import_cycles_between_neighbouring_rooms() -> None:
    """Folders beside each other, whatever stands in them: launch/run and launch/cluster, ..."""
    neighbours: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    folders = {module_of(path): path.relative_to(ROOT).parent.parts for path in SOURCES}
    for module, targets in import_graph().items():
        for target in targets:
            here, there = folders[module], folders[target]
            level = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            if level is not None:
                neighbours[".".join(here[:level])][here[level]].add(there[level])
    found = {parent: first_cycle(dict(edges)) for parent, edges in neighbours.items()}
    assert not {parent: cycle for parent, cycle in found.items() if cycle}


@pytest.mark.parametrize("wing", WINGS)
def test_no_wing_imports_another(wing: str) -> None:
    """Planner, rank and frontend stand side by side; no third room leads from one to another."""
    assert not [
        " -> ".join(way) for other in WINGS if other != wing for way in [way_into(wing, other)] if way
    ]


def test_the_import_checks_can_fail() -> None:
    assert first_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert way_into("engine.frontend", "engine.protocol")
    assert way_into("launch", "kernels")[-1].startswith("kernels.")


# Imports modules with a torch that cannot be imported, and says which file of ours asked for it.
WITHOUT_TORCH = """
import importlib, importlib.abc, importlib.machinery, pathlib, sys, traceback
import lockstep
root = pathlib.Path(lockstep.__file__).parent
asked = []

class TorchIsOff(Exception):
    pass

class Off(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torch" else None

    def exec_module(self, module):
        frames = [(pathlib.Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
        ours = [(path.relative_to(root), line) for path, line in frames if path.is_relative_to(root)]
        asked.extend(f"{path}:{line}" for path, line in reversed(ours) if path.parts[0] != ".venv")
        raise TorchIsOff

sys.meta_path.insert(0, Off())
for module in sys.argv[1:]:
    asked.clear()
    try:
        importlib.import_module("lockstep." + module)
    except TorchIsOff:
        pass
    except ModuleNotFoundError as error:  # of an extra that is not installed
        if not (error.name or "").startswith("opentelemetry"):
            raise
    if asked:
        print(f"{module}: torch is imported by {asked[0]}")
"""


def who_imports_torch(modules: Iterable[str]) -> list[str]:
    """A line for each of the modules that needs torch to be imported; all in one interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *modules],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_rooms_that_import_without_torch() -> None:
    modules = [
        module
        for module in import_graph()
        if any(module == room or module.startswith(room + ".") for room in TORCH_FREE)
    ]
    assert len(modules) > len(TORCH_FREE)
    assert not who_imports_torch(modules)


def test_the_torch_check_can_fail() -> None:
    found = who_imports_torch(["engine.kv.manager", *WITH_TORCH, "launch.cli"])
    assert [line.partition(":")[0] for line in found] == list(WITH_TORCH)
    assert re.search(r"imported by [\w/]+\.py:\d+$", found[0]), found


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


def longest_allowed(path: Path, outside_kernels: int, in_kernels: int) -> int:
    return in_kernels if path.is_relative_to(ROOT / "kernels") else outside_kernels


def test_files_are_one_noun_and_not_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not [
        f"{path.relative_to(ROOT)}: {length} lines"
        for path, length in lengths.items()
        if length > longest_allowed(path, 400, 500)
    ]
    assert not [str(path) for path in lengths if path.stem in FORBIDDEN_NAMES]


def test_the_root_of_the_engine_holds_no_module() -> None:
    assert [path.name for path in (ROOT / "engine").glob("*.py")] == ["__init__.py"]


COMPILED = ("triton", "njit", "inner(", "intrinsic", "overload")


def decorated(function: ast.FunctionDef | ast.AsyncFunctionDef, *names: str) -> bool:
    """Whether a decorator of the function has one of these names in it."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(name in decorators for name in names)


def test_functions_are_short() -> None:
    lengths = {
        f"{where(path, function.lineno)}: {function.name}": (
            (function.end_lineno or 0) - function.lineno + 1,
            longest_allowed(path, 60, 80),
        )
        for path in SOURCES
        for function in functions(path)
        if not decorated(function, *COMPILED)
    }
    assert not {name: length for name, (length, allowed) in lengths.items() if length > allowed}


def test_many_parameters_mean_a_dataclass() -> None:
    wrong = []
    for path in SOURCES:
        for function in functions(path):
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
            # A command's parameters are its options.
            if count > MAX_PARAMETERS and not decorated(function, *COMPILED, "command"):
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


def test_no_public_class_name_stands_twice() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("engine", "moe", "launch"):
            for node in tree(path).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(where(path, node.lineno))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [
        f"{where(path, getattr(node, 'lineno', 1))}: {text.splitlines()[0]}"
        for path in (*SOURCES, *TESTS)
        for node in ast.walk(tree(path))
        if isinstance(node, documented)
        if (text := ast.get_docstring(node) or "").startswith(RIDDLES)
    ]


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of comments that have a line of their own; several lines in a row are one."""
    before = ""
    for number, line in enumerate(map(str.lstrip, path.read_text(encoding="utf-8").splitlines()), start=1):
        if line.startswith("# ") and not before.startswith("#"):
            yield number, line[2:]
        before = line


def help_texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what options and keys of recipes say of themselves."""
    for node in ast.walk(tree(path)):
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("help", "description")
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.lineno, node.value.value


def test_comments_and_help_texts_begin_with_a_noun_or_a_verb() -> None:
    assert not [
        f"{where(path, line)}: {text}"
        for path in (*SOURCES, *TESTS)
        for line, text in (*comments(path), *help_texts(path))
        if text.startswith(RIDDLES)
    ]


def computes(value: ast.expr) -> bool:
    """Whether an expression calls something (``len`` is free) or has two operators."""
    nodes = list(ast.walk(value))
    operators = sum(isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp) for node in nodes)
    return operators > 1 or any(
        isinstance(node, ast.Call) and ast.unparse(node.func) != "len" for node in nodes
    )


def packed_assignments(module: ast.Module) -> Iterator[int]:
    """Lines of assignments that pack two computations or more into one statement."""
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Tuple)
            and any(isinstance(target, ast.Tuple) for target in node.targets)
            and sum(map(computes, node.value.elts)) > 1
        ):
            yield node.lineno


# Loops of compiled kernels and the code that emits them keep the halves of a vector on one line.
COMPILED_FOR_CPUS = ROOT / "kernels" / "cpu"


def test_an_assignment_computes_one_thing() -> None:
    assert not [
        where(path, line)
        for path in SOURCES
        if not path.is_relative_to(COMPILED_FOR_CPUS)
        for line in packed_assignments(tree(path))
    ]


def test_the_check_of_assignments_can_fail() -> None:
    packed = ("a, b = f(x), g(y)", "a, b = x * y + z, f(x)", "self.a, b = [f(x)], {g(y): z}")
    plain = ("a, b = b, a", "a, b = 0, x.y", "a, b = f(x)", "a, b = f(x), y + 1", "a, b = len(x), f(x)")
    assert all(list(packed_assignments(ast.parse(text))) for text in packed)
    assert not any(list(packed_assignments(ast.parse(text))) for text in plain)


def named_files(text: str) -> set[str]:
    """Files named in the code of a page: names with a folder and an extension."""
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    return set(
        re.findall(r"(?<![\w./~$<*{-])\w[\w.-]*/[\w./-]*\.(?:py|md|ya?ml|toml|sh|json|csv|txt|cpp)\b", code)
    )


def bare_files(text: str) -> set[str]:
    """Sources and pages named in the code of a page without a folder."""
    return set(re.findall(r"`(\w[\w-]*\.(?:py|md|sh))`", text))


def named_folders(text: str) -> set[Path]:
    """Folders that a page names, by themselves or before a file."""
    return {Path(name).parent for name in named_files(text)} | set(
        map(Path, re.findall(r"`([\w/-]+)/`", text))
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_without_a_folder_are_in_one_that_the_document_names(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    roots = (ROOT, ROOT / "tests", document.parent)
    folders = {root / folder for root in roots for folder in (Path(), *named_folders(text))}
    assert not [
        name for name in sorted(bare_files(text)) if not any((folder / name).exists() for folder in folders)
    ]


URLS = re.compile(r"https?://\S+|\]\([^)\s]*\)")


def long_lines(text: str) -> list[str]:
    """Lines of prose beyond 100 columns: tables, blocks of code, links and addresses are free."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in prose.splitlines() if line[:1] != "|" and len(URLS.sub("", line)) > 100]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_documents_have_at_most_100_columns(document: Path) -> None:
    assert not long_lines(document.read_text(encoding="utf-8"))


def test_the_check_of_long_lines_can_fail() -> None:
    words = "word " * 30
    assert long_lines(f"a\n{words}\n```\nb\n```\n- {words}\n") == [words, f"- {words}"]
    assert not long_lines(f"| {words} |\n```sh\n{words}\n```\nsee https://a.b/{'c' * 100}\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document: Path) -> None:
    folders = {ROOT, ROOT / "tests", document.parent}
    assert not [
        name
        for name in sorted(named_files(document.read_text(encoding="utf-8")))
        if not any((folder / name).exists() for folder in folders)
    ]


def test_the_architecture_names_files() -> None:
    names = named_files((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(names) >= 8
    assert named_files("see `no/such.py`, engine/x.py and `engine.py`") == {"no/such.py"}
    assert bare_files("see `no/such.py`, `engine.py` and x.py") == {"engine.py"}
    assert named_folders("`a/b.py` beside `c/d/`") == {Path("a"), Path("c/d")}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_packages_are_listed() -> None:
    """setup lists the packages by hand; a new folder must be in it, or it is missing from an
    installed copy.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    for folder in folders:
        assert f'"lockstep.{".".join(folder.parts)}"' in text, folder


def test_constraints_hold_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(line)
        for line in [*project["dependencies"], *extras["otel"], *extras["test"], *extras["dev"]]
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    held = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in wanted:
        if requirement.name not in ("torch", "triton"):  # which go together, and differ between CPUs and GPUs
            assert held[requirement.name] in requirement.specifier, requirement


def test_the_package_is_the_checkout() -> None:
    spec = importlib.util.find_spec("lockstep")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == (Path(__file__).parent.parent / "__init__.py").resolve()
