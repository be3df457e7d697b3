"""A model's files on one node: whether they can be read, and digests to compare between nodes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from ...engine.models.checkpoint import read_checkpoint
from ...engine.models.config import load_config

_SMALL = 32 << 20  # config, index and tokenizer are smaller and hashed whole
_LENGTH = 8


class ModelFiles(msgspec.Struct, frozen=True):
    """``problem``: empty if the checkpoint can be read. ``parts``: a digest per file, of the
    contents of a small one, of the header and size of a shard.
    """

    folder: str
    problem: str
    num_tensors: int
    num_bytes: int
    parts: dict[str, str]


def read_model_files(folder: Path, weights: str = "checkpoint") -> ModelFiles:
    """Reads configuration and headers, but no weights; no headers either if ``weights`` are
    random.
    """
    stored = weights == "checkpoint"
    kinds = {".json", ".model", ".jinja", ".txt"} | ({".safetensors"} if stored else set())
    problem, tensors = "", 0
    parts: dict[str, str] = {}
    num_bytes = 0
    try:
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file() and file.suffix in kinds:
                num_bytes += file.stat().st_size
                parts[file.name] = _digest(file)
        load_config(folder)
        if stored:
            tensors = len(read_checkpoint(folder))
    except OSError as error:
        problem = f"{error.filename or folder}: cannot be read: {error.strerror}"
    except ValueError as error:
        problem = str(error)
    return ModelFiles(str(folder), problem, tensors, num_bytes, parts)


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            prefix = stream.read(_LENGTH)
            digest.update(prefix)
            digest.update(stream.read(min(int.from_bytes(prefix, "little"), _SMALL)))
        elif size <= _SMALL:
            digest.update(stream.read())
    return digest.hexdigest()[:16]
