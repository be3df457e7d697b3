"""Messages of the store where ranks meet for an epoch: one question of a rank, one answer.

Keys and values are those of ``torch.distributed``: addresses of communicators, small and few.
"""

from __future__ import annotations

from .message import Message


class PutValue(Message, tag="put", frozen=True):
    """Sets a key."""

    number: int
    key: str
    value: bytes


class FetchValues(Message, tag="fetch", frozen=True):
    """Asks for the values of ``keys``. The answer comes once all are there, or after ``patience``
    seconds with None for those that are not.
    """

    number: int
    keys: tuple[str, ...]
    patience: float = 0.0


class AddValue(Message, tag="add", frozen=True):
    """Adds to a number, 0 at first; the answer holds the sum in decimal digits."""

    number: int
    key: str
    amount: int


class SwapValue(Message, tag="swap", frozen=True):
    """Sets a key to ``desired`` if it holds ``expected``, or is absent and ``expected`` is empty.

    The answer is the value afterwards, ``expected`` for a key that stays absent.
    """

    number: int
    key: str
    expected: bytes
    desired: bytes


class DropValue(Message, tag="drop", frozen=True):
    """Deletes a key; the answer is the value it had, if any."""

    number: int
    key: str


class Answer(Message, tag="answer", frozen=True):
    """Answers question ``number``; one value per key asked for."""

    number: int
    values: tuple[bytes | None, ...] = ()


ToMeeting = PutValue | FetchValues | AddValue | SwapValue | DropValue
