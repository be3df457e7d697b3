"""The plan of a step, from the controller to ranks.

Messages are ``msgspec`` structs in msgpack, encoded as arrays. Vectors travel as packed
little-endian bytes, never as lists; the suffix of a field names their layout:

    _i32   int32[n]             _pairs   int32[n, 2]
    _i64   int64[n]             _f32     float32[n]
    _u8    uint8[n]             _h128    16 bytes per hash

A *row* is a running sequence in one step. Rows of a section are ordered: decoding slots ascending,
then ``extend`` in the order given. ``engine/protocol/slot_table.py`` applies a section to a rank.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from .message import Message, Sampling


class Admit(Message, frozen=True):
    """Puts a preloaded prompt into a free sequence slot.

    The prompt ``staged`` is the request's own and, after a preemption or a replay, the
    ``num_emitted`` tokens sampled before. KV of its first ``num_cached`` tokens is already in
    ``pages_i32``. ``limit`` counts prompt and output: the slot samples positions up to ``limit`` -
    1, none when the prompt has them all.
    """

    slot: int
    staged: int
    num_cached: int
    num_emitted: int
    limit: int
    pages_i32: bytes
    sampling: Sampling


class Copy(Message, frozen=True):
    """An asynchronous page copy between the pools of two data indices; both acknowledge ``id``."""

    id: int
    source: int
    source_page: int
    target: int
    target_page: int


class Transfer(Message, frozen=True):
    """Starts to bring experts to other ranks of ``stage``, beside the steps. A rank names ``id`` in
    its results once its part has landed; ``Header.commits`` follow when all have.

    ``moves_i32`` [n, 5]: MoE layer, expert, source and target among the ranks of the stage, and the
    target's slot. Expert -1 leaves a slot empty. No layer is left half done: a placement follows
    from a placement.
    """

    id: int
    stage: int
    moves_i32: bytes


class Mode(IntEnum):
    """The dispatch shape of a step: each row decodes one token, or some rows prefill."""

    DECODE = 0
    MIXED = 1


class Header(Message, frozen=True):
    """The part of a plan that all ranks of the group share.

    ``predecessor`` is the step before this one in the chain; a rank refuses a plan on a gap.
    ``capacity`` bounds the tokens that any rank dispatches. ``cohort`` is the pipeline cohort whose
    slots (slot modulo the number of cohorts) take part. ``checksum`` asks for a checksum of the
    state after the step, ``counts`` for expert loads and phases since the last such step.
    ``commits``: ids of moves that are part of the placement from this step on; a rank that has
    them already ignores them. ``vacant``: positions among the ranks that share experts at which
    nobody is in this epoch (``Mesh.positions``). ``trace``: somebody asks for the timeline of this
    step; ranks send their spans (``engine/protocol/timeline.py``). The planner never sets it.
    """

    group: int
    epoch: int
    step: int
    predecessor: int
    mode: int
    capacity: int
    microbatches: int = 1
    cohort: int = 0
    checksum: bool = False
    counts: bool = False
    moves: tuple[Transfer, ...] = ()
    commits: tuple[int, ...] = ()
    vacant: tuple[int, ...] = ()
    trace: bool = False


class Section(Message, frozen=True):
    """The part of one data index in a step, applied in the order of the fields.

    ``rebase`` first clears every slot, and every preloaded prompt below ``staged_from``: plans that
    were to admit them may never have been executed. ``extend_pairs`` are (slot, prompt tokens to
    compute now). ``bucket`` bounds the tokens of the section, padding included.
    """

    rebase: bool = False
    staged_from: int = 0
    free_i32: bytes = b""
    hold_i32: bytes = b""
    resume_i32: bytes = b""
    admit: tuple[Admit, ...] = ()
    pages_pairs: bytes = b""
    publish_i32: bytes = b""
    publish_h128: bytes = b""
    copies: tuple[Copy, ...] = ()
    extend_pairs: bytes = b""
    bucket: int = 0


class StepPlan(Message, frozen=True):
    """A header and the section of the recipient's data index: two frames on the socket."""

    header: Header
    section: Section


_header_decoder = msgspec.msgpack.Decoder(Header)
_section_decoder = msgspec.msgpack.Decoder(Section)


def decode_plan(header: bytes, section: bytes) -> StepPlan:
    """Decodes the two frames of a plan. Raises msgspec.ValidationError on anything malformed."""
    return StepPlan(_header_decoder.decode(header), _section_decoder.decode(section))
