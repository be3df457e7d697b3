"""A dummy role: ``python -m support.launch.dummy_role ROLE INDEX PARENT`` obeys its spec.

It has its own session and dies with its parent, as a real role does. Its specification is JSON:
``{"do": "sleep" | "exit" | "fail" | "ignore", "code": 3, "say": "text"}``.
"""

from __future__ import annotations

import json
import signal
import sys
import time

from lockstep.launch.cluster.entry import leave_with_parent


def main() -> None:
    leave_with_parent(int(sys.argv[3]))
    spec = json.loads(sys.stdin.buffer.read())
    if "say" in spec:
        print(spec["say"], flush=True)
    if spec["do"] == "exit":
        sys.exit(spec["code"])
    if spec["do"] == "fail":
        raise RuntimeError(spec["say"])
    if spec["do"] == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


if __name__ == "__main__":
    main()
