"""The picture of a report: for each device a bar to scale, its legend, and the findings.

800 pixels wide, to be read at half the size, on a node. English only: the font has no other signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .memory_text import amount, pages_line

WIDTH, MARGIN, BAR, ROW = 800, 28, 64, 34
TITLE, TEXT, SMALL = 30, 25, 22
MOST_ROWS = 9  # of a legend; the smallest parts share one row
LEAST_SHARE = 0.012  # of the total: what is smaller is grouped, since nobody sees it in a bar
MOST_FINDINGS = 4
# Okabe and Ito: apart for all kinds of colour blindness (https://jfly.uni-koeln.de/color/).
MODEL_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800")
OTHER_COLOURS = {
    "other_processes": "#7A7A7A",
    "rest": "#7A7A7A",
    "others_at_start": "#7A7A7A",
    "unknown": "#7A7A7A",
    "process": "#A58F7A",
    "context": "#9C9CB4",
    "allocator_live": "#3E7C7B",
    "allocator_split": "#C9B458",
    "allocator_cache": "#8FB3B2",
    "pack": "#7C5BB0",
    "stream_buffers": "#5D6FB8",
    "cast_buffers": "#5D6FB8",
    "reference_cache": "#A64D79",
    "outputs": "#B07C5B",
    "unexplained": "#D64545",
    "smaller": "#8C8C8C",
}
SEVERITIES = {"problem": "#D64545", "warning": "#E69F00", "info": "#0072B2"}


class Theme(NamedTuple):
    """Colours that the two themes differ in."""

    ground: str
    text: str
    faint: str
    line: str


THEMES = {
    "dark": Theme("#1F1F1F", "#F2F2F2", "#B0B0B0", "#6A6A6A"),
    "light": Theme("#FFFFFF", "#1A1A1A", "#555555", "#9A9A9A"),
}


class Piece(NamedTuple):
    """What is drawn of one part: `bytes` None has no place in the bar."""

    id: str
    label: str
    bytes: int | None


def draw(told: Mapping[str, Any], theme: str = "dark") -> Image.Image:
    """Draw a report (see core/memory_report.py). `theme` is dark or light."""
    colours = _colours(told)
    sheet = _Sheet(THEMES[theme], Image.new("RGB", (WIDTH, 16)))  # to measure texts
    for final in (False, True):
        sheet.y = MARGIN
        for device in told["devices"]:
            _draw_device(sheet, device, colours)
        _draw_findings(sheet, told["findings"])
        if not final:
            size = (WIDTH, sheet.y + MARGIN // 2)
            sheet = _Sheet(THEMES[theme], Image.new("RGB", size, THEMES[theme].ground))
    return sheet.image


def pieces(device: Mapping[str, Any]) -> list[Piece]:
    """The parts of a device as they are drawn: the smallest in one piece, free and rest last."""
    every = [Piece(part["id"], part["label"], part["bytes"]) for part in device["parts"]]
    last = [p for p in every if p.id in ("unexplained", "free")]
    rest = [p for p in every if p not in last]
    by_size = sorted(rest, key=lambda p: -(p.bytes or 0))
    least = LEAST_SHARE * (device["total_bytes"] or 0)
    large = [p for p in by_size if p.bytes is None or p.bytes >= least][: MOST_ROWS - 3]
    small = [p for p in by_size if p not in large]
    if len(small) > 1:
        together = sum(p.bytes or 0 for p in small)
        return [
            *(p for p in rest if p in large),
            Piece("smaller", f"{len(small)} smaller", together),
            *last,
        ]
    return [*rest, *last]


def _colours(told: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each part, the same on every device."""
    found = dict(OTHER_COLOURS)
    for device in told["devices"]:
        for piece in pieces(device):
            if piece.id not in found and piece.id != "free":
                found[piece.id] = MODEL_COLOURS[
                    (len(found) - len(OTHER_COLOURS)) % len(MODEL_COLOURS)
                ]
    return found


class _Sheet:
    """A picture and the line that is written next."""

    def __init__(self, theme: Theme, image: Image.Image) -> None:
        self.theme, self.image, self.y = theme, image, 0
        self.pen = ImageDraw.Draw(image)

    def write(self, x: float, text: str, size: int, fill: str, right: bool = False) -> None:
        """Write at the height `y`; `x` is the left or the right end."""
        self.pen.text((x, self.y), text, fill, _font(size), anchor="ra" if right else "la")

    def fitting(self, text: str, size: int, width: float) -> str:
        """As much of a text as has room, with dots in its middle: both ends of a name matter."""
        text = " ".join(text.split())  # a file's name may hold a line break
        if self.pen.textlength(text, _font(size)) <= width:
            return text
        for kept in range(len(text) - 1, 1, -1):
            shorter = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
            if self.pen.textlength(shorter, _font(size)) <= width:
                return shorter
        return ""

    def wrapped(self, text: str, size: int, width: float) -> Iterator[str]:
        """Lines of at most this width."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and self.pen.textlength(longer, _font(size)) > width:
                yield line
                longer = self.fitting(word, size, width)
            line = longer
        yield line


_fonts: dict[int, Any] = {}


def _font(size: int) -> Any:
    return _fonts.setdefault(size, _fonts.get(size) or ImageFont.load_default(size))


def _draw_device(sheet: _Sheet, device: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    theme, right = sheet.theme, WIDTH - MARGIN
    drawn = pieces(device)
    size = f"{amount(device['total_bytes'])}"
    room = right - MARGIN - sheet.pen.textlength(size, _font(TITLE)) - 20
    name = device["name"] if device["kind"] == "cpu" else f"{device['device']}  {device['name']}"
    sheet.write(MARGIN, sheet.fitting(name, TITLE, room), TITLE, theme.text)
    sheet.write(right, size, TITLE, theme.text, right=True)
    sheet.y += TITLE + 14
    _draw_bar(sheet, device, drawn, colours)
    sheet.y += BAR + 16
    for piece in drawn:
        _draw_row(sheet, piece, colours)
    if device.get("dynamic_vram_bytes"):
        sheet.write(MARGIN + 34, pages_line(device), SMALL, theme.faint)
        sheet.y += ROW
    sheet.y += 20


def _draw_bar(
    sheet: _Sheet, device: Mapping[str, Any], drawn: Sequence[Piece], colours: Mapping[str, str]
) -> None:
    """Every piece as wide as its share. If pieces are more than the whole, the bar is theirs."""
    held = [(p, p.bytes) for p in drawn if p.bytes is not None and p.bytes > 0]
    whole = max(device["total_bytes"] or 0, sum(size for _, size in held), 1)
    scale, before = (WIDTH - 2 * MARGIN) / whole, 0
    top, bottom = sheet.y, sheet.y + BAR
    for piece, size in held:
        left, right = MARGIN + before * scale, MARGIN + (before + size) * scale
        before += size
        if piece.id == "free" or right - left < 1:
            continue
        box = (round(left), top, round(right) - 1, bottom)
        sheet.pen.rectangle(box, colours[piece.id], sheet.theme.ground)
        if piece.id == "unexplained":
            _hatch(sheet, box)
        _name_in_bar(sheet, piece, box, colours[piece.id])
    outline = (MARGIN, top, WIDTH - MARGIN, bottom)
    sheet.pen.rectangle(outline, None, sheet.theme.line, 2)


def _hatch(sheet: _Sheet, box: tuple[int, int, int, int]) -> None:
    """Stripes, so that no colour has to be told apart."""
    left, top, right, bottom = box
    height = bottom - top
    for start in range(left - height, right, 14 if height == BAR else 9):
        x0, x1 = max(start, left), min(start + height, right)
        if x1 > x0:
            line = (x0, top + (x0 - start), x1, top + (x1 - start))
            sheet.pen.line(line, sheet.theme.ground, 3)


def _name_in_bar(sheet: _Sheet, piece: Piece, box: tuple[int, int, int, int], fill: str) -> None:
    """The size in a piece that has room for it, in black or white."""
    size, room = amount(piece.bytes), box[2] - box[0] - 12
    if piece.id == "unexplained" or sheet.pen.textlength(size, _font(SMALL)) > room:
        return
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else "#FFFFFF"
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    sheet.pen.text(middle, size, ink, _font(SMALL), anchor="mm")


def _draw_row(sheet: _Sheet, piece: Piece, colours: Mapping[str, str]) -> None:
    theme, right = sheet.theme, WIDTH - MARGIN
    box = (MARGIN, sheet.y + 3, MARGIN + 22, sheet.y + 25)
    fill = theme.ground if piece.id == "free" else colours[piece.id]
    sheet.pen.rectangle(box, fill, theme.line, 2)
    if piece.id == "unexplained":
        _hatch(sheet, box)
    size = amount(piece.bytes)
    room = right - MARGIN - 36 - sheet.pen.textlength(size, _font(TEXT)) - 20
    sheet.write(MARGIN + 36, sheet.fitting(piece.label, TEXT, room), TEXT, theme.text)
    sheet.write(right, size, TEXT, theme.text, right=True)
    sheet.y += ROW


def _draw_findings(sheet: _Sheet, findings: Sequence[Mapping[str, Any]]) -> None:
    if not findings:
        sheet.write(MARGIN, "Nothing stands out.", TEXT, sheet.theme.faint)
        sheet.y += ROW
        return
    for finding in findings[:MOST_FINDINGS]:
        mark = (MARGIN, sheet.y + 2, MARGIN + 6, sheet.y + 26)
        sheet.pen.rectangle(mark, SEVERITIES[finding["severity"]])
        words = ((finding["text"], sheet.theme.text), (finding["action"], sheet.theme.faint))
        for text, fill in words:
            for line in sheet.wrapped(text, TEXT, WIDTH - 2 * MARGIN - 24):
                sheet.write(MARGIN + 24, line, TEXT, fill)
                sheet.y += ROW - 4
        sheet.y += 12
    more = len(findings) - MOST_FINDINGS
    if more > 0:
        sheet.write(MARGIN, f"{more} more in the text.", TEXT, sheet.theme.faint)
        sheet.y += ROW
