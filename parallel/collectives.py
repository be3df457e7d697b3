"""Collectives of one group of ranks: started asynchronously, awaited with a deadline, rebuilt for
every epoch.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, Store, Work

from . import transports
from .device_waits import DeviceWaits
from .recovery import REGROUP, ProcessSpent, Recovery
from .shared_group import SharedGroup, meet_in_memory

_LOG = logging.getLogger(__name__)


class CollectiveError(RuntimeError):
    """A collective did not complete: a peer is gone, or the deadline passed. Names the collective
    and the group.
    """


_OWN_FAULTS = NotImplementedError, RecursionError, torch.AcceleratorError, torch.OutOfMemoryError


def is_own_fault(error: RuntimeError) -> bool:
    """Whether an error of a call among ranks is this rank's own: of its device, memory or code.
    Libraries tell of a lost peer by other kinds of RuntimeError, gloo by the plain one.
    """
    return isinstance(error, _OWN_FAULTS)


Listener = Callable[[str, float, float], None]
"""Hears of each wait: the role of its group, and seconds of ``time.perf_counter`` at its begin and
end."""


@dataclass(frozen=True)
class Pending:
    """A collective under way; ``output`` holds its result once it has been waited for."""

    what: str
    output: Tensor
    work: Work | None
    spread: Tensor | None = None  # the output over all positions, where some are vacant


class Collectives:
    """A process group of ``size`` ranks; this rank is ``index``. A group of one needs no store and
    moves nothing.

    On CPUs they meet over gloo. Where all are on one host, small exchanges go through memory that
    they share, unless ``memory`` is false (``SharedGroup``).

    A group can meet with some of its positions *vacant*: what is sent to one comes back to the
    sender, and it contributes nothing to a sum. The first word of ``name`` is the group's role.
    ``waited``: seconds that the host spent in waits. ``listener`` hears of each. ``device_waits``,
    if set, adds up those of a device instead.
    """

    def __init__(
        self,
        name: str,
        index: int,
        size: int,
        store: Store | None,
        deadline: float,
        device: torch.device,
        memory: bool = True,
    ) -> None:
        assert store is not None or size == 1, f"{name}: {size} ranks need a store to meet"
        self.index = index
        self.size = size
        self.waited = 0.0
        self.listener: Listener | None = None
        self.device_waits: DeviceWaits | None = None
        self._name = name
        self.store = store
        self._deadline = timedelta(seconds=deadline)
        self.device = device
        self._transport = transports.transport_of(device)
        self._group: Any = None  # torch's stubs do not show what a backend can do
        self._present = list(range(size))
        self._places: Tensor | None = None
        self._memory = memory

    @property
    def recovery(self) -> Recovery:
        """The grade of the transport, if there is anybody to lose."""
        return REGROUP if self.size == 1 else self._transport.recovery

    @property
    def role(self) -> str:
        """The first word of the name."""
        return self._name.partition(" ")[0]

    @property
    def transport(self) -> str:
        """The way that messages take in this epoch; empty where there is nobody to send to."""
        if self._group is None:
            return ""
        if isinstance(self._group, SharedGroup):
            return "shared memory"
        return self._transport.name

    def build(self, epoch: int, vacant: Collection[int] = ()) -> None:
        """Meets the ranks of all positions but the ``vacant`` ones under a prefix of this epoch,
        after destroying the group of an earlier one.
        """
        self.destroy()
        self._present = [position for position in range(self.size) if position not in vacant]
        assert self.index in self._present, f"{self._name}: rank {self.index} meets others, and is vacant"
        self._places = torch.tensor(self._present, device=self.device) if self._vacancies else None
        if len(self._present) == 1:
            return
        assert self.store is not None
        prefix = f"{self._name}/{epoch}"
        try:
            met = PrefixStore(prefix, self.store)
            index = self._present.index(self.index)
            size = len(self._present)
            self._group = self._transport.meet(met, index, size, self._deadline)
            if self._transport.on_host:
                self._prove(met)
                if self._memory:
                    self._group = self._in_memory(self._group, prefix)
        except RuntimeError as error:
            if is_own_fault(error):
                raise
            who = f"rank {self.index} did not meet its {len(self._present) - 1} peers"
            raise CollectiveError(f"{prefix}: {who}: {first_line(error)}") from error

    def rehearse(self) -> None:
        """Goes on without any peer: results have the shapes that they have among all ranks."""
        self.build(-1, [position for position in range(self.size) if position != self.index])

    def _in_memory(self, gloo: Any, prefix: str) -> Any:
        """A group over memory that its ranks share, if all are on one host; else ``gloo``."""
        index = self._present.index(self.index)
        found = meet_in_memory(gloo, index, self._present, self._deadline.total_seconds())
        if isinstance(found, str):
            _LOG.info("%s: exchanges over TCP: %s", prefix, found)
            return gloo
        _LOG.info("%s: small exchanges through shared memory", prefix)
        return found

    def _prove(self, met: Store) -> None:
        """Exchanges proofs that the other end of every connection is a rank.

        Gloo takes whoever connects first. A proof is made of a secret in the store, which only
        ranks can read. NCCL itself does so with its unique id.
        """
        mine = secrets.token_hex(32)
        secret = bytes(met.compare_set("secret", "", mine))

        def proof(sender: int, receiver: int) -> list[int]:
            return list(
                hashlib.blake2b(b"%d to %d" % (sender, receiver), key=secret, digest_size=32).digest()
            )

        peers = range(self.size)
        sent = torch.tensor([proof(self.index, peer) for peer in peers], dtype=torch.uint8)
        found = self.wait(self.all_to_all(sent, None, None, "proofs of the meeting"))
        strangers = [peer for peer in self._present if found[peer].tolist() != proof(peer, self.index)]
        if strangers:
            raise CollectiveError(f"a stranger is connected in place of rank {strangers[0]}")

    def destroy(self) -> None:
        """Drops the process group, if there is one. Its collectives under way fail. Raises
        ProcessSpent where it cannot be dropped.
        """
        group, self._group = self._group, None
        if group is not None:
            self._abort(group)

    def cut(self) -> None:
        """Ends what a device waits for, from any thread. The group stays, of no more use. Raises
        ProcessSpent where nothing ends it.
        """
        group = self._group
        if group is not None and not self._transport.on_host:
            self._abort(group)

    def _abort(self, group: Any) -> None:
        try:
            group.abort()
        except RuntimeError as error:
            raise ProcessSpent(f"{self._name}: the group cannot be aborted: {first_line(error)}") from error

    def all_to_all(
        self, rows: Tensor, send: list[int] | None, receive: list[int] | None, what: str
    ) -> Pending:
        """Sends ``rows`` in ``size`` runs, run r to rank r, and receives one from each, in rank
        order.

        send and receive: rows per rank; None if all runs are equally long. They are 0 for vacant
        positions.
        """
        output = rows.new_empty((len(rows) if receive is None else sum(receive), *rows.shape[1:]))
        if self._group is None:
            return Pending(what, output.copy_(rows), None)
        if not self._vacancies:
            work = self._start(what, "alltoall_base", output, rows, receive or [], send or [])
            return Pending(what, output, work)
        if send is not None and receive is not None:
            present = self._present
            assert sum(send) == sum(send[peer] for peer in present), f"{self._name}: {what} to nobody"
            received, sent = [receive[peer] for peer in present], [send[peer] for peer in present]
            return Pending(what, output, self._start(what, "alltoall_base", output, rows, received, sent))
        sent_rows = self._of_present(rows)
        arriving = torch.empty_like(sent_rows)
        work = self._start(what, "alltoall_base", arriving, sent_rows, [], [])
        return Pending(what, arriving, work, spread=output.copy_(rows))

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        """The rows of all ranks, in rank order; every rank has equally many. Those of vacant
        positions are ``fill``.
        """
        output = rows.new_empty((len(self._present) * len(rows), *rows.shape[1:]))
        work = None
        if self._group is None:
            output.copy_(rows)
        else:
            work = self._start(what, "_allgather_base", output, rows)
        if not self._vacancies:
            return Pending(what, output, work)
        spread = rows.new_full((self.size * len(rows), *rows.shape[1:]), fill)
        return Pending(what, output, work, spread)

    def reduce_scatter(self, rows: Tensor, what: str) -> Pending:
        """Sums ``rows`` over all ranks and keeps this rank's run: 1 / size of the rows."""
        output = rows.new_empty((len(rows) // self.size, *rows.shape[1:]))
        if self._vacancies:
            rows = self._of_present(rows)
        if self._group is None:
            return Pending(what, output.copy_(rows), None)
        return Pending(what, output, self._start(what, "_reduce_scatter_base", output, rows))

    def all_reduce(self, rows: Tensor, what: str) -> Pending:
        """The sum of ``rows`` over all ranks, the same bits on each."""
        output = rows.clone(memory_format=torch.contiguous_format)
        if self._group is None:
            return Pending(what, output, None)
        return Pending(what, output, self._start(what, "allreduce", [output]))

    def broadcast(self, rows: Tensor, what: str) -> Pending:
        """The rows of rank 0, written over those of the others."""
        if self._group is None:
            return Pending(what, rows, None)
        return Pending(what, rows, self._start(what, "broadcast", [rows], BroadcastOptions()))

    def send(self, rows: Tensor, to: int, tag: int, what: str) -> Pending:
        """Sends ``rows`` to the rank ``to`` of this group, which receives them under ``tag``. They
        must not change until the result has been waited for.
        """
        return Pending(what, rows, self._start(what, "send", [rows], to, tag))

    def receive(self, rows: Tensor, source: int, tag: int, what: str) -> Pending:
        """Receives into ``rows`` what the rank ``source`` sends under ``tag``."""
        return Pending(what, rows, self._start(what, "recv", [rows], source, tag))

    def _start(self, what: str, name: str, *arguments: Any) -> Work:
        """Starts the collective ``name`` of the process group, which may find its peers gone, or
        itself aborted.
        """
        try:
            work: Work = getattr(self._group, name)(*arguments)
        except RuntimeError as error:
            self._fail(f"started {what}", error)
        return work

    def is_done(self, pending: Pending) -> bool:
        """Whether ``wait`` returns, or raises, at once. Raises CollectiveError as ``wait`` does."""
        try:
            return pending.work is None or pending.work.is_completed()
        except RuntimeError as error:
            self._fail(f"asked for {pending.what}", error)

    def wait(self, pending: Pending) -> Tensor:
        """The result of a collective. Raises CollectiveError when a peer is gone or the deadline
        has passed.
        """
        if pending.work is None:
            return self._spread(pending)
        start, waits = time.perf_counter(), self.device_waits
        if waits is not None:
            waits.begin(self.role)
        try:
            pending.work.wait()
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            of = f"after {seconds:.1f} s of {self._deadline.total_seconds():g} s"
            self._fail(f"waited for {pending.what} {of}", error)
        end = time.perf_counter()
        if waits is None:
            self.waited += end - start
        else:
            waits.end(self.role)
        if self.listener is not None:
            self.listener(self.role, start, end)
        return self._spread(pending)

    def _fail(self, did: str, error: RuntimeError) -> NoReturn:
        """Raises CollectiveError for the error of a call, or that itself if it is this rank's own
        fault.
        """
        if is_own_fault(error):
            raise error
        raise CollectiveError(f"{self._name}: rank {self.index} {did}: {first_line(error)}") from error

    @property
    def _vacancies(self) -> bool:
        return len(self._present) < self.size

    def _of_present(self, rows: Tensor) -> Tensor:
        """The runs of ``rows``, one per position, of positions that are not vacant."""
        assert self._places is not None
        runs = rows.view(self.size, len(rows) // self.size, *rows.shape[1:])
        return runs.index_select(0, self._places).flatten(0, 1)

    def _spread(self, pending: Pending) -> Tensor:
        """The output of a collective over all positions."""
        if pending.spread is None:
            return pending.output
        shape = len(pending.spread) // self.size, *pending.spread.shape[1:]
        assert self._places is not None
        runs = pending.output.view(len(self._present), *shape)
        pending.spread.view(self.size, *shape).index_copy_(0, self._places, runs)
        return pending.spread


def first_line(error: Exception) -> str:
    """The first line of its message."""
    return str(error).partition("\n")[0]
