"""A group of ranks on one host, whose small collectives go through memory that they share, and the
others through gloo.

It is called as torch's process groups are, so that either serves ``Collectives``. Every rank makes
the same calls in the same order. A call publishes this rank's message, whose size decides the way;
waiting for the result reads those of the peers. Sums are in the order of ranks.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions

from .shared_memory import REGION, RING, Address, Processes, Segment, create_segment, open_segment

_LOOK = 0.02  # seconds of sleep between two looks at the peers' processes
_TAGS = 1 << 31  # tags of gloo are 32-bit
# Seconds that a wait spins before it sleeps: more where spinning has sufficed, less where it has
# not. A sleep takes 20 to 50 us (2 cores of an EPYC, virtual); ranks that share a core gain nothing
# by spinning.
_LEAST_SPIN, _MOST_SPIN = 10e-6, 100e-6

_copy = ctypes.memmove


class PeerGone(RuntimeError):
    """A peer has ended, has left the group, or is late. Names it."""


class SharedGroup:
    """The ranks of ``gloo``, a segment each; this one is ``index``. ``names``: by rank, for errors.
    A wait has ``deadline`` seconds.
    """

    def __init__(
        self,
        gloo: Any,
        index: int,
        segments: Sequence[Segment],
        processes: Processes,
        names: Sequence[int],
        deadline: float,
    ) -> None:
        self._gloo, self._index, self._segments = gloo, index, segments
        self._own, self._room = segments[index], segments[index].room
        self._others = [peer for peer in range(len(segments)) if peer != index]
        self._processes, self._names, self._deadline = processes, names, deadline
        self._number = 0
        self._under_way = [False] * RING  # by slot: its message has been sent and not waited for
        self._spin = _MOST_SPIN

    # ----------------------------------------------------------------- calls of a process group

    def alltoall_base(self, output: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> Any:
        assert rows.is_contiguous() and output.is_contiguous(), "rows with gaps"
        size = len(self._segments)
        row = math.prod(rows.shape[1:]) * rows.element_size()  # also where there are no rows
        run = 0 if sent else len(rows) // size
        if run * row > REGION or not self._has_room(0):
            return self._gloo.alltoall_base(output, rows, received, sent)
        if not sent:
            sent = received = [run] * size
        number, slot = self._claim()
        large: list[Any] = []
        first = 0
        for peer, count in enumerate(sent):
            if peer == self._index:
                own = rows[first : first + count]
            elif count * row > REGION:
                large.append(self._gloo.send([rows[first : first + count]], peer, number % _TAGS))
            elif count:
                _copy(slot + peer * REGION, rows.data_ptr() + first * row, count * row)
            first += count
        self._own.publish(number)
        runs: list[tuple[int, int, int]] = []
        first = 0
        for peer, count in enumerate(received):
            if peer == self._index:
                output[first : first + count] = own
            elif count * row > REGION:
                large.append(self._gloo.recv([output[first : first + count]], peer, number % _TAGS))
            elif count:
                runs.append((peer, output.data_ptr() + first * row, count * row))
            first += count
        take = functools.partial(self._take_runs, number, runs, self._index * REGION, output)
        return _Arrival(self, number, self._others, take, large)

    def _allgather_base(self, output: Tensor, rows: Tensor) -> Any:
        length = rows.nbytes
        if not self._has_room(length):
            return self._gloo._allgather_base(output, rows)
        number = self._send(rows)
        output[self._index * len(rows) : (self._index + 1) * len(rows)] = rows
        runs = [(peer, output.data_ptr() + peer * length, length) for peer in self._others]
        return _Arrival(
            self, number, self._others, functools.partial(self._take_runs, number, runs, 0, output)
        )

    def _reduce_scatter_base(self, output: Tensor, rows: Tensor) -> Any:
        if not self._has_room(rows.nbytes):
            return self._gloo._reduce_scatter_base(output, rows)
        number = self._send(rows)
        run = len(output)
        own = rows[self._index * run : (self._index + 1) * run]
        take = functools.partial(self._add_up, number, output, own, self._index * output.nbytes)
        return _Arrival(self, number, self._others, take)

    def allreduce(self, tensors: list[Tensor]) -> Any:
        [rows] = tensors
        if not self._has_room(rows.nbytes):
            return self._gloo.allreduce(tensors)
        number = self._send(rows)
        return _Arrival(self, number, self._others, functools.partial(self._add_up, number, rows, rows, 0))

    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions) -> Any:
        """From the first rank, which waits for nobody."""
        [rows] = tensors
        assert options.rootRank == 0, f"a broadcast from {options.rootRank}"
        if not self._has_room(rows.nbytes):
            return self._gloo.broadcast(tensors, options)
        if self._index == 0:
            return _Arrival(self, self._send(rows), (), lambda: None)
        number, _ = self._claim()
        self._own.publish(number)
        take = functools.partial(self._take_runs, number, [(0, rows.data_ptr(), rows.nbytes)], 0, rows)
        return _Arrival(self, number, (0,), take)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        return self._gloo.send(tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        return self._gloo.recv(tensors, source, tag)

    def abort(self) -> None:
        """Leaves the group; peers that wait are told."""
        self._own.leave()
        self._processes.close()
        self._gloo.abort()

    # ----------------------------------------------------------------- messages

    def _has_room(self, num_bytes: int) -> bool:
        """Whether a message can go through memory: it is small, and the one before it in its slot
        has been waited for. Every rank waits in the same order, so all answer alike.
        """
        return num_bytes <= self._room and not self._under_way[(self._number + 1) % RING]

    def _send(self, rows: Tensor) -> int:
        """Publishes ``rows`` for all peers. Returns the message's number."""
        assert rows.is_contiguous(), "rows with gaps"
        number, slot = self._claim()
        _copy(slot, rows.data_ptr(), rows.nbytes)
        self._own.publish(number)
        return number

    def _claim(self) -> tuple[int, int]:
        """The next number, and the address of its slot, once all peers have read what was there."""
        self._number = number = self._number + 1
        self._under_way[number % RING] = True
        before = number - RING
        for peer in self._others:
            read = self._segments[peer].read[self._index]
            if read[number % RING] < before:
                self._wait_until_read(read, number % RING, before, peer)
        return number, self._own.slot(number)

    def _take_runs(self, number: int, runs: list[tuple[int, int, int]], offset: int, _: Tensor) -> None:
        """Copies runs (peer, address in ``_``, bytes) from ``offset`` of the peers' messages."""
        for peer, target, length in runs:
            _copy(target, self._segments[peer].slot(number) + offset, length)

    def _add_up(self, number: int, output: Tensor, own: Tensor, offset: int) -> None:
        """Sums this rank's part and those at ``offset`` of the peers' messages."""
        total: Tensor | None = None
        for peer, segment in enumerate(self._segments):
            part = own
            if peer != self._index:
                part = torch.empty_like(output)
                _copy(part.data_ptr(), segment.slot(number) + offset, part.nbytes)
            total = part if total is None else total + part
        assert total is not None
        output.copy_(total)

    def acknowledge(self, number: int) -> None:
        """The peers' messages ``number`` have been read, or are not wanted."""
        self._under_way[number % RING] = False
        for peer in self._others:
            self._own.read[peer][number % RING] = number

    # ----------------------------------------------------------------- waits

    def has_arrived(self, number: int, peers: Sequence[int]) -> bool:
        """Whether ``await_messages`` returns, or raises, at once."""
        return self._gone() >= 0 or all(self._segments[peer].published[0] >= number for peer in peers)

    def await_messages(self, number: int, peers: Sequence[int]) -> None:
        """Returns once ``peers`` have published ``number``. Raises PeerGone."""
        late = [peer for peer in peers if self._segments[peer].published[0] < number]
        if not late:
            return
        clock, start = time.perf_counter, time.perf_counter()
        while clock() < start + self._spin:
            if self._segments[late[-1]].published[0] >= number:
                late.pop()
                if not late:
                    self._spin = min(2 * self._spin, _MOST_SPIN)
                    return
        self._spin = max(self._spin / 2, _LEAST_SPIN)
        for peer in late:
            segment = self._segments[peer]
            while (seen := segment.published[0]) < number:
                gone = self._gone()
                if gone >= 0 and segment.published[0] < number:
                    raise PeerGone(f"rank {self._names[gone]} is gone")
                if clock() > start + self._deadline:
                    raise PeerGone(f"rank {self._names[peer]} has not come")
                segment.sleep(seen, _LOOK)

    def _wait_until_read(self, read: memoryview, slot: int, number: int, peer: int) -> None:
        """Waits until ``peer`` has read message ``number``. Rarely: it is RING messages behind."""
        start = time.perf_counter()
        while read[slot] < number:
            gone = self._gone()
            if gone >= 0 and read[slot] < number:
                raise PeerGone(f"rank {self._names[gone]} is gone")
            if time.perf_counter() - start > self._deadline:
                raise PeerGone(f"rank {self._names[peer]} has not read message {number}")
            time.sleep(_LEAST_SPIN)

    def _gone(self) -> int:
        """A peer that has ended or left; -1 if there is none."""
        left = (peer for peer in self._others if self._segments[peer].left[0])
        return next(iter(self._processes.ended()), next(left, -1))


class _Arrival:
    """Messages ``number`` on their way from ``peers``, and ``large`` ones that go through gloo.
    ``take`` makes the result of them.
    """

    def __init__(
        self,
        group: SharedGroup,
        number: int,
        peers: Sequence[int],
        take: Callable[[], None],
        large: Sequence[Any] = (),
    ) -> None:
        self._group, self._number, self._peers = group, number, peers
        self._take, self._large = take, large

    def is_completed(self) -> bool:
        arrived = self._group.has_arrived(self._number, self._peers)
        return arrived and all(work.is_completed() for work in self._large)

    def wait(self) -> None:
        self._group.await_messages(self._number, self._peers)
        self._take()
        self._group.acknowledge(self._number)
        for work in self._large:
            work.wait()


def meet_in_memory(gloo: Any, index: int, names: Sequence[int], deadline: float) -> SharedGroup | str:
    """The ranks of ``gloo`` with memory that they share, or the reason why they share none. Every
    rank calls it, and all or none get a group.
    """
    size, reason, met = len(names), "", None
    own: Segment | None = None
    address = Address(0, -1, 0)
    try:
        own, address = create_segment(size)
    except OSError as error:
        reason = f"rank {names[index]} has no memory to share: {error}"
    try:
        found = [Address(*line) for line in _lines_of_all(gloo, address, size)]
        if own is not None:
            try:
                met = _reach(own, index, found)
            except OSError as error:
                reason = f"rank {names[index]} does not reach the memory of all others: {error}"
        reached = _lines_of_all(gloo, (met is not None,), size)
    finally:
        if address.descriptor >= 0:
            os.close(address.descriptor)
    apart = [name for name, line in zip(names, reached, strict=True) if not line[0]]
    if met is not None and not apart:
        return SharedGroup(gloo, index, *met, names, deadline)
    if met is not None:
        met[1].close()
    return reason or f"rank {apart[0]} does not reach the memory of all others"


def _reach(own: Segment, index: int, found: Sequence[Address]) -> tuple[list[Segment], Processes]:
    """The segments and the processes of all ranks. Raises OSError."""
    others = {peer: address for peer, address in enumerate(found) if peer != index}
    segments = {peer: open_segment(address, len(found)) for peer, address in others.items()}
    processes = Processes({peer: address.pid for peer, address in others.items()})
    return [segments.get(peer, own) for peer in range(len(found))], processes


def _lines_of_all(gloo: Any, line: Sequence[int], size: int) -> list[list[int]]:
    """The numbers that every rank gives."""
    row = torch.tensor(line, dtype=torch.int64)
    rows = torch.empty(size * len(row), dtype=torch.int64)
    gloo._allgather_base(rows, row).wait()
    lines: list[list[int]] = rows.view(size, len(row)).tolist()
    return lines
