"""The page pool of one rank: its size, its cache tensors, and the block in each page."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.formats.kv_format import KvFormat, entry_bytes
from ..kv.budget import PoolLimits
from ..models.config import ModelConfig
from .published_blocks import PublishedBlocks

_DTYPES: dict[KvFormat, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
_CGROUP = Path("/sys/fs/cgroup")

# By layer: the shape of a token's entry in each cache tensor.
Entries = Sequence[tuple[tuple[int, ...], ...]]


class KVPool:
    """``num_pages`` pages of ``page_size`` tokens, and one more, ``scratch``, for rows whose KV is
    never read.

    ``cache`` holds for each layer a tuple of zeroed tensors [(num_pages + 1) * page_size, *shape],
    one for each shape of ``entries``.
    """

    def __init__(
        self, entries: Entries, num_pages: int, page_size: int, kv_format: KvFormat, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.page_bytes = bytes_per_page(entries, page_size, kv_format)
        self.scratch = num_pages
        positions = (num_pages + 1) * page_size
        dtype = _DTYPES[kv_format]
        self.cache = [
            tuple(_zeros((positions, *shape), dtype, device) for shape in shapes) for shapes in entries
        ]
        self.blocks = PublishedBlocks(num_pages, page_size)


def entries_of(config: ModelConfig, layers: range, parts: int, kv_format: KvFormat) -> Entries:
    """Cache entries of ``layers`` on one of ``parts`` ranks that split the heads."""
    held = replace(config, attention=config.attention.split(parts))
    return [held.kv_shapes(kv_format, layer) for layer in layers]


def bytes_per_page(entries: Entries, page_size: int, kv_format: KvFormat) -> int:
    return page_size * sum(entry_bytes(kv_format, shape) for shapes in entries for shape in shapes)


def fit_pages(
    page_bytes: int, page_size: int, limits: PoolLimits, ranks_per_host: int, device: torch.device
) -> int:
    """The number of pages in the pool. Raises ValueError when the memory does not hold one."""
    on_gpu = device.type == "cuda"
    free = free_bytes(device) if limits.memory is None or on_gpu else 0
    if on_gpu and limits.memory is not None and limits.memory > free - limits.claimed:
        left = f"weights leave {free} bytes, of which steps take {limits.claimed}"
        raise ValueError(
            f"kv_cache.memory = {limits.memory}: {left}; use at most {max(0, free - limits.claimed)}, or auto"
        )
    num_bytes = limits.num_bytes(free, ranks_per_host, device.type)
    pages = limits.num_pages(num_bytes, page_bytes, page_size)
    if pages < 1:
        auto = f" = auto: of {free} free bytes" if limits.memory is None else ""
        page = f"page of {page_bytes} bytes ({page_size} tokens)"
        raise ValueError(f"kv_cache.memory{auto}: {num_bytes} bytes hold no {page}")
    return pages


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes; on a CPU, within the limits of kernel, control group and
    process (ulimit -d).
    """
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()) != "max":
        free = min(free, int(bound) - int(used.read_text()))
    most, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        free = min(free, most - int(status["VmData"].split()[0]) * 1024)
    return max(free, 0)


@contextmanager
def room_for_weights(device: torch.device) -> Iterator[None]:
    """Raises ValueError where the model's weights, made meanwhile, find no room."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # A full GPU has a class of its own. A CPU's allocator has none.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        left = f"no room for all weights, {free_bytes(device)} bytes are left on {device}"
        more = "use more ranks (parallel.tensor, parallel.pipeline, cluster.ranks_per_node)"
        raise ValueError(f"model.path: {left}; {more} or a device with more memory") from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the kernel provides each part at its first write, so a large pool costs
    nothing before.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
