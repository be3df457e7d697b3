"""The blocks that a rank remembers."""

from __future__ import annotations

import numpy as np

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Section
from lockstep.engine.rank.published_blocks import PublishedBlocks


def i32(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def test_published_pages_are_remembered() -> None:
    blocks = PublishedBlocks(9, 8)
    blocks.publish(Section(publish_i32=i32(7, 2), publish_h128=b"a" * 16 + b"b" * 16))
    blocks.publish(Section(publish_i32=i32(7), publish_h128=b"c" * 16))
    blocks.publish(Section())
    assert blocks.all() == (i32(2, 7), b"b" * 16 + b"c" * 16)


def test_pages_that_are_given_to_rows_are_forgotten_but_not_those_that_rows_share() -> None:
    blocks = PublishedBlocks(9, 8)
    blocks.publish(Section(publish_i32=i32(0, 1, 2, 3, 4), publish_h128=bytes(16 * 5)))
    admit = Admit(0, 0, num_cached=16, num_emitted=0, limit=99, pages_i32=i32(3, 1, 4), sampling=Sampling())
    blocks.overwrite(Section(admit=(admit,), pages_pairs=i32(1, 0)))  # slot 1 gets page 0
    assert blocks.all()[0] == i32(1, 2, 3)
