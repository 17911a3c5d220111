"""Keys and values of reference tokens, kept from one step to the next: formats and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORMATS = ("model", "int8", "int4")
PLACES = ("gpu", "ram")
Pin = Callable[[Tensor], bool]  # page-locks a CPU tensor; False where it was not


def bytes_of(format: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that one tensor (batch, heads, tokens, width of a head) takes in a store."""
    raise NotImplementedError


class KVStore:
    """Keys and values, after RoPE, of some tokens for every block of one model call."""

    def __init__(
        self,
        format: str,
        place: str,
        device: torch.device,
        pin: Pin | None = None,
        unpin: Callable[[Tensor], object] | None = None,
    ) -> None:
        raise NotImplementedError

    def put(self, block: int, key: Tensor, value: Tensor) -> None:
        """Record a block's keys and values (batch, heads, tokens, width); in place of older ones."""

    def get(self, block: int) -> tuple[Tensor, Tensor]:
        """A block's keys and values, on the device, in the dtype that was put."""
        raise NotImplementedError

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key` and `value` with the stored ones behind them, along the tokens."""
        raise NotImplementedError

    @property
    def bytes_held(self) -> dict[str, int]:
        """By place."""
        return {place: 0 for place in PLACES}

    def release(self) -> None:
        """Empty again."""
