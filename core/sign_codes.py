"""The vocabulary of a text encoder whose file has none: fixed signs for every token.

A tiny encoder can learn from any distinct vectors, and 152064 of them would be most of its file.
"""

from __future__ import annotations

import numpy as np
import torch

VOCABULARY = 152064  # rows of Qwen2.5-VL's table


def sign_codes(width: int) -> torch.Tensor:
    """(VOCABULARY, width) of +-1 from integer arithmetic alone, so alike on every machine."""
    words = (width + 63) // 64
    x = np.arange(1, VOCABULARY * words + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)  # splitmix64, modulo 2**64 (Steele et al. 2014)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    octets = x.astype("<u8").view(np.uint8).reshape(VOCABULARY, words * 8)
    bits = np.unpackbits(octets, axis=1, count=width)
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1)
