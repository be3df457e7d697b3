"""Messages on the bulk socket between the controller and a rank: hellos, preloaded prompts, ends of
epochs.
"""

from __future__ import annotations

from .message import Message, Stop
from .timeline import StepSpans


class RankHello(Message, tag="hello", frozen=True):
    """A rank has loaded its weights and sized its page pool. Sent once per connection: said
    again, it means that messages may be lost. A process draws ``life`` once. ``epoch`` is the last
    one that the rank has entered, -1 before its first; it has left it. ``recovery``: the
    rank's grade (``parallel/recovery.py``). ``placement_version`` is the id of the last moves that
    the rank has committed, 0 before any; then ``placement_i32`` is what they led to, as in
    ``ControllerSpec``. ``expert_form``: ranks of one form can exchange experts.
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
    life: int = 0
    epoch: int = -1
    recovery: str = ""
    placement_version: int = 0
    placement_i32: bytes = b""
    expert_form: str = ""


class Published(Message, tag="published", frozen=True):
    """The pages of a rank that hold whole blocks, and the hashes of these, as in
    ``Section.publish_i32``. Sent just before a hello, for a controller that has no index yet.
    """

    rank: int
    pages_i32: bytes
    hashes_h128: bytes


class Preloaded(Message, tag="staged", frozen=True):
    """The prompt ``staged`` has arrived and its grammar is compiled: it can be admitted. With an
    ``error`` it never can.
    """

    rank: int
    staged: int
    error: str = ""


class StepProgress(Message, tag="progress", frozen=True):
    """A rank is in a step that takes long, and has entered ``phases`` since it started. The number
    moves while the rank does.
    """

    rank: int
    epoch: int
    step: int
    phases: int


class Preload(Message, tag="stage", frozen=True):
    """A prompt sent before its admission, which consumes it. ``staged`` identifies it; its last
    ``num_emitted`` tokens already follow ``grammar``.
    """

    staged: int
    tokens_i32: bytes
    grammar: str = ""
    num_emitted: int = 0


class Unload(Message, tag="unstage", frozen=True):
    """Drops a preloaded prompt that will not be admitted."""

    staged: int


class SetPlacement(Message, tag="place", frozen=True):
    """The placement as it is after the moves ``version``. A rank that has another one loads what it
    lacks from the checkpoint, and says hello again.
    """

    version: int
    placement_i32: bytes


class Disband(Message, tag="disband", frozen=True):
    """``epoch`` is over. A rank that is still in it leaves its communicator, so that peers that
    wait there for this rank give up at once.
    """

    epoch: int


FromRankBulk = RankHello | Published | Preloaded | StepProgress | StepSpans
ToRankBulk = Preload | Unload | SetPlacement | Disband | Stop
