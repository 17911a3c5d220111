"""The guide: an edit of the whole picture at a megapixel, which tells tiles what to become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from ..core.changes import change_map, changed_tiles, share
from ..core.disk_backed import reduced
from ..core.tiling import Tile, TileGrid
from .pictures import Size, aligned
from .tile_canvas import Canvas, Mask, Region
from .tile_correction import Correction, correct

PIXELS = 1024 * 1024  # what the model is made for
TRUST = 6 / 255  # a place that the guide changed by so much has no original to be compared with
COARSE = 4  # pixels in one: without a guide, a tile is compared at this size
CHANGED = 24.0  # of 255: what a guide changes by so much can be told from what tiles draw anew
LEAST_CHANGED = 0.005  # of a tile


@dataclass(frozen=True)
class Frame:
    """How a guide lies on the picture: `rows` and `columns` px of it are the guide's whole sides.

    The guide is the picture scaled down to `size`, or, where the picture is no larger, the picture
    continued to multiples of 32 px (`padded`).
    """

    size: Size
    rows: int
    columns: int
    padded: bool

    @classmethod
    def of(cls, canvas: Canvas) -> Frame:
        """About a megapixel, but no more than there is."""
        if canvas.height * canvas.width <= PIXELS:
            return cls(Size(canvas.width, canvas.height), canvas.height, canvas.width, True)
        own = Size(canvas.picture.shape[2], canvas.picture.shape[1])
        size = aligned(own, math.sqrt(PIXELS / (own.width * own.height)))
        return cls(size, own.height, own.width, False)

    def scaled(self, canvas: Canvas) -> Tensor:
        """The picture in the guide's size, (1, h, w, 3)."""
        if self.padded:
            return canvas.crop(canvas.whole)
        return reduced(canvas.rgb, self.size.height, self.size.width)

    def enlarged(self, value: Tensor, tile: Tile, mode: str) -> Tensor:
        """What lies under a tile of the picture, (1, c, h, w) of something in the guide's size."""
        rows = _places(tile.top, tile.height, self.rows)
        columns = _places(tile.left, tile.width, self.columns)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None]
        return functional.grid_sample(
            value.float(), places, mode=mode, padding_mode="border", align_corners=False
        )


def _places(start: int, length: int, side: int) -> Tensor:
    """The middles of pixels as `grid_sample` counts: -1 and 1 are the outer edges."""
    return (torch.arange(start, start + length) + 0.5) / side * 2 - 1


@dataclass(frozen=True)
class Guide:
    """The edited picture in the frame's size, (1, h, w, 3); how much it changed, (1, h, w)."""

    frame: Frame
    picture: Tensor
    change: Tensor
    correction: Correction

    @classmethod
    def compare(
        cls,
        frame: Frame,
        before: Tensor,
        coded: Tensor,
        after: Tensor,
        *,
        register: bool,
        colour: bool,
    ) -> Guide:
        """Of the picture before and after the edit: put in place, in the colours of before.

        What the VAE cannot keep, as small letters, is no change: the edit is compared with the
        `coded` picture, which only went through the VAE. A guide that lies some pixels off would
        look changed all over, so it is put in place by a coarse look.
        """
        _, unchanged = without_guide(after, coded)
        after, correction = correct(after, before, unchanged, register=register, colour=colour)
        return cls(frame, after, change_map(coded, after), correction)

    def crop(self, tile: Tile) -> Tensor:
        """The guide under a tile of the picture, enlarged to it, (1, h, w, 3)."""
        enlarged = self.frame.enlarged(self.picture.movedim(-1, 1), tile, "bicubic")
        return enlarged.clamp(0, 1).movedim(1, -1)

    def changed(self, grid: TileGrid, threshold: float) -> frozenset[int]:
        """The tiles that the edit is about; `threshold` in units of 1/255, 0: all of them."""
        height, width = self.change.shape[1:]
        below = ceil(height * max(0, grid.height / self.frame.rows - 1))
        right = ceil(width * max(0, grid.width / self.frame.columns - 1))
        change = functional.pad(self.change[None], (0, right, 0, below), mode="replicate")[0]
        return changed_tiles(change, grid, threshold)

    @property
    def most(self) -> float:
        """The largest change, of 255."""
        return float(self.change.max()) * 255

    def region(self, mask: Mask | None, threshold: float) -> Region | None:
        """What the edit may change, of what the mask leaves; None for a picture that may change
        everywhere. `threshold` as for `changed`."""
        if threshold <= 0:
            return Region(mask, None) if mask is not None else None
        taken = share(self.change, threshold)[:, None]
        return Region(mask, lambda tile: self.frame.enlarged(taken, tile, "bilinear")[:, 0])

    def difference(self, tile: Tile, original: Tensor, edited: Tensor, share: Tensor) -> float:
        """How far an edited tile is from the guide where that changed the picture.

        0: it is as the guide; 1: as far from it as the original. Seen at the guide's size, over
        areas of COARSE pixels: what is finer is the tile's to draw. What counts little in the blend
        by its `share`, (1, h, w), counts little here.
        """
        area = max(1, round(COARSE * self.frame.rows / self.frame.size.height))
        changed = self.frame.enlarged(self.change[:, None], tile, "bilinear") * 255 > CHANGED
        where = functional.avg_pool2d(changed * share[:, None], area)
        guide, before, after = (
            functional.avg_pool2d(t.movedim(-1, 1).float(), area)
            for t in (self.crop(tile), original, edited)
        )
        asked = ((guide - before).abs() * where).sum()
        if where.mean() < LEAST_CHANGED or asked <= 0:
            return 0.0
        return float(((guide - after).abs() * where).sum() / asked)

    def target(self, tile: Tile, original: Tensor) -> tuple[Tensor, Tensor]:
        """What a tile should look like, (1, h, w, 3), and where that is the original, (1, h, w)."""
        unchanged = self.frame.enlarged(_trust(self.change)[:, None], tile, "bilinear")[:, 0]
        share = unchanged[..., None]
        return self.crop(tile) * (1 - share) + original * share, unchanged


def _trust(change: Tensor) -> Tensor:
    """Where a picture is still the original, (1, h, w) from 0 to 1."""
    grown = functional.max_pool2d(change, 5, 1, 2)
    return (1 - grown / TRUST).clamp(0, 1)


def without_guide(tile: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `Guide.target` by the tile itself: the original, and where the tile still is it.

    Looked at coarsely, so that a shift by some pixels is no change.
    """
    small = (
        functional.avg_pool2d(t.movedim(-1, 1).float(), COARSE).movedim(1, -1)
        for t in (original, tile)
    )
    trust = _trust(change_map(*small))[:, None]
    unchanged = functional.interpolate(trust, size=tile.shape[1:3], mode="bilinear")
    return original, unchanged[:, 0]
