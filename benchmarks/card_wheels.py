"""Wheels of the packages that the image of a card lacks: PyTorch, Triton and Python are there,
a network is not.

    make card-wheels                                      fills benchmarks/wheels, which git ignores
    python benchmarks/card_wheels.py --install FOLDER     on the card: the missing ones into FOLDER

The list is that of pyproject.toml (dependencies and the extra ``test``) with all that these need,
in the versions of this environment, less ASSUMED and all that only these need.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "wheels"
MOST_BYTES = 60_000_000
# In the image; and what is large and serves nothing there, clusters of Ray and Kubernetes' schemas.
ASSUMED = {"torch", "triton", "numpy", "numba", "transformers", "matplotlib"} | {"ray", "kubernetes-validate"}
PYTHON = "3.12"
_GLIBC = (5, 12, 17, 24, 27, 28, 31, 34, 35)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + [
    f"manylinux{name}_x86_64" for name in ("1", "2010", "2014")
]
_CARD = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.3",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "os_name": "posix",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="install what is missing here")
    target = parser.parse_args().install
    if target is not None:
        install(target)
    else:
        fill()


def requirements() -> list[Requirement]:
    """Those of pyproject.toml that serving and tests have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["test"]
    return [Requirement(text) for text in texts]


def carried() -> dict[str, str]:
    """Name and version of each package to carry."""
    found: dict[str, str] = {}
    waiting, seen = requirements(), set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in ASSUMED:
            continue
        package = metadata.distribution(name)
        found[name] = package.version
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += _needs(package, extra)
    return found


def _needs(package: metadata.Distribution, extra: str) -> Iterator[Requirement]:
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(_CARD | {"extra": extra}):
            yield requirement


def fill() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    named = [f"{name}=={version}" for name, version in sorted(carried().items())]
    of_card = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary", ":all:", "--no-deps"]
    for platform in PLATFORMS:
        of_card += ["--platform", platform]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", *of_card, "--dest", str(FOLDER), *named], check=True)
    sizes = [wheel.stat().st_size for wheel in FOLDER.glob("*.whl")]
    print(f"{len(sizes)} wheels, {sum(sizes) / 1e6:.1f} MB, in {FOLDER}")
    if sum(sizes) > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES / 1e6:.0f} MB: name the largest in ASSUMED")


def install(target: Path) -> None:
    """Installs the wheels of packages that this Python lacks, or has in a version that
    pyproject.toml refuses.
    """
    allowed = {canonicalize_name(each.name): each.specifier for each in requirements()}
    missing = []
    for wheel in sorted(FOLDER.glob("*.whl")):
        name = canonicalize_name(wheel.name.partition("-")[0])
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(wheel)
            continue
        if name in allowed and here not in allowed[name]:
            missing.append(wheel)
    print(f"installing {len(missing)} wheels: {', '.join(wheel.name.partition('-')[0] for wheel in missing)}")
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        alone = ["--no-index", "--no-deps", "--no-compile", "--target", str(target)]
        subprocess.run([*pip, *alone, *map(str, missing)], check=True)


if __name__ == "__main__":
    main()
