"""Sizes for which libraries have attention. No torch here: recipes are refused by them."""

LATENT = (512, 64)
"""Latent and rotated dims, of FlashInfer and FlashMLA."""

FLASHINFER_PAGES = (16, 32, 64, 128)
FLASHINFER_LATENT_PAGES = (32, 64)
"""Tokens of a page."""

FLASH_MLA_PAGE = 64
"""Tokens of a page in bf16."""
FLASH_MLA_CHOSEN_HEADS = (64, 128)
FLASH_MLA_CHOSEN_BLOCK = 64
"""Chosen positions that its kernel takes at once."""

FLASH_ATTN_4_DIMS = {9: (64, 96, 128, 192, 256), 10: (64, 96, 128)}
"""Head dims by the first digits of sm_90 and sm_100; on sm_100, 256 is more kernels."""
