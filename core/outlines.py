"""The borders of regions as smooth lines, and lines as a drawing of even width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from .picture_regions import libraries

if TYPE_CHECKING:
    import numpy as np

SMOOTH = 2.5  # pixels of the working copy: standard deviation of the blur along a line
SMOOTHEST = 5.0  # the same of lines that are enlarged: more would take fingers and feet away
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up: as (row, column)


def borders(labels: np.ndarray) -> list[np.ndarray]:
    """The lines between the regions of (h, w): each (n, 2) as (x, y), from corner to corner.

    Coordinates are of the grid's corners: 0 is the left edge of the first pixel. Closed lines end
    where they begin; others at places where three regions meet, or at the picture's edge.
    """
    np = libraries().np
    height, width = labels.shape
    # Whether a line leads from each corner of the grid to the right, and down.
    right = np.zeros((height + 1, width + 1), bool)
    down = np.zeros_like(right)
    right[1:-1, :-1] = labels[:-1] != labels[1:]
    down[:-1, 1:-1] = labels[:, :-1] != labels[:, 1:]
    left, up = np.roll(right, 1, 1), np.roll(down, 1, 0)
    ways = np.stack([right, down, left, up], -1)
    there = ways.any(-1)
    next_to = {
        (y, x): [(y + a, x + b) for (a, b), leads in zip(STEPS, flags, strict=True) if leads]
        for (y, x), flags in zip(np.argwhere(there).tolist(), ways[there].tolist(), strict=True)
    }
    return [smooth(chain) for chain in chains(next_to)]


def chains(next_to: dict[Any, list[Any]]) -> list[list[Any]]:
    """The lines of a network, given as each place's neighbours, cut where not two of them meet."""
    left = {place: set(others) for place, others in next_to.items()}
    knots = [place for place, others in next_to.items() if len(others) != 2]
    found = []
    for start in [*knots, *next_to]:  # what is left after the knots are closed lines
        while left[start]:
            chain = [start]
            while True:
                here, there = chain[-1], min(left[chain[-1]])
                left[here].discard(there)
                left[there].discard(here)
                chain.append(there)
                if len(next_to[there]) != 2 or not left[there]:
                    break
            found.append(chain)
    return found


def smooth(chain: Sequence[tuple[float, float]], by: float = SMOOTH) -> np.ndarray:
    """A line of (row, column) as (n, 2) of (x, y), blurred along itself; its ends stay."""
    points = libraries().np.asarray(chain, float)[:, ::-1]
    return _blurred(points, by, chain[0] == chain[-1])


def enlarged(line: np.ndarray, zoom: float) -> np.ndarray:
    """A smooth line (n, 2), to be drawn so many times as large as usual: more even, and denser.

    The steps of its pixels would show. What the blur takes away is blurred and given back, so that
    small rings keep their size.
    """
    np = libraries().np
    by, closed = min(SMOOTH * zoom, SMOOTHEST), bool((line[0] == line[-1]).all())
    first = _blurred(line, by, closed)
    even = first + _blurred(line - first, by, closed)
    whole = np.arange(len(even))
    parts = np.linspace(0, whole[-1], whole[-1] * math.ceil(zoom) + 1)
    return np.stack([np.interp(parts, whole, even[:, axis]) for axis in (0, 1)], -1)


def _blurred(points: np.ndarray, by: float, closed: bool) -> np.ndarray:
    lib = libraries()
    blur = lib.ndimage.gaussian_filter1d
    if closed:
        ring = blur(points[:-1], by, axis=0, mode="wrap")
        return lib.np.concatenate([ring, ring[:1]])
    straight = lib.np.linspace(points[0], points[-1], len(points))
    bend = points - straight  # nothing at both ends, and so it stays in an odd continuation
    odd = lib.np.concatenate([bend, -bend[-2:0:-1]])
    return straight + blur(odd, by, axis=0, mode="wrap")[: len(points)]


def drawn(
    lines: Iterable[np.ndarray],
    filled: Iterable[np.ndarray],
    size: tuple[int, int],
    line_width: float,
    place: tuple[float, float, float],
    within: tuple[int, int],
) -> np.ndarray:
    """Black on white: (h, w) bytes of `size` = (width, height).

    `place` is the scale of the lines' coordinates, and where their origin comes to lie, in pixels;
    `line_width` is in pixels. What is `filled` is drawn black inside, too. Nothing is drawn outside
    of `within`, the width and height of the lines' own picture.
    """
    finer = 4 if max(size) <= 1024 else 2
    scale, left, top = (value * finer for value in place)
    sheet = Image.new("L", (size[0] * finer, size[1] * finer), 255)
    pen = ImageDraw.Draw(sheet)
    radius = line_width * finer / 2
    for points in filled:
        pen.polygon([tuple(p) for p in (points * scale + (left, top) - 0.5).tolist()], fill=0)
    for points in lines:
        _stroke(pen, (points * scale + (left, top) - 0.5).tolist(), radius)
    far = (within[0] * scale + left, within[1] * scale + top)
    inner = (  # of a picture that is larger than the sheet, what lies on it
        *(max(0, round(side)) for side in (left, top)),
        *(min(end, round(side)) for end, side in zip(sheet.size, far, strict=True)),
    )
    clipped = Image.new("L", sheet.size, 255)
    clipped.paste(sheet.crop(inner), inner[:2])
    return libraries().np.asarray(clipped.reduce(finer))


def _stroke(pen: ImageDraw.ImageDraw, points: list[list[float]], radius: float) -> None:
    pen.line([tuple(p) for p in points], fill=0, width=max(1, round(2 * radius)))
    for x, y in points:  # round joints and ends
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=0)
