"""Where stickers lie on a sheet, and how each is drawn there.

The sheet is parted into cells whose shape suits the stickers, as far as that is left open. Each
has a cell of its own, and is so small and moved so little that its turned outline stays in it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cut_out import Sticker, as_tensor
from .picture_regions import LONGEST

GAP = 0.05  # of a cell's shorter side that stays free between stickers
LINE = 0.003  # of the sticker's longer side: the line to cut along
GREY = 0.72  # of that line
MANY = 20  # columns and rows that can be asked for
USUAL = 12  # stickers on a sheet whose columns and rows are both left open
STEPS = 4  # from upright to each side, of the angles that a grid is judged by
ROWS = 256  # that are drawn at a time: memory stays small however large the sheet is


class Layout(NamedTuple):
    """What the node asks for: `vary` and `turn` are the most, a share and degrees."""

    columns: int  # 0: by the stickers' shape
    rows: int  # 0: as many as fill the sheet; both 0: `USUAL` stickers, or one of each picture
    vary: float = 0.25
    turn: float = 12.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what cannot be used."""
        if not (0 <= self.columns <= MANY and 0 <= self.rows <= MANY):
            raise ValueError(
                f"columns and rows are {self.columns} and {self.rows}: give 1 to {MANY}, or 0 for "
                "what suits the stickers."
            )
        if not (0 <= self.vary <= 0.6 and 0 <= self.turn <= 45):
            raise ValueError(
                f"size_variation and turn are {self.vary * 100:g} and {self.turn:g}: give 0 to 60 "
                "percent and 0 to 45 degrees."
            )


class Place(NamedTuple):
    """Which sticker, where its box's centre lies (pixels), how large, how far turned (degrees)."""

    number: int
    x: float
    y: float
    scale: float
    angle: float


def places(
    outlines: Sequence[Tensor], area: tuple[float, float, float, float], layout: Layout
) -> list[Place]:
    """Where stickers with outlines (n, 2) lie in an area (left, top, width, height).

    Points are (x, y) from the middle of the sticker's box. Stickers take turns, and no two of them
    touch. The same seed gives the same places.
    """
    rng = random.Random(layout.seed)
    left, top, width, height = area
    columns, rows = grid(outlines, (width, height), layout)
    layout = layout._replace(columns=columns, rows=rows)
    cell = (width / columns, height / rows)
    found = []
    for row in range(rows):
        for column in range(columns):
            number = (column + row * columns + _step(row, layout, len(outlines))) % len(outlines)
            corner = (left + column * cell[0], top + row * cell[1])
            found.append(_placed(number, outlines[number], corner, cell, layout, rng))
    return found


def _step(row: int, layout: Layout, count: int) -> int:
    """Where whole turns fit a row, each row begins with the next one: no columns of one animal."""
    return row if layout.columns % count == 0 else 0


def _placed(
    number: int,
    outline: Tensor,
    corner: tuple[float, float],
    cell: tuple[float, float],
    layout: Layout,
    rng: random.Random,
) -> Place:
    angle = rng.uniform(-layout.turn, layout.turn)
    smaller = 1 - rng.uniform(0, layout.vary)
    right, down = rng.random(), rng.random()
    reach = _reach(outline, angle)
    width, height = reach[2] - reach[0], reach[3] - reach[1]
    scale = _scale((width, height), cell) * smaller
    gap = GAP * min(cell)
    free = (cell[0] - gap - width * scale, cell[1] - gap - height * scale)
    # Towards the middle of what is free: at random over all of it looks untidy.
    across, along = (0.25 + 0.5 * share for share in (right, down))
    x = corner[0] + gap / 2 - reach[0] * scale + free[0] * across
    y = corner[1] + gap / 2 - reach[1] * scale + free[1] * along
    return Place(number, x, y, scale, angle)


def _reach(outline: Tensor, angle: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an outline that is turned by so many degrees."""
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    x, y = outline.double().unbind(-1)
    across, down = x * cosine - y * sine, x * sine + y * cosine
    return float(across.min()), float(down.min()), float(across.max()), float(down.max())


def _scale(size: tuple[float, float], cell: tuple[float, float]) -> float:
    """How large something of (width, height) can be in a cell, beside the gap."""
    gap = GAP * min(cell)
    return min((cell[0] - gap) / size[0], (cell[1] - gap) / size[1])


# --------------------------------------------------------------------------------- the grid
class _Shape(NamedTuple):
    """Of an outline: the area of its box, and width and height at each angle it is judged by."""

    area: float
    turned: list[tuple[float, float]]


def grid(outlines: Sequence[Tensor], size: tuple[float, float], layout: Layout) -> tuple[int, int]:
    """Columns and rows on a sheet of (width, height): those asked for, and what suits the outlines.

    Where both are left open, it is the grid of at least `USUAL` cells, and of as many as there are
    outlines, that makes stickers largest. Where one is, it is the number that covers most of the
    sheet with stickers, none of them smaller than in cells that are about square, and no picture
    left out that has a place there.
    """
    columns, rows = layout.columns, layout.rows
    if columns and rows:
        return columns, rows
    shapes = [_shape(outline, layout.turn) for outline in outlines]
    if not columns and not rows:
        count = min(MANY**2, max(USUAL, len(shapes)))
        every = [(n, math.ceil(count / n)) for n in range(math.ceil(count / MANY), MANY + 1)]
        return max(every, key=lambda one: _covered(shapes, _scales(shapes, size, one)))
    if columns:
        square = max(1, round(size[1] / (size[0] / columns)))
        every = [(columns, n) for n in range(1, max(MANY, square) + 1)]
    else:
        square = max(1, round(size[0] / (size[1] / rows)))
        every = [(n, rows) for n in range(1, max(MANY, square) + 1)]
    return _fullest(every, every[square - 1], shapes, size)


def _shape(outline: Tensor, turn: float) -> _Shape:
    turned = []
    for step in range(-STEPS, STEPS + 1):
        left, top, right, bottom = _reach(outline, turn * step / STEPS)
        turned.append((right - left, bottom - top))
    return _Shape(math.prod(turned[STEPS]), turned)


def _fullest(
    every: Sequence[tuple[int, int]],
    square: tuple[int, int],
    shapes: Sequence[_Shape],
    size: tuple[float, float],
) -> tuple[int, int]:
    """The grid that covers most, of those where nothing is smaller than in the square one."""
    least = _scales(shapes, size, square)
    found, most = square, 0.0
    for one in every:
        if math.prod(one) < min(len(shapes), math.prod(square)):
            continue  # a picture would have no place
        scales = _scales(shapes, size, one)
        covered = math.prod(one) * _covered(shapes, scales)
        if covered > most and all(a >= b for a, b in zip(scales, least, strict=True)):
            found, most = one, covered
    return found


def _scales(
    shapes: Sequence[_Shape], size: tuple[float, float], one: tuple[int, int]
) -> list[float]:
    """How large each shape can be in a cell of a grid, at each angle."""
    cell = (size[0] / one[0], size[1] / one[1])
    return [_scale(turned, cell) for shape in shapes for turned in shape.turned]


def _covered(shapes: Sequence[_Shape], scales: Sequence[float]) -> float:
    """What a sticker's box covers on the average, in pixels of the sheet."""
    areas = (shape.area for shape in shapes for _ in shape.turned)
    return sum(area * s**2 for area, s in zip(areas, scales, strict=True)) / len(scales)


# --------------------------------------------------------------------------------- drawing
def turned_box(width: float, height: float, angle: float) -> tuple[float, float]:
    """Width and height of the upright box around a box that is turned by so many degrees."""
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    return width * cosine + height * sine, width * sine + height * cosine


def drawn_on(sheet: Tensor, sticker: Sticker, place: Place) -> None:
    """Draw a sticker on a sheet (h, w, 3), in place: its white edge, itself, the line to cut."""
    left, top, right, bottom = sticker.box
    width, height = turned_box(right - left, bottom - top, place.angle)
    reach = (width * place.scale / 2 + 1, height * place.scale / 2 + 1)
    first = max(0, math.floor(place.x - reach[0])), max(0, math.floor(place.y - reach[1]))
    last = (
        min(sheet.shape[1], math.ceil(place.x + reach[0])),
        min(sheet.shape[0], math.ceil(place.y + reach[1])),
    )
    drawing = _Drawing(sticker, place, max(right - left, bottom - top))
    for row in range(first[1], last[1], ROWS):
        window = (first[0], row, last[0], min(row + ROWS, last[1]))
        part = sheet[window[1] : window[3], window[0] : window[2]]
        colours, edge, line = drawing.window(*window)
        part.lerp_(colours, edge)
        part.lerp_(torch.full_like(part, GREY), line)


def single(sticker: Sticker, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A sticker upright in its picture's size, cut to a box of its edge's pixels.

    Returns colours (h, w, 3) and mask (h, w), both 0..1; the mask is 1 where nothing of the sticker
    is, as ComfyUI's masks of transparent pictures are.
    """
    scale = max(sticker.picture.shape[:2]) / LONGEST
    left, top, right, bottom = box
    own = sticker.box
    width, height = (max(1, round((b - a) * scale)) for a, b in ((left, right), (top, bottom)))
    x, y = ((own[i] + own[i + 2]) / 2 - box[i] for i in (0, 1))
    place = Place(0, x * scale, y * scale, scale, 0.0)
    drawing = _Drawing(sticker, place, max(own[2] - own[0], own[3] - own[1]))
    colours, mask = torch.ones(height, width, 3), torch.ones(height, width)
    for row in range(0, height, ROWS):
        part = slice(row, min(row + ROWS, height))
        colours[part], edge, _ = drawing.window(0, part.start, width, part.stop)
        mask[part] = 1 - edge[..., 0]
    return colours, mask


class _Drawing:
    """A sticker at a place: its colours and weights in any window of the sheet."""

    def __init__(self, sticker: Sticker, place: Place, longest: float) -> None:
        self.place, self.shapes = place, as_tensor(sticker)
        self.line = max(1.25, LINE * longest * place.scale)
        left, top, right, bottom = sticker.box
        self.centre = ((left + right) / 2, (top + bottom) / 2)
        self.pad = sticker.pad
        height, width = (side - 2 * sticker.pad for side in sticker.shape.shape)
        self.copy = (width, height)
        self.picture = _reduced(sticker.picture, height, width, place.scale)

    def window(self, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor, Tensor]:
        """Colours (h, w, 3), the weight of the sticker and that of its line, (h, w, 1)."""
        x = (torch.arange(left, right) + 0.5 - self.place.x)[None] / self.place.scale
        y = (torch.arange(top, bottom) + 0.5 - self.place.y)[:, None] / self.place.scale
        angle = math.radians(self.place.angle)
        across = math.cos(angle) * x + math.sin(angle) * y + self.centre[0]
        down = -math.sin(angle) * x + math.cos(angle) * y + self.centre[1]
        height, width = self.shapes.shape[-2:]
        shape, edge = _sampled(self.shapes, across / width, down / height)[0] * self.place.scale
        colours = (
            _sampled(
                self.picture, (across - self.pad) / self.copy[0], (down - self.pad) / self.copy[1]
            )[0]
            .movedim(0, -1)
            .clamp(0, 1)
        )
        animal = (0.5 - shape).clamp(0, 1)[..., None]
        white = torch.lerp(torch.ones_like(colours), colours, animal)
        inside = (0.5 - edge).clamp(0, 1)[..., None]
        line = (self.line / 2 + 0.5 - (edge + self.line / 2).abs()).clamp(0, 1)[..., None]
        return white, inside, line


def _reduced(picture: Tensor, height: int, width: int, scale: float) -> Tensor:
    """(1, 3, h, w), no finer than it is drawn: coarser sampling would leave jagged edges."""
    channels = picture.movedim(-1, 0)[None]
    size = [min(side, max(1, round(part * scale))) for side, part in
            zip(picture.shape[:2], (height, width), strict=True)]  # fmt: skip
    if size == list(picture.shape[:2]):
        return channels
    return F.interpolate(channels, size=size, mode="bilinear", antialias=True)


def _sampled(values: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """At places in 0..1 of each side, the edge repeated."""
    grid = torch.stack([across * 2 - 1, down * 2 - 1], -1)[None]
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
