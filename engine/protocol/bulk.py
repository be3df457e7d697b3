"""Messages on the bulk socket between the controller and a rank: hellos and staged prompts."""

from __future__ import annotations

from .message import Message, Stop


class RankHello(Message, tag="hello", frozen=True):
    """A rank has loaded its weights and sized its page pool. Sent on the bulk socket, once per
    connection.
    """

    rank: int
    host: str
    pid: int
    num_pages: int
    page_size: int
    page_bytes: int
    num_layers: int
    num_expert_slots: int
    device: str
    num_experts: int = 0
    expert_bytes: int = 0


class Staged(Message, tag="staged", frozen=True):
    """The prompt ``staged`` has arrived, its grammar is compiled, and it can be admitted; with an
    ``error`` it never can.
    """

    rank: int
    staged: int
    error: str = ""


class Stage(Message, tag="stage", frozen=True):
    """A prompt sent ahead of its admission; admission consumes it. Its last ``num_emitted`` tokens
    follow ``grammar`` already.
    """

    staged: int
    tokens_i32: bytes
    grammar: str = ""
    num_emitted: int = 0


class Unstage(Message, tag="unstage", frozen=True):
    """Forget a staged prompt that will not be admitted."""

    staged: int


FromRankBulk = RankHello | Staged


ToRankBulk = Stage | Unstage | Stop
