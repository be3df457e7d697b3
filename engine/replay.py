"""``python -m lockstep.engine.replay FILE``: replays a recording and prints each step."""

from __future__ import annotations

import argparse
from pathlib import Path

from .recorder import replay


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a recording of the planner and compare every plan.")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    steps = 0
    for planner, plan in replay(arguments.file):
        group = planner.group
        admitted = sum(len(section.admit) for section in plan.sections.values())
        prefill = sum(len(section.extend_pairs) // 8 for section in plan.sections.values())
        print(
            f"epoch {plan.header.epoch} step {plan.header.step}: capacity {plan.header.capacity}, admitted {admitted}, "
            f"prefilling {prefill}, running {int(group.num_running().sum())}, waiting {len(group.queue)}, "
            f"pages {int(group.kv.used().sum())}"
        )
        steps += 1
    print(f"{steps} plans replayed, all as recorded")


if __name__ == "__main__":
    main()
