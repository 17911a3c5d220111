"""Sheets of paper in pixels, for pages that are printed."""

from __future__ import annotations

from typing import NamedTuple

AS_PICTURE = "as the picture"
MILLIMETRES = {"A4": (210.0, 297.0), "Letter": (215.9, 279.4)}  # ISO 216; ANSI/ASME Y14.1
MARGIN = 10.0  # millimetres: most printers leave 4 to 6 of them white
INCH = 25.4  # millimetres


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
