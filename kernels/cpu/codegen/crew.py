"""Helper threads of compiled kernels, which take parts of a loop from the thread that called one.

A loop is cut into parts, and whoever is free claims the next. A helper that sleeps, or whose core
another process holds, delays no loop: the caller takes its parts. OpenMP deals parts out before, so
that each loop waits for its last thread.

A helper without work polls for a while, offering its core to others at every look, then sleeps. A
step has tens of loops with pauses of microseconds between them, shorter than a sleep and a wake-up.

The state is one block of words, known to compiled code by the name ``SYMBOL``.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import threading
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.extending import intrinsic, register_jitable

from .atomics import add, exchange, give_way, load, now, pause, post, replace, wait

SYMBOL = "lockstep_crew"
PART = (types.intp, types.intp, types.intp)  # begin, end, address of the body's arguments

# Words of the state, by their byte. What changes often has two lines of the cache to itself.
_RUN = 0  # address of the compiled ``_share``, 0 without helpers: the word that kernels look at
_HELPERS, _QUIT = 8, 16
_BUSY = 128  # 1 while a loop is shared
_TICKET = 256  # above _BITS the number of the loop, below how many of its parts nobody has claimed
_PENDING = 384  # parts that are not done
_FUNCTION, _GIVEN, _COUNT, _PARTS, _FAILED = 512, 520, 528, 536, 544
_CALLER_SLEEPS, _CALLER_SEMAPHORE = 640, 704
_SLEEPS = 1024  # of the first helper: 1 while it sleeps
_SEMAPHORE = _SLEEPS + 64
_EACH = 128  # from helper to helper

_MOST = 255  # helpers
_BITS = 32
_PARTS_EACH = 8  # parts of a loop for each thread
_PAUSES = 16  # of the processor between two looks

# Nanoseconds.
_POLLS = 500_000  # before a helper sleeps
_TAKEN = 100_000  # away from the core after an offer of it: someone else wants it
_POLLS_CROWDED = 15_000  # instead of _POLLS for the next waits, with no offers
_CROWDED = 200  # such waits
_CALLER_POLLS = 100_000  # before the caller sleeps until the last part is done

_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context


class _Crew:
    """This process' helpers and their state."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLEEPS + _MOST * _EACH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._words = np.frombuffer(self._memory, np.int64)
        self._address = int(self._words.ctypes.data)
        self._share: Any = None  # compiled once there are helpers
        self.begin()
        binding.add_symbol(SYMBOL, self._address)
        os.register_at_fork(after_in_child=self.begin)
        atexit.register(self.resize, 0)

    def begin(self) -> None:
        """At first, and in a forked child, which has none of its parent's threads."""
        self.threads: list[threading.Thread] = []
        self._guard = threading.Lock()
        self._words[:] = 0
        self._new_semaphore(_CALLER_SEMAPHORE)

    def resize(self, helpers: int) -> None:
        with self._guard:
            if len(self.threads) != helpers:
                self._dismiss()
                if helpers:
                    self._hire(helpers)

    def _hire(self, helpers: int) -> None:
        for helper in range(helpers):
            self._new_semaphore(_SEMAPHORE + helper * _EACH)
        if self._share is None:
            self._share = cfunc(types.intp(*[types.intp] * 4), cache=True)(_share)
        life = njit(types.void(types.intp, types.intp), cache=True, nogil=True)(_help)
        self.threads = [
            threading.Thread(target=life, args=(self._address, helper), name=f"kernels {helper}", daemon=True)
            for helper in range(helpers)
        ]
        for thread in self.threads:
            thread.start()
        self._words[_HELPERS // 8] = helpers
        self._words[_RUN // 8] = self._share.address

    def _dismiss(self) -> None:
        """Ends the helpers. Each finishes its part; the rest of a loop stays to its caller."""
        self._words[_RUN // 8] = 0
        self._words[_QUIT // 8] = 1
        for helper in range(len(self.threads)):
            ctypes.CDLL(None).sem_post(ctypes.c_void_p(self._address + _SEMAPHORE + helper * _EACH))
        for thread in self.threads:
            thread.join()
        self.threads = []
        self._words[_HELPERS // 8] = self._words[_QUIT // 8] = 0

    def _new_semaphore(self, place: int) -> None:
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(self._address + place), 0, 0)


_CREW = _Crew()


def num_threads() -> int:
    """Threads that share a loop: the helpers and their caller."""
    return len(_CREW.threads) + 1


def set_num_threads(count: int) -> None:
    """Starts or ends helpers, so that ``count`` threads share a loop, 256 at most. The process has
    one crew; a fork has one of its own once it calls this.
    """
    _CREW.resize(min(count, _MOST + 1) - 1)


# ------------------------------------------------------------------------------- compiled code


@_intrinsic
def _run_part(typing_context, function, begin, end, given):
    """Calls one part. Whether it failed."""

    def generate(context, builder, signature, values):
        kind = context.call_conv.get_function_type(types.none, PART)
        function = builder.inttoptr(values[0], kind.as_pointer())
        status, _ = context.call_conv.call_function(builder, function, types.none, PART, values[1:])
        return builder.zext(status.is_error, ir.IntType(64))

    return types.intp(types.intp, *PART), generate


def _share(crew, function, given, count):
    """Calls the function at an address for parts that make up [0, count), here and in helpers.
    Returns 0, -1 if the crew has a loop already, and 1 if a part failed.
    """
    if not replace(crew + _BUSY, 0, 1):
        return -1
    helpers = load(crew + _HELPERS)
    num_parts = min(count, (helpers + 1) * _PARTS_EACH)
    exchange(crew + _FUNCTION, function)
    exchange(crew + _GIVEN, given)
    exchange(crew + _COUNT, count)
    exchange(crew + _PARTS, num_parts)
    exchange(crew + _FAILED, 0)
    exchange(crew + _PENDING, num_parts)
    loop = (load(crew + _TICKET) >> _BITS) + 1
    exchange(crew + _TICKET, loop << _BITS | num_parts)
    for helper in range(min(helpers, num_parts - 1)):
        sleeps = crew + _SLEEPS + helper * _EACH
        if load(sleeps) and exchange(sleeps, 0):
            post(crew + _SEMAPHORE + helper * _EACH)
    while _take_part(crew):
        pass
    begin = now()
    while load(crew + _PENDING):
        _rest()
        if now() - begin > _CALLER_POLLS:
            exchange(crew + _CALLER_SLEEPS, 1)
            if load(crew + _PENDING):
                wait(crew + _CALLER_SEMAPHORE)
            exchange(crew + _CALLER_SLEEPS, 0)
    failed = load(crew + _FAILED)
    exchange(crew + _BUSY, 0)
    return failed


def _help(crew, helper):
    """A helper's life."""
    crowded = 0
    while not load(crew + _QUIT):
        if _take_part(crew):
            continue
        begin = end = now()
        polls = _POLLS_CROWDED if crowded else _POLLS
        while end - begin < polls and not _has_parts(crew):
            _rest()
            before = now()
            if not crowded:
                give_way()
            end = now()
            if end - before > _TAKEN:
                crowded, end = _CROWDED, begin + polls
        if end - begin >= polls:
            crowded = max(crowded - 1, 0)
            _sleep(crew, helper)


@register_jitable
def _sleep(crew, helper):
    sleeps = crew + _SLEEPS + helper * _EACH
    exchange(sleeps, 1)
    if not _has_parts(crew) and not load(crew + _QUIT):
        wait(crew + _SEMAPHORE + helper * _EACH)
    exchange(sleeps, 0)


@register_jitable
def _rest():
    for _ in range(_PAUSES):
        pause()


@register_jitable
def _has_parts(crew):
    return load(crew + _TICKET) & ((1 << _BITS) - 1) > 0


@register_jitable
def _take_part(crew):
    """Claims and runs a part. False if none is left.

    A loop ends only when all its parts are done, so what describes it stands still from before a
    claim that succeeds until that part is counted as done.
    """
    ticket = load(crew + _TICKET)
    left = ticket & ((1 << _BITS) - 1)
    while left and not replace(crew + _TICKET, ticket, ticket - 1):
        ticket = load(crew + _TICKET)
        left = ticket & ((1 << _BITS) - 1)
    if not left:
        return False
    count, num_parts = load(crew + _COUNT), load(crew + _PARTS)
    part = num_parts - left
    begin, end = count * part // num_parts, count * (part + 1) // num_parts
    if _run_part(load(crew + _FUNCTION), begin, end, load(crew + _GIVEN)):
        exchange(crew + _FAILED, 1)
    if add(crew + _PENDING, -1) == 1 and load(crew + _CALLER_SLEEPS) and exchange(crew + _CALLER_SLEEPS, 0):
        post(crew + _CALLER_SEMAPHORE)
    return True
