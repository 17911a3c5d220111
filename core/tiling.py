"""Overlapping tiles of a picture, and the window that blends them: plain ints and one function.

MultiDiffusion (arXiv 2302.08113) averages what overlapping tiles predict at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 4  # latent pixels: 32 px, the multiple that sizes of Qwen-Image should be
PATCH = 2  # latent pixels of one token: where a tile may begin


class Tile(NamedTuple):
    """A rectangle of the picture, in latent pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one size that cover a picture of `height` x `width` latent pixels.

    Neighbours share at least `overlap` pixels. A tile that would reach over the edge is shifted
    inwards, so that every tile has the full size; along a side that is no longer than a tile
    there is one, as long as that side.
    """

    height: int
    width: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"There is no picture of {self.width} x {self.height}.")
        if self.tile < STEP or self.tile % STEP:
            raise ValueError(f"The side of a tile must be a multiple of {STEP}, not {self.tile}.")
        if not 0 <= self.overlap <= self.tile - PATCH:
            raise ValueError(
                f"The overlap must lie between 0 and {self.tile - PATCH}, not {self.overlap}."
            )

    @classmethod
    def along(cls, height: int, width: int, count: int, overlap: int) -> TileGrid:
        """Square tiles, as small as they can be with at most `count` along the longer side.

        The overlap is made smaller where tiles of that number would be hardly more than it.
        """
        if count < 1:
            raise ValueError(f"A picture cannot be cut into {count} tiles: ask for at least 1.")
        longer = max(height, width)
        shared = max(0, min(overlap, longer // (2 * count))) // PATCH * PATCH
        side = (longer + shared * (count - 1)) / count
        tile = max(STEP, ceil(side / STEP) * STEP)
        return cls(height, width, tile, min(shared, tile - PATCH))

    def tiles(self) -> tuple[Tile, ...]:
        """Row by row, from the top left."""
        height, width = min(self.tile, self.height), min(self.tile, self.width)
        return tuple(
            Tile(top, left, height, width)
            for top in self._starts(self.height)
            for left in self._starts(self.width)
        )

    def _starts(self, side: int) -> tuple[int, ...]:
        """Where tiles begin along one side: at whole tokens, but for the last of an odd side."""
        last = side - self.tile
        if last <= 0:
            return (0,)
        step = (self.tile - self.overlap) // PATCH * PATCH
        return (*range(0, last, step), last)


def hann(side: int) -> Tensor:
    """sin^2 at the middle of each of `side` samples: above 0 everywhere, the same from both ends.

    A window that starts at 0 would leave the edge of the picture without any weight.
    """
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.sin(torch.pi * middles).square().float()


def window(tile: Tile) -> Tensor:
    """How much each pixel of a tile counts, (height, width), float32."""
    return hann(tile.height)[:, None] * hann(tile.width)[None, :]
