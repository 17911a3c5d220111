"""Stub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

AUTO, CROP, WHOLE = REFERENCES = ("auto", "crop along", "keep whole")


@dataclass(frozen=True)
class Tiling:
    tile: int
    overlap: int
    window: str = "hann"
    references: tuple[str, ...] = (AUTO,)
    batch: int = 0
    active: frozenset[int] | None = None
    known: Tensor | None = None
    told: Callable[[int, int], None] | None = None


def patch(model, tiling):
    return model.clone()
