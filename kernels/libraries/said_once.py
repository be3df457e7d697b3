"""Tells the log once for each reason that a step is our own kernel's in place of a library's."""

from __future__ import annotations

import logging

_LOG = logging.getLogger(__name__)


class SaidOnce:
    """``setting``: the recipe's, such as ``kernels.attention = flashinfer``."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._said: set[str] = set()

    def __call__(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _LOG.warning("%s: our own kernel for %s", self._setting, reason)
