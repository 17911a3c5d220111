"""Where an edit has changed a picture, and which tiles that concerns.

Two pictures of an edit differ everywhere a little: colours drift, content moves by a part of a
pixel, and the VAE leaves noise. None of that is a change that somebody asked for.
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiling import Tile, TileGrid, crop

DRIFT = 8 / 255  # colours that are off by more than this were changed
PATCH = 7  # pixels of the map: what is smaller is noise
MARGIN = 1 / 64  # of the map's longer side: how far the soft border of an edit reaches


def change_map(before: Tensor, after: Tensor) -> Tensor:
    """How much an edit changed each place, (1, h, w) in 0..1, of two pictures (1, h, w, 3).

    Give `before` as the VAE gives it back, encoded and decoded: what the VAE loses is then no
    change. A pixel counts by how far it lies outside of the values around its place in the other
    picture, so that edges may move by a pixel; the mean of its channels, and of the patch around
    it. A drift of the colours that most of the picture shares is taken off before. Raises
    ValueError for pictures of unlike sizes.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"Pictures of {tuple(before.shape)} and {tuple(after.shape)} cannot be compared."
        )
    first, second = (picture.movedim(-1, 1).float() for picture in (before, after))
    second = second - _drift(second - first)
    first, second = (_blurred(picture) for picture in (first, second))
    outside = torch.maximum(_outside(second, first), _outside(first, second))
    return _mean(outside.mean(1, keepdim=True))[:, 0].clamp(0, 1)


def _drift(difference: Tensor) -> Tensor:
    """The median difference of what has hardly changed, for each channel, (1, c, 1, 1)."""
    values = difference.flatten(2)
    near = values[..., (values.abs() < DRIFT).all(1)[0]]
    if near.shape[-1] < values.shape[-1] / 10:
        return torch.zeros_like(values[..., :1])[..., None]
    return near.median(-1, keepdim=True).values[..., None]


def _blurred(picture: Tensor) -> Tensor:
    """Binomial, 3 x 3, edges repeated: takes off what a VAE adds from pixel to pixel."""
    channels = picture.shape[1]
    row = torch.tensor([1.0, 2.0, 1.0], device=picture.device) / 4
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


def _outside(values: Tensor, around: Tensor) -> Tensor:
    """How far `values` lie outside of the range of `around` within a pixel."""
    highest = F.max_pool2d(around, 3, 1, 1)
    lowest = -F.max_pool2d(-around, 3, 1, 1)
    return (values - highest).clamp(min=0) + (lowest - values).clamp(min=0)


def _mean(values: Tensor) -> Tensor:
    """Of the patch around each place."""
    return F.avg_pool2d(values, PATCH, 1, PATCH // 2, count_include_pad=False)


def grown(change: Tensor) -> Tensor:
    """A change map (1, h, w) whose changes reach on by the margin: (1, h, w)."""
    margin = _margin(change)
    wide = F.max_pool2d(change[None], (2 * margin + 1, 1), 1, (margin, 0))
    return F.max_pool2d(wide, (1, 2 * margin + 1), 1, (0, margin))[0]


def share(change: Tensor, threshold: float) -> Tensor:
    """How much of an edit each place of its `change_map` takes, (1, h, w) in 0..1.

    1 from the threshold on (in units of 1/255) and a margin around, then falling softly, 0 where
    nothing near changes by half of it. With a threshold of 0 every place takes all.
    """
    if threshold <= 0:
        return torch.ones_like(change)
    steep = (grown(change) * 255 / threshold * 2 - 1).clamp(0, 1)
    radius = (_margin(change) + 1) // 2
    soft = grown(steep)
    for _ in range(2):
        edges = F.pad(soft[None], (radius,) * 4, mode="replicate")
        soft = F.avg_pool2d(edges, 2 * radius + 1, 1)[0]
    return soft.clamp(0, 1)


def _margin(change: Tensor) -> int:
    return ceil(max(change.shape[-2:]) * MARGIN)


def changed_tiles(change: Tensor, grid: TileGrid, threshold: float) -> frozenset[int]:
    """The tiles of `grid`, by their place in its `tiles()`, that an edit changes somewhere.

    `change` is a `change_map`, which may be smaller than the grid's picture. `threshold` is in
    units of 1/255; with 0 all tiles count as changed.
    """
    if threshold <= 0:
        return frozenset(range(len(grid)))
    height, width = change.shape[-2:]
    wide = grown(change)
    found = []
    for index, tile in enumerate(grid.tiles()):
        rows = _scaled(tile.top, tile.height, height, grid.height)
        columns = _scaled(tile.left, tile.width, width, grid.width)
        part = crop(wide, Tile(rows[0], columns[0], rows[1], columns[1]))
        if part.max() * 255 > threshold:
            found.append(index)
    return frozenset(found)


def _scaled(start: int, length: int, side: int, whole: int) -> tuple[int, int]:
    """Start and length of a part of `whole` in a picture whose side is `side`, all of it."""
    first = start * side // whole
    return first, max(1, ceil((start + length) * side / whole) - first)
