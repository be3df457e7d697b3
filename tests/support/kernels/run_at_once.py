"""Processes that say "ready" and then begin together."""

from __future__ import annotations

import subprocess


def run_at_once(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """The last line of each. One that takes longer than ``seconds`` from the common start, or that
    ends with an error, fails the test.
    """
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stdout.read()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=seconds)[0] for process in processes]
    assert not any(process.returncode for process in processes), answers
    return [answer.splitlines()[-1] for answer in answers]
