"""Chained hashes of token blocks: a hash names a block's tokens and all tokens before them."""

from __future__ import annotations

import hashlib

from ..protocol.message import HASH_BYTES


def hash_root(model_revision: str, kv_format: str, adapter: str = "", salt: str = "") -> bytes:
    """The start of a chain: blocks are shared only between requests with equal roots."""
    text = "\0".join((model_revision, kv_format, adapter, salt))
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def chain_hashes(root: bytes, tokens_i32: bytes, page_size: int) -> bytes:
    """``root``, then the hashes of the full blocks of ``tokens_i32`` chained from it, 16 bytes each
    (blake2b, RFC 7693).
    """
    step = 4 * page_size
    hashes = [root]
    for start in range(0, len(tokens_i32) - step + 1, step):
        block = tokens_i32[start : start + step]
        hashes.append(hashlib.blake2b(block, key=hashes[-1], digest_size=HASH_BYTES).digest())
    return b"".join(hashes)
