"""Stickers: the animal and nothing else, and a sheet on which none touches another."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.cut_out import NOT_PLAIN, NOTHING, Sticker, cut_out
from pack.core.stickers import (
    GAP,
    USUAL,
    Layout,
    Place,
    drawn_on,
    grid,
    places,
    single,
    turned_box,
)
from pack.demo.animals import Scene, draw
from pack.tests.examples import examples
from PIL import Image, ImageDraw
from torch import Tensor

BEAR = Scene("bear", "blue", "none", "standing", "plain", jitter=3)
BORDER = 30.0


def picture(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def ring(ground: tuple[int, int, int] = (235, 230, 220)) -> Tensor:
    """A thick blue ring, its hole as large as half of it."""
    image = Image.new("RGB", (800, 800), ground)
    pen = ImageDraw.Draw(image)
    pen.ellipse([200, 200, 600, 600], fill=(40, 80, 200))
    pen.ellipse([300, 300, 500, 500], fill=ground)
    return picture(image.resize((400, 400), Image.Resampling.LANCZOS))


def speck() -> Tensor:
    """A small blue square on white."""
    image = torch.ones(256, 256, 3)
    image[120:140, 120:140] = torch.tensor([0.1, 0.2, 0.8])
    return image


def inside(sticker: Sticker) -> np.ndarray:
    """Where the animal is, in the working copy."""
    pad = sticker.pad
    return sticker.shape[pad:-pad, pad:-pad] < 0


@pytest.fixture(scope="module")
def bear() -> Sticker:
    return cut_out(picture(draw(BEAR, 256, 256)), BORDER)


# ------------------------------------------------------------------------------ what is cut
def test_the_animal_is_cut_as_the_renderer_drew_it(bear: Sticker) -> None:
    assert not bear.whole
    drawn = np.asarray(draw(BEAR, 768, 768)).astype(int)
    animal = abs(drawn - drawn[2, 2]).max(-1) > 20
    found = inside(bear)
    assert (found & animal).sum() / (found | animal).sum() > 0.95
    assert bear.share == pytest.approx(animal.mean(), rel=0.05)


def test_a_hole_that_shows_the_background_is_no_animal() -> None:
    sticker = cut_out(ring(), BORDER)
    assert not sticker.whole and not inside(sticker)[384, 384]
    colours, mask = single(sticker, sticker.box)
    middle = tuple(side // 2 for side in mask.shape)
    assert (colours[middle] == 1).all() and mask[middle] == 0  # white, and part of the sticker


def test_a_white_thing_in_an_animal_stays() -> None:
    image = ring().clone()
    image[180:220, 105:145] = torch.tensor([1.0, 0.95, 0.6])
    assert inside(cut_out(image, BORDER))[384, 240]


def test_gradients_and_shadows_are_background() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 400), torch.linspace(0, 1, 400), indexing="ij")
    shade = 0.8 + 0.1 * x + 0.1 * y
    shade *= 1 - 0.3 * torch.exp(-(((x - 0.5) / 0.3) ** 2 + ((y - 0.8) / 0.12) ** 2))
    ground = ring()[0, 0]
    blue = (ring()[..., 2:] - ring()[..., :1] > 0.2).float()
    soft = torch.lerp(shade[..., None] * ground, ring(), blue)
    found = cut_out(soft, BORDER)
    assert not found.whole and found.share == pytest.approx(
        math.pi * (0.25**2 - 0.125**2), rel=0.06
    )


def test_no_plain_background_keeps_the_picture_with_round_corners() -> None:
    scene = Scene("bear", "blue", "none", "standing", "room", jitter=3)
    sticker = cut_out(picture(draw(scene, 256, 256)), BORDER)
    assert sticker.whole == NOT_PLAIN and sticker.share == 1
    found = inside(sticker)
    assert found[384, 2] and found[2, 384] and found[766, 384] and not found[2, 2]
    for image in (torch.full((64, 64, 3), 0.5), speck()):  # all of one colour; below 1 %
        assert cut_out(image, BORDER).whole == NOTHING


def test_a_picture_with_alpha_is_cut_by_it() -> None:
    alpha = torch.zeros(256, 256, 1)
    alpha[64:192, 32:224] = 1
    noise = torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(0))
    sticker = cut_out(torch.cat([noise, alpha], -1), BORDER)
    assert not sticker.whole and sticker.share == pytest.approx(0.375, rel=0.02)


def test_what_is_as_fine_as_a_hair_stays_whole() -> None:
    alpha = torch.zeros(768, 768, 1)
    alpha[::60] = 1
    sticker = cut_out(torch.cat([torch.full((768, 768, 3), 0.5), alpha], -1), 0.0)
    assert sticker.whole == NOTHING and len(sticker.outline) > 0


def test_a_single_sticker_has_colours_a_white_edge_and_nothing_around(bear: Sticker) -> None:
    colours, mask = single(bear, bear.box)
    assert colours.shape == (*mask.shape, 3) and mask.min() >= 0 and mask.max() == 1
    assert (mask[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    white = (colours.min(-1).values > 0.99) & (mask == 0)
    assert white.float().mean() > 0.1
    # The white edge is as wide as asked for, left of the body where it is widest.
    row = mask.shape[0] * 3 // 4
    edge = int((mask[row] < 0.5).nonzero()[0])
    body = int(((colours[row] - 1).abs().amax(-1) > 0.1).nonzero()[0])
    assert body - edge == pytest.approx(BORDER / 1000 * 256, abs=2.5)


# ------------------------------------------------------------------------------ the sheet
Points = list[tuple[float, float]]


def outline(*box: float) -> Tensor:
    """Of a sticker that fills its box."""
    half = torch.tensor([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=torch.float64) / 2
    return half * torch.tensor(box, dtype=torch.float64)


def placed(place: Place, shape: Tensor) -> Points:
    """The points of an outline as they lie on the sheet."""
    angle = math.radians(place.angle)
    return [
        (
            place.x + (x * math.cos(angle) - y * math.sin(angle)) * place.scale,
            place.y + (x * math.sin(angle) + y * math.cos(angle)) * place.scale,
        )
        for x, y in shape.tolist()
    ]


def apart(one: Points, other: Points) -> bool:
    """Whether a line parts two convex shapes: one along a side of either of them."""
    for shape in (one, other):
        for (ax, ay), (bx, by) in zip(shape, shape[1:] + shape[:1], strict=True):
            across = (by - ay, ax - bx)
            spans = [[across[0] * x + across[1] * y for x, y in s] for s in (one, other)]
            if max(spans[0]) <= min(spans[1]) or max(spans[1]) <= min(spans[0]):
                return True
    return False


sides = st.floats(5, 900)
boxes_of_stickers = st.lists(st.tuples(sides, sides), min_size=1, max_size=5)
areas = st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(50, 4000), st.floats(50, 4000))
Area = tuple[float, float, float, float]


def layouts(columns: st.SearchStrategy[int], rows: st.SearchStrategy[int]) -> Any:
    return st.builds(
        Layout,
        columns=columns,
        rows=rows,
        vary=st.floats(0, 0.6),
        turn=st.floats(0, 45),
        seed=st.integers(0, 2**32 - 1),
    )


def halves(box: tuple[float, float]) -> Tensor:
    """Of a sticker that fills only three corners of its box."""
    return outline(*box)[:3]


@given(boxes_of_stickers, areas, layouts(st.integers(0, 6), st.integers(0, 6)), st.booleans())
@settings(max_examples=examples(40))
def test_no_two_stickers_touch_and_none_leaves_the_sheet(
    boxes: list[tuple[float, float]], area: Area, layout: Layout, corner: bool
) -> None:
    outlines = [halves(box) if corner else outline(*box) for box in boxes]
    found = places(outlines, area, layout)
    assert found == places(outlines, area, layout)
    columns, rows = grid(outlines, area[2:], layout)
    assert len(found) == columns * rows
    assert (layout.columns or columns, layout.rows or rows) == (columns, rows)
    shapes = [placed(place, outlines[place.number]) for place in found]
    left, top, width, height = area
    for x, y in (point for shape in shapes for point in shape):
        assert left <= x <= left + width and top <= y <= top + height
    near = combinations(shapes[: 4 * columns], 2)  # of all it would take long
    assert all(apart(one, other) for one, other in near)


def former(
    boxes: list[tuple[float, float]], area: Area, layout: Layout, cells: tuple[int, int]
) -> list[float]:
    """How large stickers are in a grid that knows nothing of their shape, one after another."""
    rng = random.Random(layout.seed)
    cell = (area[2] / cells[0], area[3] / cells[1])
    scales = []
    for number in range(cells[0] * cells[1]):
        angle, smaller = rng.uniform(-layout.turn, layout.turn), 1 - rng.uniform(0, layout.vary)
        rng.random(), rng.random()
        width, height = turned_box(*boxes[number % len(boxes)], angle)
        gap = GAP * min(cell)
        scales.append(min((cell[0] - gap) / width, (cell[1] - gap) / height) * smaller)
    return scales


@given(
    st.tuples(sides, sides), areas, layouts(st.integers(1, 6), st.just(0)), st.sampled_from((3, 4))
)
@settings(max_examples=examples(60))
def test_stickers_are_as_large_as_in_square_cells_at_least(
    box: tuple[float, float], area: Area, layout: Layout, points: int
) -> None:
    found = places([outline(*box)[:points]], area, layout)
    square = max(1, round(area[3] / (area[2] / layout.columns)))
    scales = former([box], area, layout, (layout.columns, square))
    if points == 4:
        # Those that both sheets have are turned by the same angles.
        assert all(p.scale >= s * (1 - 1e-9) for p, s in zip(found, scales, strict=False))
    given = places([outline(*box)[:points]], area, layout._replace(rows=square))
    assert all(p.scale >= s * (1 - 1e-9) for p, s in zip(given, scales, strict=True))


@given(st.tuples(sides, sides), areas, st.floats(0, 0.6))
@settings(max_examples=examples(40))
def test_no_grid_has_as_many_upright_stickers_that_are_larger(
    box: tuple[float, float], area: Area, vary: float
) -> None:
    found = places([outline(*box)], area, Layout(0, 0, vary, 0.0))
    assert len(found) >= USUAL
    for columns in range(1, 21):
        cells = (columns, math.ceil(USUAL / columns))
        other = former([box], area, Layout(*cells, vary, 0.0), cells)
        assert found[0].scale >= other[0] * (1 - 1e-9)


def test_what_is_not_like_its_box_when_it_is_turned_stays_in_its_cell() -> None:
    corner = halves((100, 100))
    for seed in range(20):
        (place,) = places([corner], (0, 0, 300, 300), Layout(1, 1, 0.0, 45.0, seed))
        points = placed(place, corner)
        assert all(0 <= side <= 300 for point in points for side in point)
        # As large as it can be: it spans the cell in one direction.
        spans = [max(ends) - min(ends) for ends in zip(*points, strict=True)]
        assert max(spans) == pytest.approx(300 * (1 - GAP))


def test_twelve_tall_animals_stand_in_tall_cells_and_wide_ones_in_wide_cells() -> None:
    paper = (1122, 1636)
    assert grid([outline(330, 740)], paper, Layout(0, 0)) == (4, 3)
    assert grid([outline(740, 330)], paper, Layout(0, 0)) == (2, 6)
    assert grid([outline(740, 740)], paper, Layout(0, 0)) == (3, 4)
    assert grid([outline(330, 740)], paper, Layout(3, 0)) == (3, 2)
    assert grid([outline(330, 740)], paper, Layout(0, 2)) == (2, 2)


@pytest.mark.parametrize("count", [1, 13, 60, 400, 401])
def test_each_of_many_pictures_has_a_place_as_far_as_there_are_places(count: int) -> None:
    found = places([outline(3, 4)] * count, (0, 0, 300, 400), Layout(0, 0))
    assert {place.number for place in found} == set(range(min(count, 400)))


@pytest.mark.parametrize("asked", [(3, 0), (0, 4)])
@pytest.mark.parametrize(("width", "height"), [(330, 740), (740, 200)])
def test_no_picture_is_left_out_that_has_a_place_in_square_cells(asked, width, height) -> None:
    shapes = [outline(width, height)] * 9
    columns, rows = grid(shapes, (1122, 1636), Layout(*asked))
    assert columns * rows >= len(shapes)


def test_an_outline_holds_all_of_a_sticker_and_no_more_than_its_box(bear: Sticker) -> None:
    left, top, right, bottom = bear.box
    points = bear.outline
    half = torch.tensor([right - left, bottom - top], dtype=torch.float64) / 2
    torch.testing.assert_close(points.amin(0), -half)
    torch.testing.assert_close(points.amax(0), half)
    rows, columns = np.nonzero(bear.edge < 1)
    for angle in (7, 30, 45, -45):
        sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        middles = torch.tensor(columns + 0.5 - (left + right) / 2) * cosine
        middles -= torch.tensor(rows + 0.5 - (top + bottom) / 2) * sine
        reach = points[:, 0] * cosine - points[:, 1] * sine
        assert 0 <= float(middles.min() - reach.min()) <= 1
        assert 0 <= float(reach.max() - middles.max()) <= 1


def test_animals_take_turns_and_no_column_has_one_alone() -> None:
    numbers = [p.number for p in places([outline(1, 1)] * 3, (0, 0, 300, 400), Layout(3, 4))]
    assert sorted(numbers) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len(set(numbers[column::3])) == 3 for column in range(3))


def test_another_seed_gives_another_sheet() -> None:
    area = (0, 0, 300, 400)
    first, second = (places([outline(1, 1)], area, Layout(2, 2, seed=seed)) for seed in (0, 1))
    assert first != second


def test_a_sticker_is_drawn_where_its_place_is_and_nowhere_else(bear: Sticker) -> None:
    left, top, right, bottom = bear.box
    place = Place(0, 150.0, 120.0, 0.25, 20.0)
    sheet = torch.full((300, 300, 3), 0.5)
    drawn_on(sheet, bear, place)
    changed = (sheet != 0.5).any(-1)
    width, height = turned_box((right - left) * 0.25, (bottom - top) * 0.25, 20.0)
    rows, columns = (changed.any(axis).nonzero() for axis in (1, 0))
    assert abs(float(rows.float().mean()) - 120) < 0.2 * height
    assert rows.max() - rows.min() <= height + 2 and columns.max() - columns.min() <= width + 2
    assert (sheet == 1).all(-1).any() and ((sheet[..., 2] - sheet[..., 0]) > 0.3).any()


def test_what_cannot_be_used_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="columns and rows are 21 and 3"):
        Layout(21, 3).check()
    with pytest.raises(ValueError, match="size_variation and turn are 25 and 90"):
        Layout(1, 1, 0.25, 90).check()
