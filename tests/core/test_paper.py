"""Where a picture lies on a sheet: nothing is cut off, and nothing becomes smaller."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pack.core.paper import LARGEST, SHEETS, Paper, Placed, filling, whole

share = st.floats(0, 1)
sheets = st.sampled_from(sorted(SHEETS)).map(SHEETS.__getitem__)
pictures = st.tuples(st.integers(16, 768), st.integers(16, 768))
lines = st.floats(1, 60)
ends_of_a_box = st.tuples(share, share, share, share)
Box = tuple[float, float, float, float]
Size = tuple[int, int]


def boxed(picture: Size, ends: Box) -> Box:
    """A box in the picture, from shares of its sides."""
    xs, ys = (sorted(end * side for end in ends[i::2]) for i, side in enumerate(picture))
    return xs[0], ys[0], xs[1], ys[1]


def on_page(box: Box, place: Placed) -> Box:
    left, top, right, bottom = (side * place.scale for side in box)
    return left + place.left, top + place.top, right + place.left, bottom + place.top


@given(pictures, ends_of_a_box, sheets, lines)
@example((768, 768), (0.3, 0.1, 0.7, 0.9), SHEETS["A4 portrait, 150 dpi"], 60.0)
@example((768, 768), (0.1, 0.3, 0.9, 0.7), SHEETS["A4 portrait, 150 dpi"], 60.0)
def test_what_fills_a_sheet_is_within_its_margins_and_no_smaller(
    picture: Size, ends: Box, sheet: Paper, line: float
) -> None:
    box = boxed(picture, ends)
    stays, place = whole(picture, sheet), filling(box, picture, sheet, line)
    assert stays.scale <= place.scale <= LARGEST * stays.scale * (1 + 1e-9)
    around = line / 2 if place != stays else 0.0  # a whole picture's lines are cut at its edge
    left, top, right, bottom = on_page(box, place)
    assert min(left, top) - around >= sheet.margin - 1e-6
    assert right + around <= sheet.width - sheet.margin + 1e-6
    assert bottom + around <= sheet.height - sheet.margin + 1e-6


@given(pictures, ends_of_a_box, sheets, lines)
def test_a_box_away_from_the_edge_is_in_the_middle_and_as_large_as_it_can_be(
    picture: Size, ends: Box, sheet: Paper, line: float
) -> None:
    box = boxed(picture, ends)
    stays, place = whole(picture, sheet), filling(box, picture, sheet, line)
    assume(place != stays)
    left, top, right, bottom = on_page(box, place)
    assert left + right == pytest.approx(sheet.width) and top + bottom == pytest.approx(
        sheet.height
    )
    spans = (right - left + line, bottom - top + line)
    fills = max(span / inner for span, inner in zip(spans, sheet.inner, strict=True))
    # A box that is narrower than a pixel counts as one.
    tiny = min(box[2] - box[0], box[3] - box[1]) < 1
    assert tiny or place.scale >= LARGEST * stays.scale * 0.999 or fills >= 0.95


@given(pictures, sheets, lines, st.integers(0, 3))
def test_a_box_that_reaches_an_edge_leaves_the_picture_whole(
    picture: Size, sheet: Paper, line: float, side: int
) -> None:
    box = [picture[0] / 3, picture[1] / 3, picture[0] / 2, picture[1] / 2]
    box[side] = 0.0 if side < 2 else float(picture[side - 2])
    assert filling(tuple(box), picture, sheet, line) == whole(picture, sheet)


def test_a_tall_box_in_a_square_picture_fills_the_height_of_a_sheet() -> None:
    sheet = SHEETS["A4 portrait, 150 dpi"]
    place = filling((230, 60, 540, 710), (768, 768), sheet, 7)
    assert 650 * place.scale > 0.94 * sheet.inner[1]
    assert whole((768, 768), sheet) == Placed(
        sheet.inner[0] / 768, sheet.margin, pytest.approx(316, abs=1)
    )
