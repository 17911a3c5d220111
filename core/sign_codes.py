"""The vocabulary of a text encoder whose file has none: fixed signs for every token.

A tiny encoder can learn from any distinct vectors, and 152064 of them would be most of its file.
"""

from __future__ import annotations

import torch

from .checkpoint import VOCABULARY

# splitmix64's (Steele et al. 2014) constants less 2**64: int64 wraps to the same bits as uint64.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def sign_codes(width: int) -> torch.Tensor:
    """(VOCABULARY, width) of +-1 from integer arithmetic alone, so alike on every machine."""
    words = (width + 63) // 64
    x = torch.arange(1, VOCABULARY * words + 1, dtype=torch.int64, device="cpu")
    x *= _STEP
    x ^= _shifted(x, 30)
    x *= _FIRST
    x ^= _shifted(x, 27)
    x *= _SECOND
    x ^= _shifted(x, 31)
    x = x.reshape(VOCABULARY, words)
    # A word's bytes from low to high, their bits from high to low.
    order = torch.arange(64, device="cpu") ^ 7
    codes = torch.empty(VOCABULARY, width, dtype=torch.float32, device="cpu")
    for i, columns in enumerate(codes.split(64, dim=1)):
        columns.copy_((x[:, i : i + 1] >> order[: columns.shape[1]]) & 1)
    return codes.mul_(2).sub_(1)


def _shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """The bits moved right, zeros in their place (>> alone would repeat the sign)."""
    return (x >> count) & ((1 << (64 - count)) - 1)
