"""Sizes as people read them."""

from __future__ import annotations


def size_text(size_bytes: int) -> str:
    """MB below one GB, else GB: decimal, as shops count, so that a file and its weights agree."""
    if abs(size_bytes) >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB"
