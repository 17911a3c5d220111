"""The picture of a plan: which tiles a picture is cut into, and how their weights blend.

Each tile has one of four colours, and the weights mix them: where a colour is pure, one tile alone
counts. Lines are the edges of tiles, and so the space between two near ones is shared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from math import ceil

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

from .disk_backed import reduced
from .tiling import TileGrid, Weights

SHORTEST = 160  # pixels of the plan: a narrow picture is stretched to it, to show anything
TINT = 0.45  # how much of the plan is colour, not picture
FADED = 0.5  # how far the picture below is grey
DIMMED = 0.5  # how bright a skipped tile stays
HATCH = 18  # pixels between the lines over a skipped tile
NUMBER, LABEL, LEAST = 56, 34, 11  # pixels: sizes of text, and the smallest that is drawn
# Okabe and Ito: apart for all kinds of colour blindness (https://jfly.uni-koeln.de/color/).
COLOURS = (((0.00, 0.45, 0.70), (0.90, 0.60, 0.00)), ((0.00, 0.62, 0.45), (0.80, 0.47, 0.65)))


def draw(
    picture: Tensor,
    grid: TileGrid,
    window: str,
    *,
    labels: Sequence[str] = (),
    skipped: Collection[int] = (),
    longest: int = 1024,
) -> Tensor:
    """The plan over a picture (1, H, W, C), C >= 1: (1, h, w, 3) float32, of `longest` pixels.

    Tiles are numbered from 1, with their `labels` below where there is room for them. Those in
    `skipped`, by their place in `TileGrid.tiles()`, have no colour and are hatched. A narrow
    picture is stretched. Raises ValueError for a window that is none of `WINDOWS`.
    """
    scale = longest / max(grid.height, grid.width)
    least = min(SHORTEST, longest)
    height, width = (max(least, round(side * scale)) for side in (grid.height, grid.width))
    weights = Weights(grid, window)
    rows = _sampled(grid.tops, weights.vertical, grid.height, height)
    columns = _sampled(grid.lefts, weights.horizontal, grid.width, width)
    ground = _three_channels(reduced(picture, height, width))[0].clamp(0, 1).nan_to_num(0)
    plan = _as_image(_tinted(ground, rows, columns, skipped))
    cells = [
        (left, top, right, bottom)
        for top, bottom in _cells(rows)
        for left, right in _cells(columns)
    ]
    _hatch(plan, [cells[index] for index in skipped])
    _outline(plan, grid)
    _number(plan, cells, labels)
    return _as_tensor(plan)


def summary(grid: TileGrid) -> str:
    """What a grid is, in words: how many tiles, of which size, and what neighbours share."""
    if len(grid) == 1:
        return f"1 tile of {grid.width} x {grid.height}: the whole picture"
    shared = [
        tile - (after - before)
        for starts, tile in ((grid.tops, grid.tile_height), (grid.lefts, grid.tile_width))
        for before, after in pairwise(starts)
    ]
    return (
        f"{len(grid)} tiles of {grid.tile_width} x {grid.tile_height}, at least {min(shared)} "
        f"shared, {len(grid.lefts)} x {len(grid.tops)}"
    )


def _three_channels(picture: Tensor) -> Tensor:
    """Grey as grey, the alpha channel left out."""
    return (
        picture[..., :3]
        if picture.shape[-1] >= 3
        else picture[..., :1].expand(*picture.shape[:-1], 3)
    )


def _sampled(starts: Sequence[int], along: Sequence[Tensor], side: int, size: int) -> Tensor:
    """Each place's weights over the whole axis, at the middles of `size` pixels: (places, size)."""
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * side / size).long()
    result = torch.zeros(len(starts), size)
    for row, start, weights in zip(result, starts, along, strict=True):
        inside = (at >= start) & (at < start + len(weights))
        row[inside] = weights[at[inside] - start]
    return result


def _tinted(ground: Tensor, rows: Tensor, columns: Tensor, skipped: Collection[int]) -> Tensor:
    """The picture (h, w, 3) with the colours of the tiles, and with skipped ones dimmed."""
    count = len(columns)
    tiles = torch.tensor(COLOURS).repeat(ceil(len(rows) / 2), ceil(count / 2), 1)
    tiles = torch.cat([tiles[: len(rows), :count], torch.ones(len(rows), count, 1)], dim=-1)
    for index in skipped:
        tiles[index // count, index % count] = 0
    mixed = torch.einsum("rh,rck,cw->hwk", rows, tiles, columns)
    colour, active = mixed[..., :3], mixed[..., 3:]
    faded = torch.lerp(ground, ground.mean(dim=-1, keepdim=True), FADED)
    return faded * active * (1 - TINT) + ground * (1 - active) * DIMMED + colour * TINT


def _cells(along: Tensor) -> Iterator[tuple[int, int]]:
    """From where to where each place weighs most, of (places, size)."""
    strongest = along.argmax(dim=0)
    for place in range(len(along)):
        own = (strongest == place).nonzero()
        yield (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)


def _hatch(plan: Image.Image, cells: Sequence[tuple[int, int, int, int]]) -> None:
    if not cells:
        return
    where, lines = Image.new("L", plan.size), Image.new("L", plan.size)
    for left, top, right, bottom in cells:
        if right > left and bottom > top:
            where.paste(255, (left, top, right, bottom))
    pen, (width, height) = ImageDraw.Draw(lines), plan.size
    for x in range(-height, width, HATCH):
        pen.line((x, height, x + height, 0), fill=255, width=3)
    plan.paste((215, 215, 215), mask=ImageChops.multiply(where, lines))


def _outline(plan: Image.Image, grid: TileGrid) -> None:
    """Edges inside the picture, white between black, to be seen on any ground."""
    pen, (width, height) = ImageDraw.Draw(plan), plan.size
    for colour, thick in (("black", 4), ("white", 2)):
        for start in grid.tops:
            for y in (start, start + grid.tile_height):
                if 0 < y < grid.height:
                    at = round(y * height / grid.height)
                    pen.line((0, at, width, at), fill=colour, width=thick)
        for start in grid.lefts:
            for x in (start, start + grid.tile_width):
                if 0 < x < grid.width:
                    at = round(x * width / grid.width)
                    pen.line((at, 0, at, height), fill=colour, width=thick)


def _number(
    plan: Image.Image, cells: Sequence[tuple[int, int, int, int]], labels: Sequence[str]
) -> None:
    """All numbers in one size that fits the narrowest cell; labels likewise."""
    wide = min(right - left for left, _, right, _ in cells)
    high = min(bottom - top for _, top, _, bottom in cells)
    number = _fitting([str(len(cells))], wide * 0.8, min(NUMBER, high * 0.7))
    label = _fitting(labels, wide * 0.9, min(LABEL, high * 0.25))
    if not number:
        return
    pen = ImageDraw.Draw(plan)
    for index, (left, top, right, bottom) in enumerate(cells):
        x, y = (left + right) / 2, (top + bottom) / 2
        below = labels[index] if label and index < len(labels) else ""
        if below:
            _write(pen, (x, y + number.size * 0.65), below, label)
        _write(pen, (x, y - (number.size * 0.35 if below else 0)), str(index + 1), number)


def _fitting(texts: Sequence[str], wide: float, high: float) -> ImageFont.FreeTypeFont | None:
    """The font in which the longest of the texts is so large at most; None if it is too small."""
    longest = max(texts, key=len, default="")
    if not longest:
        return None
    probe = ImageFont.load_default(100)
    size = min(high, 100 * wide / probe.getlength(longest))
    return ImageFont.load_default(size) if size >= LEAST else None


def _write(
    pen: ImageDraw.ImageDraw, middle: tuple[float, float], text: str, font: ImageFont.FreeTypeFont
) -> None:
    edge = max(1, round(font.size / 12))
    pen.text(
        middle, text, fill="white", font=font, anchor="mm", stroke_width=edge, stroke_fill="black"
    )


def _as_image(pixels: Tensor) -> Image.Image:
    levels = (pixels * 255).round().to(torch.uint8).contiguous()
    height, width, _ = levels.shape
    return Image.frombytes("RGB", (width, height), levels.numpy().tobytes())


def _as_tensor(image: Image.Image) -> Tensor:
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.reshape(1, image.height, image.width, 3).float() / 255
