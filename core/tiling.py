"""Overlapping tiles of a picture, the windows that blend them, and the mean that they make.

The weights of a window are divided by their own sum, along each axis on its own and in float64, so
that they add up to one at every pixel whatever the window, the overlap and the order are
(a partition of unity). MultiDiffusion (arXiv 2302.08113) averages tiles like this at each step,
Mixture of Diffusers (arXiv 2302.02412) does with a gaussian window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

PIXEL_STEP, PIXEL_PATCH = 32, 16  # pixels: of the sides of a tile, and of where a tile begins
STEP, PATCH = 4, 2  # the same in latent pixels: sizes of Qwen-Image should be multiples of 32 px
GAUSSIAN_VARIANCE = 0.01  # of the tile's side squared, as Mixture of Diffusers has it


class Tile(NamedTuple):
    """A rectangle of the picture, in the picture's pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TileGrid:
    """Where tiles of one size begin in a picture of `height` x `width`, in plain ints.

    Any unit will do: pixels, latent pixels, tokens. Every tile has the full size; those at the end
    of a side lie inside the picture.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def cover(
        cls, height: int, width: int, tile: int, overlap: int, step: int = STEP, patch: int = PATCH
    ) -> TileGrid:
        """As few tiles of side `tile` as cover the picture, neighbours sharing at least `overlap`.

        The overlap is spread evenly. Tiles begin at multiples of `patch`, but for the last of a
        side that is no multiple itself. Along a side that is no longer than a tile there is one,
        as long as that side. Raises ValueError: `tile` is no multiple of `step`, or the overlap
        leaves less than a patch of a tile.
        """
        if min(height, width) < 1:
            raise ValueError(f"There is no picture of {width} x {height}.")
        if tile < step or tile % step:
            raise ValueError(f"The side of a tile must be a multiple of {step}, not {tile}.")
        if not 0 <= overlap <= tile - patch:
            raise ValueError(f"The overlap must lie between 0 and {tile - patch}, not {overlap}.")
        tops, lefts = (_starts(side, tile, overlap, patch) for side in (height, width))
        return cls(height, width, min(tile, height), min(tile, width), tops, lefts)

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
        return cls.cover(height, width, tile, min(shared, tile - PATCH))

    def scaled(self, multiplier: int, divisor: int = 1) -> TileGrid:
        """The same grid in another unit. Raises ValueError where that does not come out even."""

        def convert(value: int) -> int:
            whole, rest = divmod(value * multiplier, divisor)
            if rest:
                raise ValueError(
                    f"A grid with a tile at {value} cannot be scaled by {multiplier}/{divisor}: "
                    f"{value * multiplier / divisor:g} is no whole pixel."
                )
            return whole

        sides = map(convert, (self.height, self.width, self.tile_height, self.tile_width))
        return TileGrid(*sides, *(tuple(map(convert, s)) for s in (self.tops, self.lefts)))

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def tiles(self) -> tuple[Tile, ...]:
        """Row by row, from the top left."""
        return tuple(
            Tile(top, left, self.tile_height, self.tile_width)
            for top in self.tops
            for left in self.lefts
        )


def _starts(side: int, tile: int, overlap: int, patch: int) -> tuple[int, ...]:
    """Where tiles begin along one side."""
    if side <= tile:
        return (0,)
    last = side - tile
    stride = (tile - overlap) // patch * patch  # at most, so that enough is shared
    whole = ceil(last / patch) * patch
    gaps = ceil(whole / stride)
    return (*(whole * i // gaps // patch * patch for i in range(gaps)), last)


# ------------------------------------------------------------------------------ windows
def _middles(side: int) -> Tensor:
    """The middle of each of `side` samples between 0 and 1.

    A window that is taken at the samples' edges would begin with 0: a corner without any weight,
    which becomes a division by 0 in float16.
    """
    return (torch.arange(side, dtype=torch.float64) + 0.5) / side


def hann(side: int) -> Tensor:
    """sin^2(pi x), after Julius von Hann (Blackman and Tukey 1958): smooth where it ends."""
    return torch.sin(torch.pi * _middles(side)).square()


def linear(side: int) -> Tensor:
    """1 - |2x - 1|, the triangle (Bartlett 1950)."""
    return 1 - (2 * _middles(side) - 1).abs()


def cosine(side: int) -> Tensor:
    """sin(pi x), half a wave (Harris 1978): ends with a kink."""
    return torch.sin(torch.pi * _middles(side))


def gaussian(side: int) -> Tensor:
    """exp(-(x - 1/2)^2 / (2 v)), v = 0.01, as Mixture of Diffusers (arXiv 2302.02412)."""
    return torch.exp(-(_middles(side) - 0.5).square() / (2 * GAUSSIAN_VARIANCE))


WINDOWS: dict[str, Callable[[int], Tensor]] = {
    "hann": hann,
    "linear": linear,
    "cosine": cosine,
    "gaussian": gaussian,
}


class Weights:
    """How much each pixel of each tile of a grid counts: positive, and one in sum everywhere.

    Towards the picture's outer edge a window stays as high as in its middle. The weight of a pixel
    is the product of those along the two axes: `vertical` has one (tile height,) float32 for each
    of the grid's tops, `horizontal` one (tile width,) for each of its lefts.
    Raises ValueError for a window that is none of `WINDOWS`.
    """

    def __init__(self, grid: TileGrid, window: str = "hann") -> None:
        if window not in WINDOWS:
            raise ValueError(f"There is no window {window!r}. Choose one of {', '.join(WINDOWS)}.")
        self._columns = len(grid.lefts)
        shape = WINDOWS[window]
        self.vertical = _along(grid.tops, grid.tile_height, grid.height, shape)
        self.horizontal = _along(grid.lefts, grid.tile_width, grid.width, shape)

    def of(self, index: int) -> Tensor:
        """Of one tile, by its place in `TileGrid.tiles()`: (height, width), float32, on the CPU."""
        row, column = divmod(index, self._columns)
        return self.vertical[row][:, None] * self.horizontal[column][None, :]


def _along(
    starts: Sequence[int], tile: int, side: int, shape: Callable[[int], Tensor]
) -> list[Tensor]:
    """The weights along one axis, for each tile's place on it, (tile,) float32."""
    inner, middle = shape(tile), tile // 2
    own = []
    for start in starts:
        weights = inner.clone()
        if start == 0:
            weights[:middle] = weights[middle]
        if start + tile == side:
            weights[middle:] = weights[middle]
        own.append(weights)
    total = torch.zeros(side, dtype=torch.float64)
    for start, weights in zip(starts, own, strict=True):
        total[start : start + tile] += weights
    shares = zip(starts, own, strict=True)
    return [(weights / total[start : start + tile]).float() for start, weights in shares]


# ------------------------------------------------------------------------------ blending
def crop(value: Tensor, tile: Tile, dim: int = -2) -> Tensor:
    """The tile's part of the dimensions `dim` (rows) and `dim + 1` (columns), as a view."""
    return value.narrow(dim, tile.top, tile.height).narrow(dim + 1, tile.left, tile.width)


class TileBlender:
    """The mean of tiles by their weights, in float32, one tile at a time.

    `shape` is that of the whole; rows are dimension `dim`, columns the next: -2 for latents of four
    or five dimensions and for masks, -3 for pictures (batch, height, width, channels). `into` may
    give the memory of the mean, float32 of that shape; it may lie on a disk.

    It is the mean of the tiles so far. Tiles that agree then give what they agree on, bit
    for bit: unchanged ones what was cut. A sum would round it, and files of 8 bits, into which
    ComfyUI rounds down, would be darker by one here and there.

    Over a `base` of the same shape (not `into` itself), what a tile changes of it is summed. Tiles
    that are never added then leave the base as it is, bit for bit, and so do those that equal it.
    """

    def __init__(
        self,
        grid: TileGrid,
        shape: Sequence[int],
        window: str = "hann",
        *,
        dim: int = -2,
        device: torch.device | str = "cpu",
        base: Tensor | None = None,
        into: Tensor | None = None,
    ) -> None:
        if (shape[dim], shape[dim + 1]) != (grid.height, grid.width):
            raise ValueError(
                f"The grid is one of {grid.width} x {grid.height}, "
                f"not of {shape[dim + 1]} x {shape[dim]}."
            )
        if into is None:
            into = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        self._mean, self._base, self._dim = into, base, dim
        self._tiles, self._weights = grid.tiles(), Weights(grid, window)
        self._missing = set(range(len(grid)))
        self._counted = None  # the weights so far, (height, width)
        if base is None:
            self._counted = torch.zeros(grid.height, grid.width, device=into.device)
        self._clear()

    def _clear(self) -> None:
        """Tile by tile: the base may be larger than the memory."""
        for tile in self._tiles:
            own = crop(self._mean, tile, self._dim)
            own.zero_() if self._base is None else own.copy_(crop(self._base, tile, self._dim))

    def add(self, index: int, value: Tensor) -> None:
        """A tile by its place in `TileGrid.tiles()`, once. Raises ValueError: another size."""
        own = crop(self._mean, self._tiles[index], self._dim)
        if value.shape != own.shape:
            raise ValueError(
                f"Tile {index + 1} came as {tuple(value.shape)} instead of {tuple(own.shape)}."
            )
        if index not in self._missing:
            raise ValueError(f"Tile {index + 1} came twice.")
        self._missing.remove(index)
        value = value.to(own.device, torch.float32)
        weight = self._weights.of(index).to(own.device)
        if self._base is not None:
            value = value - crop(self._base, self._tiles[index], self._dim).to(own.device)
            own.addcmul_(value, self._spread(weight))
        else:
            counted = crop(self._counted, self._tiles[index])
            counted += weight
            own.lerp_(value, self._spread(weight / counted))

    def _spread(self, weight: Tensor) -> Tensor:
        """Ones behind the columns, as the channels of a picture."""
        return weight.reshape(*weight.shape, *(1,) * (-self._dim - 2))

    def result(self) -> Tensor:
        """The mean, float32. Raises ValueError while tiles are missing, unless there is a base."""
        if self._missing and self._base is None:
            missing = ", ".join(str(index + 1) for index in sorted(self._missing)[:8])
            raise ValueError(f"{len(self._missing)} tiles are missing: {missing}.")
        return self._mean
