"""A picture into a page to colour in: closed black lines of one width on white.

The borders of its regions are traced, smoothed and drawn anew in the size of the page. Strokes of
the picture that are as narrow as the lines become one line each, and dark dots stay dots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .outlines import borders, chains, drawn, enlarged, smooth
from .paper import AS_PICTURE, SHEETS, Paper, Placed, filling, whole
from .picture_regions import LONGEST, Detail, libraries, regions, rgb, working_copy

if TYPE_CHECKING:
    import numpy as np

DETAILS = {  # 1, few lines, to 5, many
    1: Detail(3.0, 16, 0.0030),
    2: Detail(2.5, 12, 0.0012),
    3: Detail(2.0, 8, 0.0005),
    4: Detail(1.6, 6, 0.0003),
    5: Detail(1.2, 5, 0.0002),
}
THINNEST = 1.0  # pixels of a line on the page: thinner ones would be grey
STROKE = 1.5  # line widths: what is narrower is a stroke and no area
DARK_STROKE = 3.5  # line widths: of dark ones, the outlines of a comic
STROKE_AREA = 2.5  # squares of that width: smaller ones are corners and dots
KNOT_AREA = 6  # squares of that width: larger places within strokes are areas
DARK = 38.0  # CIELAB lightness: small areas below it are black on the page, too
PUPIL = 0.004  # of the picture: larger dark areas are there to be coloured


class PageSettings(NamedTuple):
    """Thousandths of the picture's shorter side; 1..5; `AS_PICTURE` or one of `SHEETS`."""

    line_width: float = 6.0
    detail: int = 3
    paper: str = AS_PICTURE

    def check(self) -> None:
        """Raises ValueError for what cannot be used."""
        if not 1 <= self.line_width <= 50:
            raise ValueError(
                f"line_width is {self.line_width:g}: give 1 to 50 thousandths of the picture's "
                "shorter side."
            )
        if self.detail not in DETAILS:
            raise ValueError(f"detail is {self.detail}: give 1, few lines, to 5, many.")
        if self.paper != AS_PICTURE and self.paper not in SHEETS:
            raise ValueError(
                f"paper is {self.paper!r}: choose {AS_PICTURE!r} or one of {', '.join(SHEETS)}."
            )


class Page(NamedTuple):
    """A drawn page (h, w) of bytes, black on white, and the number of its areas."""

    drawing: np.ndarray
    areas: int


class _Lines(NamedTuple):
    lines: list[np.ndarray]  # (n, 2) of (x, y) in pixels of the working copy
    dots: list[np.ndarray]  # outlines that are filled
    areas: int


def colouring_page(picture: Tensor, settings: PageSettings) -> Page:
    """The page of one picture (H, W, 1, 3 or 4), values in 0..1.

    Raises ValueError for a picture or settings that cannot be used; ImportError without
    scikit-image.
    """
    settings.check()
    colours = rgb(picture)
    copy = working_copy(colours)
    found = _found(copy, settings)
    height, width = copy.shape[:2]
    if settings.paper == AS_PICTURE:
        place = Placed(max(colours.shape[:2]) / LONGEST, 0.0, 0.0)
    else:
        place = whole((width, height), SHEETS[settings.paper])
    line = max(THINNEST, settings.line_width / 1000 * min(height, width) * place.scale)
    frame = _frame(found.lines, width, height, line / place.scale)
    found = found._replace(lines=[*found.lines, *frame])
    if settings.paper != AS_PICTURE:
        found, place = _filling(found, (width, height), SHEETS[settings.paper], line)
    size = size_of_page(colours, settings.paper)
    return Page(drawn(found.lines, found.dots, size, line, place, (width, height)), found.areas)


def size_of_page(picture: Tensor, paper: str) -> tuple[int, int]:
    """Width and height in pixels of the page that pictures (..., H, W, C) become."""
    if paper == AS_PICTURE:
        return picture.shape[-2], picture.shape[-3]
    return SHEETS[paper].width, SHEETS[paper].height


def _filling(
    found: _Lines, within: tuple[int, int], sheet: Paper, line: float
) -> tuple[_Lines, Placed]:
    """The lines for the size in which they fill the sheet, and where they lie on it."""
    np = libraries().np
    stays, points = whole(within, sheet), [*found.lines, *found.dots]
    if not points:
        return found, stays
    low = np.min([part.min(0) for part in points], axis=0).tolist()
    high = np.max([part.max(0) for part in points], axis=0).tolist()
    place = filling((*low, *high), within, sheet, line)
    zoom = place.scale / stays.scale
    if zoom <= 1:
        return found, place
    lines, dots = ([enlarged(part, zoom) for part in parts] for parts in (found.lines, found.dots))
    return _Lines(lines, dots, found.areas), place


def _frame(lines: list[np.ndarray], width: int, height: int, line: float) -> list[np.ndarray]:
    """The picture's edge, where lines end at it: it closes the areas that the picture cuts."""
    np = libraries().np
    far = np.array([width, height])
    ends = [end for points in lines for end in (points[0], points[-1])]
    if not any((end <= 0).any() or (end >= far).any() for end in ends):
        return []
    inset = line / 2
    right, bottom = width - inset, height - inset
    corners = ((inset, inset), (right, inset), (right, bottom), (inset, bottom), (inset, inset))
    return [np.array(corners)]


# --------------------------------------------------------------------------------- what is drawn
def _found(copy: np.ndarray, settings: PageSettings) -> _Lines:
    labels, lab = regions(copy, DETAILS[settings.detail])
    line = settings.line_width / 1000 * min(copy.shape[:2])
    ink, dots, specks = _narrow_parts(labels, lab, line)
    black = dots | (_pupils(labels, lab) & ~ink)
    filled = [line for line in borders(black.astype(int)) if len(line) > 3]
    labels = _flooded(labels, ink | dots | specks)
    lines = borders(labels)
    strokes = _strokes(ink, labels, STROKE * line)
    return _Lines([*lines, *strokes], filled, len(libraries().np.unique(labels)))


def _pupils(labels: np.ndarray, lab: np.ndarray) -> np.ndarray:
    """Where small dark regions are: eyes and noses."""
    np = libraries().np
    area = np.bincount(labels.ravel())
    lightness = np.bincount(labels.ravel(), lab[..., 0].ravel()) / np.maximum(area, 1)
    return ((area < PUPIL * labels.size) & (lightness < DARK))[labels]


def _flooded(labels: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Without some places: each becomes part of the nearest region that is left."""
    if not gone.any() or gone.all():
        return labels
    index = libraries().ndimage.distance_transform_edt(
        gone, return_distances=False, return_indices=True
    )
    return labels[tuple(index)]


def _narrow_parts(
    labels: np.ndarray, lab: np.ndarray, line: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What of regions is about as narrow as a line (pixels): strokes, dark dots, other specks."""
    lib = libraries()
    np, ndimage = lib.np, lib.ndimage
    whole = np.bincount(labels.ravel())  # of each region: its area, its lightness, its limit
    lightness = np.bincount(labels.ravel(), lab[..., 0].ravel()) / np.maximum(whole, 1)
    limit = line * np.where(lightness < DARK, DARK_STROKE, STROKE)
    inside = ndimage.distance_transform_edt(~_edge(labels)) + 0.5
    half = limit[labels] / 2
    wide = inside > half
    none = np.zeros_like(wide)
    if not wide.any():
        return none, none, none
    distance, index = ndimage.distance_transform_edt(~wide, return_indices=True)
    opened = (distance <= half + 1) & (labels[tuple(index)] == labels)
    parts = lib.label(np.where(opened, 0, labels + 1), background=0, connectivity=1)
    area = np.bincount(parts.ravel())
    owner = np.zeros(len(area), int)
    owner[parts.ravel()] = labels.ravel()
    long = area >= STROKE_AREA * limit[owner] ** 2
    dot = (area == whole[owner]) & ~long  # narrow everywhere
    long[0] = dot[0] = False  # what is wide
    dark = lightness[owner] < DARK
    ink = long[parts] | _knots(opened, labels, long[parts], limit)
    return ink, (dot & dark)[parts], (dot & ~dark)[parts]


def _knots(
    opened: np.ndarray, labels: np.ndarray, ink: np.ndarray, limit: np.ndarray
) -> np.ndarray:
    """The wider places of regions that are mostly strokes: where several of them meet."""
    lib = libraries()
    np = lib.np
    parts = lib.label(np.where(opened, labels + 1, 0), background=0, connectivity=1)
    area = np.bincount(parts.ravel())
    owner = np.zeros(len(area), int)
    owner[parts.ravel()] = labels.ravel()
    whole = np.bincount(labels.ravel())
    strokes = np.bincount(labels[ink], minlength=len(whole)) > whole / 2
    knot = strokes[owner] & (area < KNOT_AREA * limit[owner] ** 2)
    knot[0] = False
    return knot[parts]


def _edge(labels: np.ndarray) -> np.ndarray:
    """The pixels that have one of another region beside them."""
    np = libraries().np
    edge = np.zeros(labels.shape, bool)
    down, right = labels[:-1] != labels[1:], labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= down
    edge[1:] |= down
    edge[:, :-1] |= right
    edge[:, 1:] |= right
    return edge


def _strokes(ink: np.ndarray, labels: np.ndarray, narrow: float) -> list[np.ndarray]:
    """The middle of strokes that part no regions, and so are no border: a mouth, whiskers."""
    if not ink.any():
        return []
    lib = libraries()
    near = lib.ndimage.distance_transform_edt(~_edge(labels)) <= narrow / 2
    thin = lib.skeletonize(ink) & ~near
    places = set(map(tuple, lib.np.argwhere(thin).tolist()))
    next_to = {place: _beside(place, places) for place in places}
    found = [chain for chain in chains(next_to) if len(chain) > narrow]
    return [smooth(chain) + 0.5 for chain in found]


def _beside(place: tuple[int, int], places: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours: diagonal ones only where no straight one leads to them."""
    y, x = place
    straight = [(y + a, x + b) for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    found = [other for other in straight if other in places]
    for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        if (y + a, x + b) in places and not {(y + a, x), (y, x + b)} & places:
            found.append((y + a, x + b))
    return found


def as_image(drawing: np.ndarray) -> Tensor:
    """Bytes (h, w) as (h, w, 3) float32 in 0..1."""
    grey = torch.from_numpy(drawing.copy()).float().div_(255)
    return grey[..., None].expand(-1, -1, 3)
