"""The picture under the tiles: cut with sides of 32 px, its mask, and the blend of edited tiles."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..core.tiling import PIXEL_STEP, Tile, TileGrid, Weights
from .disk import new_picture

LATENT = 8  # pixels of the picture along a side of a latent pixel
STRIP = 512  # rows of the picture at a time, a multiple of LATENT


def multiple(side: int) -> int:
    """The next multiple of 32 px."""
    return ceil(side / PIXEL_STEP) * PIXEL_STEP


def _cut(value: Tensor, tile: Tile) -> Tensor:
    """(1, H, W, C) -> (1, h, w, C), by its last row and column where the tile sticks out."""
    part = value[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    below, right = tile.height - part.shape[1], tile.width - part.shape[2]
    if not below and not right:
        return part
    padded = functional.pad(part.movedim(-1, 1), (0, right, 0, below), mode="replicate")
    return padded.movedim(1, -1)


class Canvas:
    """One picture (1, H, W, C), continued to multiples of 32 px, tile by tile: never copied whole.

    It is edited as RGB, whether it is gray, RGB or RGBA. With --gpu-only it comes on the GPU; what
    is done with pixels here is done in the RAM.
    """

    def __init__(self, picture: Tensor) -> None:
        self.picture = picture = picture.cpu()
        colours = picture if picture.shape[-1] > 1 else picture.expand(-1, -1, -1, 3)
        self.rgb = colours[..., :3]
        self.height, self.width = multiple(picture.shape[1]), multiple(picture.shape[2])

    @property
    def whole(self) -> Tile:
        """All of it, with what continues it."""
        return Tile(0, 0, self.height, self.width)

    def crop(self, tile: Tile) -> Tensor:
        """(1, h, w, 3)."""
        part = _cut(self.rgb, tile)
        # As it is where it is all of the picture: what the VAE makes of it depends on strides.
        return part if part.shape == self.rgb.shape else part.contiguous()


class Mask:
    """Where the picture may be edited, (1, H, W) from 0 to 1; `resized` from what was given."""

    def __init__(self, given: Tensor, canvas: Canvas) -> None:
        size = canvas.picture.shape[1:3]
        given = given.cpu().float().clamp(0, 1)
        self.resized = given.shape[1:] != size
        if self.resized:
            fitted = functional.interpolate(
                given[:, None], size=tuple(size), mode="bilinear", antialias=True
            )
            given = fitted[:, 0].clamp(0, 1)
        self.values, self._whole = given, canvas.whole

    def crop(self, tile: Tile) -> Tensor:
        """(1, h, w)."""
        return _cut(self.values[..., None], tile)[..., 0]

    def reduced(self, height: int, width: int, padded: bool) -> Tensor:
        """(1, height, width): 1 where it touches a latent of the whole picture in another size."""
        values = self.crop(self._whole) if padded else self.values
        return (functional.adaptive_max_pool2d(values, (height, width)) > 0).float()


class Region:
    """Where a picture may change, and how much of the edit each pixel takes: from 0 to 1.

    The product of the user's mask and of the share that the guide gives each place; at least one of
    the two. Made tile by tile: it is as large as the picture.
    """

    def __init__(self, mask: Mask | None, share: Callable[[Tile], Tensor] | None) -> None:
        self._parts = [part for part in (mask and mask.crop, share) if part is not None]

    def crop(self, tile: Tile) -> Tensor:
        """(1, h, w)."""
        first, *more = (part(tile) for part in self._parts)
        for factor in more:
            first = first * factor
        return first

    def latent(self, tile: Tile) -> Tensor:
        """(1, h / 8, w / 8): 1 for each latent pixel of which any pixel may change."""
        strips = []
        for top in range(tile.top, tile.top + tile.height, STRIP):
            height = min(STRIP, tile.top + tile.height - top)
            values = self.crop(Tile(top, tile.left, height, tile.width))
            strips.append((functional.max_pool2d(values, LATENT) > 0).float())
        return torch.cat(strips, 1)


class Tiles(NamedTuple):
    """The tiles of a picture and the window that blends them; `active` are edited."""

    grid: TileGrid
    window: str
    active: frozenset[int]

    def skipped(self) -> frozenset[int]:
        """Those that keep the original."""
        return frozenset(range(len(self.grid))) - self.active


class Blend:
    """The picture, into which edited tiles are blended, one at a time, and where it was edited.

    What a tile changes is added by its weight: a tile that is never added leaves the original, bit
    for bit. As TileBlender over a base, but the last tiles may stick out of the picture.
    """

    def __init__(self, canvas: Canvas, tiles: Tiles, mask: Region | None) -> None:
        channels = max(3, canvas.picture.shape[-1])
        self._canvas, self._tiles, self._mask = canvas, tiles.grid.tiles(), mask
        self._weights = Weights(tiles.grid, tiles.window)
        size = canvas.picture.shape[1:3]
        self.result = new_picture((1, *size, channels))
        self.edited = new_picture((1, *size, 1))
        self.result[..., :3].copy_(canvas.rgb)
        if channels > 3:
            self.result[..., 3:].copy_(canvas.picture[..., 3:])

    def share(self, index: int) -> Tensor:
        """How much of a tile comes into the picture, (1, h, w)."""
        share = self._weights.of(index)[None]
        return share if self._mask is None else share * self._mask.crop(self._tiles[index])

    def add(self, index: int, value: Tensor) -> None:
        """(1, h, w, 3), by the tile's place in the grid."""
        tile = self._tiles[index]
        share = self.share(index)[..., None]
        into, edited = (self._part(t, tile) for t in (self.result[..., :3], self.edited))
        height, width = into.shape[1:3]
        share, value = share[:, :height, :width], value[:, :height, :width].float()
        if len(self._tiles) == 1 and self._mask is None:
            into.copy_(value)  # a difference, added again, would round the last digit
        else:
            into += share * (value - self._part(self._canvas.rgb, tile))
        edited += share

    @staticmethod
    def _part(value: Tensor, tile: Tile) -> Tensor:
        """What of a tile lies in the picture, as a view."""
        return value[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]

    def finish(self) -> tuple[Tensor, Tensor]:
        """The picture (1, H, W, C) and where it may differ, (1, H, W)."""
        self.edited.clamp_(0, 1)
        return self.result, self.edited[..., 0]
