"""Stickers: the animal and nothing else, and a sheet on which none touches another."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.cut_out import NOT_PLAIN, NOTHING, Sticker, cut_out
from pack.core.stickers import Layout, Place, drawn_on, places, single, turned_box
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
def corners(place: Place, box: tuple[float, float]) -> list[tuple[float, float]]:
    """Of a turned box."""
    angle = math.radians(place.angle)
    found = []
    for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        x, y = a * box[0] / 2 * place.scale, b * box[1] / 2 * place.scale
        found.append(
            (
                place.x + x * math.cos(angle) - y * math.sin(angle),
                place.y + x * math.sin(angle) + y * math.cos(angle),
            )
        )
    return found


def apart(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """Whether a line parts two convex shapes: one along a side of either of them."""
    for shape in (one, other):
        for (ax, ay), (bx, by) in zip(shape, shape[1:] + shape[:1], strict=True):
            across = (by - ay, ax - bx)
            spans = [[across[0] * x + across[1] * y for x, y in s] for s in (one, other)]
            if max(spans[0]) <= min(spans[1]) or max(spans[1]) <= min(spans[0]):
                return True
    return False


sides = st.floats(5, 900)


@given(
    boxes=st.lists(st.tuples(sides, sides), min_size=1, max_size=5),
    area=st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(50, 4000), st.floats(50, 4000)),
    layout=st.builds(
        Layout,
        columns=st.integers(1, 6),
        rows=st.integers(0, 6),
        vary=st.floats(0, 0.6),
        turn=st.floats(0, 45),
        seed=st.integers(0, 2**32 - 1),
    ),
)
@settings(max_examples=examples(40))
def test_no_two_stickers_touch_and_none_leaves_the_sheet(
    boxes: list[tuple[float, float]], area: tuple[float, float, float, float], layout: Layout
) -> None:
    found = places(boxes, area, layout)
    assert found == places(boxes, area, layout)
    assert len(found) == layout.columns * (layout.rows or len(found) // layout.columns)
    shapes = [corners(place, boxes[place.number]) for place in found]
    assert all(apart(one, other) for one, other in combinations(shapes, 2))
    left, top, width, height = area
    for x, y in (corner for shape in shapes for corner in shape):
        assert left <= x <= left + width and top <= y <= top + height
    for place, shape in zip(found, shapes, strict=True):
        xs, ys = zip(*shape, strict=True)
        assert (max(xs) - min(xs), max(ys) - min(ys)) == pytest.approx(
            tuple(side * place.scale for side in turned_box(*boxes[place.number], place.angle)),
            rel=1e-6,
        )


def test_animals_take_turns_and_no_column_has_one_alone() -> None:
    numbers = [p.number for p in places([(1, 1)] * 3, (0, 0, 300, 400), Layout(3, 4))]
    assert sorted(numbers) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len(set(numbers[column::3])) == 3 for column in range(3))


def test_another_seed_gives_another_sheet() -> None:
    area = (0, 0, 300, 400)
    first, second = (places([(1, 1)], area, Layout(2, 2, seed=seed)) for seed in (0, 1))
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
    with pytest.raises(ValueError, match="columns and rows are 0 and 3"):
        Layout(0, 3).check()
    with pytest.raises(ValueError, match="size_variation and turn are 25 and 90"):
        Layout(1, 1, 0.25, 90).check()
