"""Sheets of paper in pixels, for pages that are printed, and where a picture lies on them."""

from __future__ import annotations

from typing import NamedTuple

AS_PICTURE = "as the picture"
MILLIMETRES = {"A4": (210.0, 297.0), "Letter": (215.9, 279.4)}  # ISO 216; ANSI/ASME Y14.1
MARGIN = 10.0  # millimetres: most printers leave 4 to 6 of them white
INCH = 25.4  # millimetres
AIR = 0.02  # of what a sheet holds that stays free on each side of what fills it
LARGEST = 4.0  # times its size in the whole picture: more would show how coarsely it was found


class Paper(NamedTuple):
    """Pixels: the sheet, and the margin that stays white along each side."""

    width: int
    height: int
    margin: int

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height within the margins."""
        return self.width - 2 * self.margin, self.height - 2 * self.margin


def _sheet(name: str, portrait: bool, dpi: int) -> Paper:
    width, height = (round(side / INCH * dpi) for side in MILLIMETRES[name])
    margin = round(MARGIN / INCH * dpi)
    return Paper(width, height, margin) if portrait else Paper(height, width, margin)


SHEETS: dict[str, Paper] = {
    f"{name} {way}, {dpi} dpi": _sheet(name, way == "portrait", dpi)
    for name in MILLIMETRES
    for way in ("portrait", "landscape")
    for dpi in (150, 300)
}


class Placed(NamedTuple):
    """Where a picture lies on a page, in the page's pixels: (x, y) is at left + x * scale, ..."""

    scale: float
    left: float
    top: float


def whole(picture: tuple[float, float], sheet: Paper) -> Placed:
    """A picture of (width, height) as large as the margins allow, in the middle."""
    scale = min(inner / side for inner, side in zip(sheet.inner, picture, strict=True))
    return _centred((0.0, 0.0, *picture), scale, sheet)


def filling(
    box: tuple[float, float, float, float],
    picture: tuple[float, float],
    sheet: Paper,
    line: float,
) -> Placed:
    """The same, but what fills the sheet is a box (left, top, right, bottom) in the picture.

    Around it are lines of `line` pixels of the sheet, in every size. The picture stays whole if the
    box reaches its edge, to a pixel, or would not become larger.
    """
    stays = whole(picture, sheet)
    left, top, right, bottom = box
    if min(left, top) < 1 or right > picture[0] - 1 or bottom > picture[1] - 1:
        return stays
    sides = (max(right - left, 1), max(bottom - top, 1))
    room = ((1 - 2 * AIR) * inner - line for inner in sheet.inner)
    fits = min(free / side for free, side in zip(room, sides, strict=True))
    if fits <= stays.scale:
        return stays
    return _centred(box, min(fits, LARGEST * stays.scale), sheet)


def _centred(box: tuple[float, float, float, float], scale: float, sheet: Paper) -> Placed:
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    return Placed(scale, sheet.width / 2 - x * scale, sheet.height / 2 - y * scale)
