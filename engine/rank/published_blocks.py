"""The blocks that the pages of a rank hold, for a controller that has lost its index."""

from __future__ import annotations

import numpy as np

from ..protocol.message import HASH_BYTES
from ..protocol.plan import Section


class PublishedBlocks:
    """The hash of the block in each of ``num_pages`` pages, as far as plans have published them.

    A page that a plan gives to a row is to be written again: it is forgotten before the step.
    Blocks of a plan are known after it, since the step that writes them may be abandoned.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._hashes = np.zeros((num_pages, HASH_BYTES), np.uint8)
        self._known = np.zeros(num_pages, np.bool_)

    def overwrite(self, section: Section) -> None:
        """A step with ``section`` begins."""
        for admit in section.admit:
            pages = np.frombuffer(admit.pages_i32, np.int32)
            self._known[pages[admit.num_cached // self._page_size :]] = False
        if section.pages_pairs:
            self._known[np.frombuffer(section.pages_pairs, np.int32)[1::2]] = False

    def publish(self, section: Section) -> None:
        """A step with ``section`` has been executed."""
        if section.publish_i32:
            pages = np.frombuffer(section.publish_i32, np.int32)
            self._hashes[pages] = np.frombuffer(section.publish_h128, np.uint8).reshape(-1, HASH_BYTES)
            self._known[pages] = True

    def all(self) -> tuple[bytes, bytes]:
        """All known pages (int32) and their hashes, as in ``Section.publish_i32``."""
        pages = np.flatnonzero(self._known)
        return pages.astype(np.int32).tobytes(), self._hashes[pages].tobytes()
