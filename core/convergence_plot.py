"""The picture of how a run converged: the change of each step, the threshold, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .early_exit import Saving

WIDTH, PLOT_HEIGHT, ROW = 640, 360, 30  # pixels
LEFT, RIGHT, TOP, BOTTOM = 92, 24, 44, 62  # pixels around the axes
TEXT, SMALL = 20, 17
GROUND, INK, FAINT, GRID = "#1B1D22", "#F2F2F2", "#A9B0BC", "#3A3F49"
CURVE, LIMIT, STOP = "#5BC0EB", "#FDB44B", "#FF6B6B"
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
MOST_DECADES, MOST_TICKS = 12, 10


class Plot(NamedTuple):
    """`changes` step by step, NaN where not measurable; `total` steps on the axis; `stopped`: after
    which step, or None; `table`: a row each."""

    changes: Sequence[float]
    threshold: float
    total: int
    stopped: int | None
    table: Sequence[Saving]


def draw(plot: Plot) -> Image.Image:
    """The picture: RGB."""
    height = PLOT_HEIGHT + (len(plot.table) + 2) * ROW
    image = Image.new("RGB", (WIDTH, height), GROUND)
    axes = _Axes(image, plot)
    axes.draw_grid()
    axes.draw_lines()
    _draw_table(ImageDraw.Draw(image), plot.table)
    return image


def decades(changes: Sequence[float], threshold: float) -> tuple[int, int]:
    """The powers of ten between which all that can be drawn on a log scale lies."""
    shown = [value for value in (*changes, threshold) if math.isfinite(value) and value > 0]
    if not shown:
        return -1, 0
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)
    return max(low, high - MOST_DECADES), high


class _Axes:
    """Draws in data coordinates: steps from 1, and changes on a log scale."""

    def __init__(self, image: Image.Image, plot: Plot) -> None:
        self.pen, self.plot = ImageDraw.Draw(image), plot
        self.low, self.high = decades(plot.changes, plot.threshold)

    def x(self, step: float) -> float:
        """Pixels."""
        share = (step - 1) / max(self.plot.total - 1, 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, change: float) -> float:
        """Pixels; what lies under the axis is drawn on it."""
        power = max(math.log10(change), self.low) if change > 0 else self.low
        share = (power - self.low) / (self.high - self.low)
        return PLOT_HEIGHT - BOTTOM - share * (PLOT_HEIGHT - BOTTOM - TOP)

    def draw_grid(self) -> None:
        """A line for each power of ten, ticks for steps, and what the axes are."""
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            self.pen.line((LEFT, y, WIDTH - RIGHT, y), GRID, 1)
            self._text((LEFT - 10, y), f"1e{power:+03d}", "rm", FAINT)
        bottom, last = PLOT_HEIGHT - BOTTOM, self.plot.total
        every = next((t for t in TICKS if last / t <= MOST_TICKS), last)
        for step in sorted({1, *range(every, last + 1, every)}):
            self.pen.line((self.x(step), bottom, self.x(step), bottom + 5), FAINT, 1)
            self._text((self.x(step), bottom + 8), str(step), "ma", FAINT)
        self._text((WIDTH - RIGHT, PLOT_HEIGHT - 8), "step", "rd", FAINT)
        self._text((12, 10), "change of the prediction per unit of sigma", "la", INK)

    def draw_lines(self) -> None:
        """Curve, threshold, stop."""
        plot, right, bottom = self.plot, WIDTH - RIGHT, PLOT_HEIGHT - BOTTOM
        if plot.threshold > 0:
            y = self.y(plot.threshold)
            self.pen.line((LEFT, y, right, y), LIMIT, 2)
            self._text((right, y - 3), f"threshold {plot.threshold:g}", "rd", LIMIT)
        for piece in _pieces(plot.changes):
            points = [(self.x(step), self.y(change)) for step, change in piece]
            if len(points) > 1:
                self.pen.line(points, CURVE, 3, joint="curve")
            for x, y in points:
                self.pen.ellipse((x - 3, y - 3, x + 3, y + 3), CURVE)
        if plot.stopped is not None:
            x = self.x(plot.stopped)
            self.pen.line((x, TOP, x, bottom), STOP, 2)
            side = ("ra", -6) if x > WIDTH / 2 else ("la", 6)
            self._text((x + side[1], TOP), f"stopped after {plot.stopped}", side[0], STOP)

    def _text(self, place: tuple[float, float], text: str, anchor: str, fill: str) -> None:
        self.pen.text(place, text, fill, _font(SMALL), anchor=anchor)


def _pieces(changes: Sequence[float]) -> list[list[tuple[int, float]]]:
    """The measured points as (step, change), apart where one in between is not measurable."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, change in enumerate(changes, 1):
        if math.isfinite(change):
            pieces[-1].append((step, change))
        else:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _draw_table(pen: ImageDraw.ImageDraw, table: Sequence[Saving]) -> None:
    """Thresholds, and what a run with each would have saved."""
    columns, y = (LEFT + 60, LEFT + 260, LEFT + 460), PLOT_HEIGHT + ROW // 2
    heads = ("threshold", "stops after", "steps saved")
    rows = [(heads, FAINT), *((_row(saving), INK) for saving in table)]
    for cells, fill in rows:
        for x, cell in zip(columns, cells, strict=True):
            pen.text((x, y), cell, fill, _font(TEXT), anchor="rm")
        y += ROW
    pen.line((12, PLOT_HEIGHT + ROW - 1, WIDTH - 12, PLOT_HEIGHT + ROW - 1), GRID, 1)


def _row(saving: Saving) -> tuple[str, str, str]:
    """Where the run had stopped before, nobody knows."""
    if saving.steps is None:
        return f"{saving.threshold:g}", "not known", "not known"
    if saving.saved == 0:
        return f"{saving.threshold:g}", "no stop", "0"
    saved = "not known" if saving.saved is None else str(saving.saved)
    return f"{saving.threshold:g}", f"step {saving.steps}", saved


_fonts: dict[int, Any] = {}


def _font(size: int) -> Any:
    return _fonts.setdefault(size, _fonts.get(size) or ImageFont.load_default(size))
