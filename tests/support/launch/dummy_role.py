"""A dummy role: ``python -m support.launch.dummy_role ROLE INDEX PARENT`` obeys its spec.

It has its own session and dies with its parent, as a real role does. Its specification is JSON:
``{"do": "sleep" | "exit" | "fail" | "ignore", "code": 3, "say": "text"}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable

from lockstep.launch.cluster.entry import leave_with_parent


def main() -> None:
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer.read)


def run(role: str, index: int, parent: int, read_spec: Callable[[], bytes]) -> None:
    leave_with_parent(parent)
    spec = json.loads(read_spec())
    if "say" in spec:
        print(spec["say"], os.environ.get("OWN", ""), flush=True)
    if spec["do"] == "exit":
        sys.exit(spec["code"])
    if spec["do"] == "fail":
        raise RuntimeError(spec["say"])
    if spec["do"] == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


if __name__ == "__main__":
    main()
