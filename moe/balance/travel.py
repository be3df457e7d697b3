"""Bytes of the experts that travel between ranks beside the steps. Plans of memory use it too."""

from __future__ import annotations

MOST_STAGED = 4
"""Moves, each of whole layers, that a rank holds beside its slots: landed or on their way."""

_BYTES_AT_ONCE = 16 << 20
"""Bytes that a rank sends or receives in moves that travel together, unless one layer's have
more.
"""

_COPIES_SENT = 1
"""Experts are read out of their slots into one message."""


def experts_at_once(expert_bytes: int) -> int:
    """Experts of several layers that a rank sends or receives together; at least one."""
    return max(1, _BYTES_AT_ONCE // expert_bytes)


def staged_bytes(expert_bytes: int, num_slots: int, num_layers: int) -> int:
    """Most bytes that moves take beside the slots of a rank, ``num_slots`` in each of its MoE
    layers. It receives at most all experts of one layer at a time, and is assumed to send as many.
    """
    every = num_slots * num_layers
    together = min(max(experts_at_once(expert_bytes), num_slots), every)
    return (min(MOST_STAGED * together, every) + _COPIES_SENT * together) * expert_bytes
