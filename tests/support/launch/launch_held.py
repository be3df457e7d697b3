"""The launch command, which starts no rank again for as long as the file that HOLD names exists."""

import os
from pathlib import Path

from lockstep.launch import cli
from lockstep.launch.run import supervisor
from lockstep.launch.run.replacements import Replacements


class HeldReplacements(Replacements):
    def start_due(self) -> None:
        holds = Path(os.environ["HOLD"]).exists()
        held = {name: due for name, due in self._due.items() if holds and name.startswith("rank ")}
        for name in held:
            del self._due[name]
        super().start_due()
        self._due |= held


if __name__ == "__main__":
    supervisor.Replacements = HeldReplacements  # type: ignore[misc]
    cli.main()
