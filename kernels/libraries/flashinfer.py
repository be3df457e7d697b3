"""Attention of decode rows by FlashInfer (package ``flashinfer-python``), over pages in bf16:
grouped queries by its XQA kernels (sm_90, sm_120) and those of TensorRT-LLM (sm_100), latents by
the latter.

Only entry points that plan nothing on the host are used: lengths and page tables are read on the
device, so a captured step repeats the call. FlashInfer's wrappers with ``plan`` need the lengths on
the host, which a captured step does not have. Kernels are compiled or loaded when a shape is first
met, before a process serves. Pages in FP8 have one scale for each token and head, or for 128 values
of a latent; FlashInfer multiplies all keys by one number (bmm1_scale), and by scales of blocks in
NVFP4 alone (kv_cache_sf); its kernels of our latents (656 bytes a token) are for sm_120 and chosen
positions. Bits depend on the width of the page table (flashinfer issue 4647).
Written for 0.7.4. Not run on a card yet.

R decode rows  H query heads  K key heads  D head dim  C latent dim  E rotated dims  Z = C + E
"""

from __future__ import annotations

from typing import Any

import torch

from ..reference.attention import AttentionRule
from ..reference.paged import PagedBatch
from ..triton.attend_inputs import AttendRows, Keys, Queries, whole_entries
from .library_rows import LibraryRows
from .sizes import FLASHINFER_LATENT_PAGES, FLASHINFER_PAGES, LATENT

_WORKSPACE_BYTES = 128 << 20  # as FlashInfer's documentation recommends
_UNROTATED = 128  # dims of a DeepSeek head, before its queries became latents


class FlashInfer(LibraryRows):
    """``library``: the module ``flashinfer``. ``arch``: of the card, 90 for an H100. ``own``: the
    attention for what the library does not have; the log says so once for each reason.
    """

    def __init__(self, library: Any, arch: int, device: torch.device, own: AttendRows) -> None:
        super().__init__("kernels.attention = flashinfer", own)
        self._library, self._arch = library, arch
        # Zeros at first: kernels count in it, and leave zeros behind.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def supports(self, queries: Queries, keys: Keys, page_size: int, arch: int) -> str:
        """The reason why the library does not attend so; empty: it does."""
        dim, dtype = queries.q0_THC.shape[2], queries.q0_THC.dtype
        generated = arch in (100, 103)  # kernels of TensorRT-LLM, in place of XQA
        if not generated and arch not in (90, 120, 121):
            return f"sm_{arch}: only sm_90, sm_100 and sm_120"
        if keys.k0.group:
            return "pages in fp8: it takes one scale for all of them, and here each entry has its own"
        if keys.k0.values.dtype != torch.bfloat16 or dtype != torch.bfloat16:
            return "pages or queries that are not bfloat16"
        if keys.k1_PKE is not None:
            heads, dims = queries.q0_THC.shape[1], (dim, keys.k1_PKE.shape[2])
            return self._supports_latents(heads, dims, page_size, generated)
        if page_size not in FLASHINFER_PAGES:
            return f"pages of {page_size} tokens: only {', '.join(map(str, FLASHINFER_PAGES))}"
        if dim not in (64, 128, 256):
            return f"heads of {dim} dims: only 64, 128 and 256"
        return ""

    def _supports_latents(self, heads: int, dims: tuple[int, int], page_size: int, generated: bool) -> str:
        if not generated:
            return "latents in bfloat16: only on sm_100"
        if dims != LATENT:
            return f"latents of {dims[0]} + {dims[1]} dims: only {LATENT[0]} + {LATENT[1]}"
        if 64 < heads < 128:
            return f"latents for {heads} heads: only up to 64, and 128"
        if page_size not in FLASHINFER_LATENT_PAGES:
            return f"latents in pages of {page_size} tokens: only 32 and 64"
        return ""

    def _reason(self, queries: Queries, keys: Keys, batch: PagedBatch) -> str:
        return self.supports(queries, keys, batch.page_size, self._arch)

    def _attend(
        self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float, rule: AttentionRule
    ) -> None:
        if batch.num_decode and keys.k1_PKE is None:
            self._attend_heads(queries, keys, batch, scale, rule)
        elif batch.num_decode:
            self._attend_latents(queries, keys, batch, scale)

    def _attend_heads(
        self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float, rule: AttentionRule
    ) -> None:
        rows = batch.num_decode
        pages = (-1, batch.page_size, *keys.k0.values.shape[1:])
        self._library.decode.trtllm_batch_decode_with_kv_cache(
            queries.q0_THC[:rows].contiguous(),
            (keys.k0.values.view(pages), keys.v.values.view(pages)),
            bmm1_scale=scale,
            bmm2_scale=1.0,
            window_left=rule.window - 1,  # the query's own position is not counted; -1: no window
            out=queries.out_THC[:rows],
            sinks=rule.sinks_H,
            kv_layout="NHD",
            **self._rows_of(batch),
        )

    def _attend_latents(self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float) -> None:
        rows, q1_THE = batch.num_decode, queries.q1_THE
        assert q1_THE is not None
        q_RHZ = torch.cat([queries.q0_THC[:rows], q1_THE[:rows]], -1)
        entries_PZ = whole_entries(keys)
        out_R1HC = self._library.mla.trtllm_batch_decode_with_kv_cache_mla(
            q_RHZ[:, None],
            entries_PZ.view(-1, batch.page_size, entries_PZ.shape[1]),
            qk_nope_head_dim=_UNROTATED,
            kv_lora_rank=LATENT[0],
            qk_rope_head_dim=LATENT[1],
            bmm1_scale=scale,
            bmm2_scale=1.0,
            backend="trtllm-gen",
            **self._rows_of(batch),
        )
        queries.out_THC[:rows].copy_(out_R1HC[:, 0])

    def _rows_of(self, batch: PagedBatch) -> dict[str, Any]:
        """The pages and lengths of the decode rows. A row of length 0 (padding) reads one key: for
        none the library writes NaN (flashinfer issue 2883).
        """
        pages_RP = batch.pages_RP[: batch.num_decode]
        return {
            "workspace_buffer": self._workspace,
            "block_tables": pages_RP,
            "seq_lens": batch.lengths_R[: batch.num_decode].clamp(min=1),
            "max_seq_len": pages_RP.shape[1] * batch.page_size,
        }
