"""The controller process."""

from __future__ import annotations

import signal

from ..protocol.specs import ControllerSpec
from .controller import Controller


def main(spec: ControllerSpec) -> None:
    """Runs a controller in this process until ``Stop`` from the launcher, or SIGTERM."""
    controller = Controller(spec)
    signal.signal(signal.SIGTERM, lambda *_: controller.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    controller.run()
