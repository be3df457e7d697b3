"""The Dockerfile, built without a daemon by buildah (vfs, chroot).

No registry of images is needed: the base is Debian's own, by debootstrap, under the name of the one
that the Dockerfile asks for. The container serves in a chroot, on the network of the host and among
its processes: a stop is the signal of the image to the entrypoint, as Docker sends it. This test
cannot show that Docker's Python image is as good a base, that the image for GPUs builds, and what
options of ``docker run`` do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from support.serving.reader import Reader

ROOT = Path(__file__).parent.parent
RELEASE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PYTHON = "3.11"  # Debian's of that release
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
SETTINGS = (Path("/etc/pip.conf"), Path("/root/.config/pip/pip.conf"))  # of pip on this machine


def missing() -> str:
    """Reason not to build here; empty if there is none."""
    if os.geteuid() != 0:
        return "needs root, to make the base and to build in a chroot"
    tools = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    return f"needs {' and '.join(tools)} (Debian's packages)" if tools else ""


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(2700)]


class Buildah:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"TMPDIR": str(folder)}

    def command(self, verb: str, *arguments: str) -> list[str]:
        store = ("--root", str(self._folder / "images"), "--runroot", str(self._folder / "run"))
        return ["buildah", "--storage-driver", "vfs", *store, verb, *arguments]

    def __call__(self, verb: str, *arguments: str, seconds: float = 600.0) -> str:
        done = subprocess.run(
            self.command(verb, *arguments),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=self._environment,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()


def find_links() -> list[Path]:
    """Folders of this machine where pip looks for wheels. Indexes have their files beside them."""
    text = "".join(path.read_text() for path in SETTINGS if path.exists())
    folders = [Path(name) for name in re.findall(r"(?:file://)?(/[\w./-]+)", text)]
    folders = [folder.parent if folder.name == "simple" else folder for folder in folders]
    return [folder for folder in folders if folder.is_dir()]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Buildah, str]]:
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    rootfs = folder / "rootfs"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(rootfs), MIRROR],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if made.returncode and re.search(
        r"[Cc]ouldn't download|Failed getting release", made.stdout + made.stderr
    ):
        pytest.skip(f"{MIRROR} cannot be reached")
    assert made.returncode == 0, (made.stdout + made.stderr)[-4000:]
    (rootfs / "usr/bin/python").symlink_to("python3")
    for mark in (rootfs / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    for path in (*SETTINGS, Path("/etc/ssl/certs/ca-certificates.crt")):
        if path.exists():
            there = rootfs / path.relative_to("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    base = buildah("from", "scratch")
    buildah("add", "--quiet", base, str(rootfs), "/")
    buildah("commit", "--quiet", base, f"docker.io/library/python:{PYTHON}-slim-{RELEASE}")
    buildah("rm", base)
    shutil.rmtree(rootfs)
    mounts = [f"--volume={name}:{name}:ro" for name in find_links()]
    options = (f"--build-arg=PYTHON={PYTHON}", "--build-arg=DEVICE=cpu", "--isolation=chroot", "--pull-never")
    buildah("bud", *options, *mounts, "--format=docker", "--tag=lockstep", str(ROOT), seconds=1800)
    container = buildah("from", "--pull-never", "lockstep")
    yield buildah, container
    shutil.rmtree(folder, ignore_errors=True)


def test_the_image_says_how_it_is_run(image: tuple[Buildah, str]) -> None:
    buildah, container = image
    shown = buildah("inspect", "--format", "{{.Docker.Config.User}} {{.Docker.Config.StopSignal}}", container)
    assert shown == "lockstep SIGTERM"
    entry = buildah("inspect", "--format", "{{.Docker.Config.Entrypoint}} {{.Docker.Config.Cmd}}", container)
    assert entry == "[launch] [--recipe demo frontend.host=0.0.0.0]"
    assert "/health" in buildah("inspect", "--format", "{{.Docker.Config.Healthcheck}}", container)


def test_a_container_runs_as_a_user_without_rights(image: tuple[Buildah, str]) -> None:
    buildah, container = image
    assert buildah("run", "--isolation=chroot", container, "--", "id", "-u") == "10001"


def entrypoint(running: subprocess.Popen[bytes]) -> psutil.Process:
    """The container's own process under those of buildah."""
    tree = psutil.Process(running.pid).children(recursive=True)
    [above] = [process for process in tree if process.cmdline()[:1] == ["buildah-chroot-exec"]]
    [found] = above.children()
    return found


def test_a_container_serves_and_a_stop_drains_it(image: tuple[Buildah, str], tmp_path: Path) -> None:
    """Runs its own entrypoint and command, on a free port."""
    buildah, container = image
    config = json.loads(buildah("inspect", container))["Docker"]["config"]
    command = buildah.command("run", "--isolation=chroot", container, "--")
    command += [*config["Entrypoint"], *config["Cmd"], "frontend.port=0"]
    out = tmp_path / "out"
    with out.open("wb") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 300
        while not (
            found := re.search(r"^ready: http://\S+:(\d+)/v1 serves (\S+)", out.read_text(), re.MULTILINE)
        ):
            assert running.poll() is None and time.monotonic() < end, out.read_text()[-4000:]
            time.sleep(0.2)
        url = f"http://127.0.0.1:{found[1]}/v1"
        asked = {
            "model": found[2],
            "messages": [{"role": "user", "content": "What is 12 + 7?"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/chat/completions", json=asked, timeout=120)
        assert "19" in answer.json()["choices"][0]["message"]["content"], answer.text
        reader = Reader(url, max_tokens=300).flowing()
        entrypoint(running).send_signal(signal.Signals[config["StopSignal"]])
        reader.join(60)
        assert (reader.error, reader.finish) == (None, "length")
        assert running.wait(60) == 0, out.read_text()[-4000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)
            running.wait(120)
