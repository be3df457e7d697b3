"""``make test-clients``: runs this folder against a served demo, in environments of its own.

Server and clients share no package, so the clients' need neither torch nor a version that the
server could not take. Those of openai below 3, and lm-eval, have an environment apart. Arguments go
to pytest.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from support.serving.served import serve

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-clients"
MODEL = ROOT / "recipes/demo/model"
TOOLS = ("pytest", "pytest-timeout")
# The extras that an environment installs, by its name, and the tests that run in it.
EXTRAS = {"clients": ("clients",), "apart": ("clients-openai2", "evals")}
MARKS = {"clients": "not apart", "apart": "apart"}
# Three that lm-eval asks for have no wheels. They are pure Python.
SOURCES = "rouge-score,sqlitedict,word2number"


def install(name: str) -> Path:
    """The interpreter of an environment, which is made anew where it is not as it should be."""
    folder, constraints = ENVIRONMENTS / name, HERE / f"constraints-{name}.txt"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*TOOLS, *(package for extra in EXTRAS[name] for package in extras[extra])]
    key = hashlib.sha256("\n".join([sys.version, *wanted, constraints.read_text()]).encode()).hexdigest()
    python, stamp = folder / "bin/python", folder / ".installed"
    if stamp.exists() and stamp.read_text() == key:
        return python
    print(f"installing {' and '.join(EXTRAS[name])} into {folder}, once", flush=True)
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    options = ["--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--no-binary", SOURCES]
    subprocess.run([python, "-m", "pip", "install", *options, "-c", constraints, *wanted], check=True)
    stamp.write_text(key)
    print(f"installed in {time.monotonic() - begun:.0f} s", flush=True)
    return python


def main() -> int:
    pythons = {name: install(name) for name in EXTRAS}
    codes = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder) / "run", f"model.path={MODEL}") as served,
    ):
        for name, python in pythons.items():
            print(f"{name}: {', '.join(EXTRAS[name])}", flush=True)
            command = [python, "-m", "pytest", f"--confcutdir={HERE}", "-p", "no:cacheprovider"]
            command += ["-W", "ignore", "-m", MARKS[name], "--server", served.base, *sys.argv[1:], HERE]
            codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
