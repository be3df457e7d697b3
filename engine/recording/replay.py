"""``python -m lockstep.engine.recording.replay FILE``: replays a recording and prints each step.
Exit status 1 when the replay differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .recorder import Mismatch, replay


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a recording of the planner and compare every plan.")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    try:
        steps = _print_steps(arguments.file)
    except (Mismatch, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SystemExit(f"{arguments.file}: {reason}") from None
    print(f"{steps} plans replayed, all as recorded")


def _print_steps(path: Path) -> int:
    steps = 0
    for planner, plan in replay(path):
        group = planner.group
        admitted = sum(len(section.admit) for section in plan.sections.values())
        prefill = sum(len(section.extend_pairs) // 8 for section in plan.sections.values())
        header, running = plan.header, int(group.num_running().sum())
        print(
            f"epoch {header.epoch} step {header.step}: capacity {header.capacity}, admitted {admitted}, "
            f"prefilling {prefill}, running {running}, waiting {len(group.queue)}, "
            f"pages {int(group.kv.used().sum())}"
        )
        steps += 1
    return steps


if __name__ == "__main__":
    main()
