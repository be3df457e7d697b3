"""The processes of a run on one host."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from .child import run_child
from .cluster import Imports, Task
from .forks import Forks
from .process import Process

CLOSE_SECONDS = 5.0


class Host:
    """Starts processes, each with ``settings`` and those of its task in its environment and its log
    in ``log_dir``. They see all GPUs that this process does.
    """

    def __init__(self, log_dir: Path, settings: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        self._settings = settings
        self._forks: Forks | None = None
        self._processes: list[Process] = []

    def start(self, task: Task) -> Process:
        """Starts a process and returns at once; the process reports when it has started."""
        process = Process(task, self._log_dir)
        self._processes = [other for other in self._processes if not other.ended.done()]
        self._processes.append(process)
        run = run_child if task.imports is None else self.prepare(task.imports).start
        settings = {**self._settings, **task.environment}
        threading.Thread(target=run, args=(task, settings, process), name=task.name, daemon=True).start()
        return process

    def prepare(self, imports: Imports) -> Forks:
        """Starts importing the tasks' modules."""
        if self._forks is None or self._forks.ended.is_set():
            self._forks = Forks(imports, self._settings, self._log_dir)
        return self._forks

    def close(self) -> None:
        """Kills all processes and waits until they are gone."""
        for process in self._processes:
            process.kill(0.0)
        for process in self._processes:
            if process.started.done():
                process.kill(CLOSE_SECONDS)
        if self._forks is not None:
            self._forks.kill()
        for process in self._processes:
            process.kill(CLOSE_SECONDS)
