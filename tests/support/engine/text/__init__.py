"""Small tokenizers as model folders."""
