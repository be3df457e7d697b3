"""Records the calls of a planner and its plans, so that an incident replays offline, step by step.

A recording is a sequence of msgpack records: first a ``Heading`` with the planner's settings, then
one array per call, (name, arguments). A plan is recorded as the digest of its bytes, which
``replay`` compares. The planner reads no clock, so nothing else is needed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import structs

from ... import __version__
from ..planner.group_plan import GroupPlan
from ..planner.planner import Planner
from ..planner.settings import Settings
from ..protocol.bulk import Preloaded
from ..protocol.frontends import Abort, Submit
from ..protocol.message import Sampling
from ..protocol.plan import Admit, Header, Section, Transfer
from ..protocol.results import Refused, StepResult

_BUFFER = 1 << 20  # bytes
_encode = msgspec.msgpack.Encoder().encode
_ADMIT = Section.__struct_fields__.index("admit")
# The first recordings end Sampling with this field.
_EARLIER_FIELDS = Sampling.__struct_fields__.index("num_prompt_logprobs") + 1
_LATER_DEFAULTS = structs.astuple(Sampling())[_EARLIER_FIELDS:]


class Heading(msgspec.Struct, frozen=True):
    """The first record: the version that made the recording, the planner's encoded Settings, and
    their digest. A digest that differs when they are encoded again shows that another version reads
    them differently.
    """

    version: str
    digest: bytes
    settings: msgspec.Raw


class Mismatch(AssertionError):
    """A replay differs from its recording: the planner has changed, or is not pure, or the file is
    no recording.
    """


def digest(plan: GroupPlan | None) -> bytes:
    """A digest of a plan's content; empty for no plan."""
    if plan is None:
        return b""
    state = hashlib.blake2b(_earlier_header(plan.header), digest_size=16)
    for data, section in plan.sections.items():
        state.update(b"%d" % data + (_earlier_form(section) if section.admit else _encode(section)))
    return state.digest()


def _earlier_header(header: Header) -> bytes:
    """The bytes of a header without ``trace``, which is never the planner's, and without ``vacant``
    while nothing is: both came later.
    """
    *fields, vacant, _ = structs.astuple(header)
    return msgspec.msgpack.encode([*fields, vacant] if vacant else fields)


def _earlier_form(section: Section) -> bytes:
    """The bytes of a section. Sampling fields that came later are left out while they have their
    defaults, so that recordings of earlier versions replay.
    """
    fields = list(structs.astuple(section))
    fields[_ADMIT] = [_earlier_admit(admit) for admit in section.admit]
    return msgspec.msgpack.encode(fields)


def _earlier_admit(admit: Admit) -> list[object]:
    sampling = structs.astuple(admit.sampling)
    if sampling[_EARLIER_FIELDS:] == _LATER_DEFAULTS:
        sampling = sampling[:_EARLIER_FIELDS]
    return [*structs.astuple(admit)[:-1], sampling]


class Recorder:
    """Writes a recording; the owner calls it beside the planner, and ``flush`` off the critical
    path. A new file is this user's only: it holds prompts.

    Serving does not depend on it: when writing fails, ``failure`` says why, and the recording ends
    there.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._file: IO[bytes] = _private(path)
        self._pending = bytearray()
        self.failure = ""
        encoded = msgspec.msgpack.encode(settings)
        self._write(msgspec.msgpack.encode(Heading(__version__, _digest(encoded), msgspec.Raw(encoded))))

    def event(self, name: str, *arguments: object) -> None:
        """Records one call of the planner, by the name of its method."""
        self._write(msgspec.msgpack.encode((name, arguments)))

    def plan(self, plan: GroupPlan | None) -> None:
        self._write(msgspec.msgpack.encode(("plan", (digest(plan),))))

    def flush(self) -> None:
        rest = memoryview(bytes(self._pending))
        self._pending.clear()
        try:
            while rest and not self.failure:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.failure = str(error)

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _write(self, record: bytes) -> None:
        self._pending += len(record).to_bytes(4, "little") + record
        if len(self._pending) > _BUFFER:
            self.flush()


def _private(path: Path) -> IO[bytes]:
    """Opens a file to write that its owner alone can read: a recording holds prompts. Something
    other than a file, such as a pipe, keeps its permissions.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "wb", buffering=0)


def replay(path: Path) -> Iterator[tuple[Planner, GroupPlan]]:
    """Replays a recording and yields (planner, plan) after every plan. Raises Mismatch when a plan
    differs or a record is not understood, with the step and known differences between planners.

    A recording that was cut off within a record ends there.
    """
    records = _records(path)
    try:
        heading = msgspec.msgpack.decode(next(records, b""), type=Heading)
    except msgspec.MsgspecError as error:
        raise Mismatch(
            f"its first record does not say who made it: no recording, or an older one ({error})"
        ) from None
    try:
        settings = msgspec.msgpack.decode(heading.settings, type=Settings)
    except msgspec.MsgspecError as error:
        raise Mismatch(
            f"the planner's settings are not understood: {error}{_difference(heading, None)}"
        ) from None
    planner = Planner(settings)
    for record in records:
        step = planner.group.steps.next_step
        try:
            plan = _repeat(planner, record)
        except (Mismatch, msgspec.MsgspecError) as error:
            raise Mismatch(f"step {step}: {error}{_difference(heading, settings)}") from error
        if plan is not None:
            yield planner, plan


def _digest(settings: bytes) -> bytes:
    return hashlib.blake2b(settings, digest_size=16).digest()


def _difference(heading: Heading, settings: Settings | None) -> str:
    """Known differences between the recorded planner and this one, as the end of a sentence."""
    found = []
    if heading.version != __version__:
        found.append(f"; it was recorded by version {heading.version}, this is {__version__}")
    if settings is not None and heading.digest != _digest(msgspec.msgpack.encode(settings)):
        found.append("; the planner's settings are not read as they were recorded")
    return "".join(found)


def _records(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(head := file.read(4)) == 4:
            record = file.read(int.from_bytes(head, "little"))
            if len(record) < int.from_bytes(head, "little"):
                return
            yield record


def _repeat(planner: Planner, record: bytes) -> GroupPlan | None:
    """Repeats a recorded call. Returns the plan if the call asked for one."""
    name, arguments = msgspec.msgpack.decode(record)
    if name != "plan":
        _apply(planner, name, arguments)
        return None
    plan = planner.plan()
    if digest(plan) != arguments[0]:
        raise Mismatch("the plan differs from the recorded one")
    return plan


def _apply(planner: Planner, name: str, arguments: Sequence[Any]) -> None:
    match name:
        case "shrink":
            planner.shrink(*arguments)
        case "adopt":
            planner.adopt(*arguments)
        case "place_experts":
            planner.place_experts(*arguments)
        case "move_experts":
            planner.move_experts(msgspec.convert(arguments[0], list[Transfer]))
        case "submit":
            planner.submit(arguments[0], msgspec.convert(arguments[1], Submit))
        case "abort":
            planner.abort(arguments[0], msgspec.convert(arguments[1], Abort))
        case "abort_frontend":
            planner.abort_frontend(arguments[0])
        case "staged":
            planner.staged(msgspec.convert(arguments[0], Preloaded))
        case "results":
            planner.results([msgspec.convert(result, StepResult) for result in arguments[0]])
        case "refused":
            planner.refused(msgspec.convert(arguments[0], Refused))
        case "begin_epoch":
            planner.begin_epoch(absent=arguments[0], emptied=arguments[1])
        case "fail_all":
            planner.fail_all()
        case "tidy":
            planner.tidy()
            planner.take_staging()
            planner.take_output()
            planner.take_changes()
        case _:
            raise Mismatch(f"the recording names the unknown call {name!r}")
