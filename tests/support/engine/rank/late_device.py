"""A device in place of a GPU: it does what it is given in order, in a thread of its own, while the
host goes on. Tensors lie in the host's memory, and hold their values when the device has come past
what makes them.

Operations of torch are handed over one by one. Ops that read their arguments on the host are handed
over whole, by ``LateOps``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lockstep.kernels.reference.column import Reference

_SHARES = (torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default)
T = TypeVar("T")
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class LateMark:
    """A place in the work of a device."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self.at = 0.0

    def come(self) -> None:
        self.at = time.perf_counter()
        self._passed.set()

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        assert self._passed.wait(120), "the device has not come here within 120 s"

    def elapsed_time(self, end: LateMark) -> float:
        return 1e3 * (end.at - self.at)


class LateDevice(TorchDispatchMode):
    """``faults``: of work that failed. As on a GPU, nothing is right afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def give(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def mark(self) -> LateMark:
        mark = LateMark()
        self.give(mark.come)
        return mark

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")

    def within(self, call: Callable[[T], None]) -> Callable[[T], None]:
        """``call`` with what torch does in it on this device."""

        def run(argument: T) -> None:
            with self:
                call(argument)

        return run

    def later(self, results: tuple[Tensor, ...], op: Callable[..., Any], *args: Any, **named: Any) -> None:
        """Fills ``results`` with what ``op`` will return."""

        def work() -> None:
            found = op(*args, **named)
            for result, value in zip(results, found if len(results) > 1 else (found,), strict=True):
                result.copy_(value)

        self.give(work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        assert func not in _READS, f"{func}: the host reads what the device computes"
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **named)
        if func.is_view or func in _SHARES:
            return func(*args, **named)
        if func._schema.is_mutable:
            self.give(lambda: func(*args, **named))
            written = [
                number for number, each in enumerate(func._schema.arguments) if each.alias_info is not None
            ]
            return args[written[0]] if written[0] < len(args) else named["out"]
        like = tree_map_only(Tensor, _shape_of, (args, named))
        if not any(isinstance(each, Tensor) for each in _flat((args, named))):
            return func(*args, **named)  # made of nothing: the host has it
        if "device" in like[1]:
            like[1]["device"] = "meta"
        shapes = func(*like[0], **like[1])
        made = tree_map_only(Tensor, _room_for, shapes)
        results = tuple(each for each in _flat(made) if isinstance(each, Tensor))
        self.later(results, func, *args, **named)
        return made


class LateCopies:
    """Copies of a device that has one stream."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device

    def copy(self, target: Tensor, source: Tensor) -> LateMark:
        self._device.give(lambda: target.copy_(source))
        return self._device.mark()


def _flat(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _room_for(shape: Tensor) -> Tensor:
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)


class LateOps(Reference):
    """The reference's ops, on a device. Before it serves, they are what they are."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.attend = self._like(Reference.attend, lambda q, *rest: (torch.empty_like(q),))
        self.mla_attend = self._like(Reference.mla_attend, _values)
        self.experts = self._like(
            Reference.experts, lambda x, rows, *rest: (x.new_empty(len(rows), x.shape[1]),)
        )
        self.norm_rotate_and_write = self._like(Reference.norm_rotate_and_write, _queries)
        self.rotate_and_write_latent = self._like(
            Reference.rotate_and_write_latent, lambda q, *rest: (torch.empty_like(q),)
        )
        self.sample_slots = self._like(
            Reference.sample_slots, lambda x, *rest: (x.new_empty(len(x), dtype=torch.int64),)
        )
        self.edit_logits = self._like(Reference.edit_logits, None)
        self.allow_only = self._like(Reference.allow_only, None)
        self.add_time = self._like(Reference.add_time, None)

    def _like(self, op: Callable[..., Any], room: Callable[..., tuple[Tensor, ...]] | None) -> Any:
        def run(*args: Any) -> Any:
            if self._device not in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
                return op(*args)
            if room is None:
                self._device.give(lambda: op(*args))
                return None
            with torch.utils._python_dispatch._disable_current_modes():
                results = room(*args)
            self._device.later(results, op, *args)
            return results[0] if len(results) == 1 else results

        return run


def _queries(qkv: Tensor, norms: Any, angles: Any, cache: tuple[Tensor, Tensor], *rest: Any) -> tuple[Tensor]:
    num_keys = cache[0].shape[1]
    return (qkv.new_empty(len(qkv), qkv.shape[1] - 2 * num_keys, qkv.shape[2]),)


def _values(q: Tensor, q_rope: Tensor, cache: Tensor, expand: Tensor, *rest: Any) -> tuple[Tensor]:
    return (q.new_empty(*q.shape[:2], expand.shape[1] - q.shape[2]),)
