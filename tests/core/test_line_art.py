"""Colouring pages: closed lines of one width where areas end, and nothing elsewhere."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.line_art import Page, PageSettings, as_image, colouring_page, size_of_page
from pack.core.outlines import borders, chains, enlarged, smooth
from pack.core.paper import SHEETS
from pack.demo.animals import Scene, draw
from pack.tests.examples import examples
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

BEAR = Scene("bear", "brown", "hat", "standing", "plain", jitter=3)
SKIN, INK = (240, 170, 90), (20, 20, 20)
LINE = 6.0


def picture(image: Image.Image) -> Tensor:
    """As a node gets it: (H, W, C)."""
    return torch.from_numpy(np.array(image)).float() / 255


def bear(size: int = 512) -> Tensor:
    return picture(draw(BEAR, size, size))


def page(image: Tensor, **more: Any) -> np.ndarray:
    return colouring_page(image, PageSettings(**more)).drawing


def areas(drawing: np.ndarray) -> int:
    """White places that black lines close."""
    return ndimage.label(drawing > 127)[1]


def off(drawing: np.ndarray, other: np.ndarray) -> float:
    """How far the black of one is from the black of the other, at most, in pixels."""
    away = [ndimage.distance_transform_edt(d > 127) for d in (drawing, other)]
    return max(away[0][other < 128].max(), away[1][drawing < 128].max())


def face(outline: int = 0) -> Image.Image:
    """A head with an ear, drawn four times as large."""
    image = Image.new("RGB", (2048, 2048), "white")
    pen = ImageDraw.Draw(image)
    border = {"outline": INK, "width": outline} if outline else {}
    pen.ellipse([300, 300, 800, 800], fill=(230, 120, 60), **border)
    pen.ellipse([400, 400, 1700, 1700], fill=SKIN, **border)
    return image


@functools.cache
def bear_page() -> Page:
    return colouring_page(bear(), PageSettings())


@functools.cache
def face_page() -> np.ndarray:
    return page(small(face()))


def small(image: Image.Image) -> Tensor:
    return picture(image.resize((512, 512), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------ what it draws
def test_a_bear_becomes_closed_lines_without_grey_or_specks() -> None:
    found = bear_page()
    drawing = found.drawing
    assert drawing.shape == (512, 512) and drawing.dtype == np.uint8
    assert drawing.min() == 0 and drawing.max() == 255
    assert ((drawing > 40) & (drawing < 215)).mean() < 0.04  # the soft edges of lines alone
    assert 10 <= areas(drawing) <= found.areas
    parts, count = ndimage.label(drawing < 128)
    assert np.bincount(parts.ravel())[1:].min() > 20 and count < 15


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_one_colour_gives_a_white_page(colour: float) -> None:
    found = colouring_page(torch.full((64, 96, 3), colour), PageSettings())
    assert found.areas == 1 and (found.drawing == 255).all()


def test_a_soft_shade_has_no_line_and_its_outline_has_one() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 400), torch.linspace(-1, 1, 400), indexing="ij")
    light = (0.5 - 0.35 * x - 0.4 * y).clamp(0, 1)[..., None]
    ball = torch.tensor([0.8, 0.4, 0.2]) * (0.35 + 0.65 * light)
    ground = torch.tensor([0.8, 0.9, 1.0]) * (0.95 + 0.05 * y[..., None])
    inside = ((0.7 - (x**2 + y**2).sqrt()) * 200).clamp(0, 1)[..., None]
    assert areas(page(torch.lerp(ground, ball, inside))) == 2


def test_texture_has_no_lines() -> None:
    noise = torch.from_numpy(
        ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((512, 512)), (1, 4))
    ).float()
    grain = (0.75 + 0.18 * noise / noise.std()).clamp(0.2, 1)[..., None]
    paper = torch.tensor([0.99, 0.98, 0.95])
    crayon = small(face()) * grain + paper * (1 - grain)
    assert areas(page(crayon)) == areas(face_page()) == 3


@pytest.mark.parametrize("outline", [20, 40])
def test_the_outlines_of_a_comic_become_one_line(outline: int) -> None:
    drawing = page(small(face(outline)))
    assert areas(drawing) == 3
    within = ndimage.distance_transform_edt(drawing < 128)
    assert within.max() <= LINE / 1000 * 512  # half a line, and more where three meet
    assert off(drawing, face_page()) < outline / 4 / 2 + 2


def test_strokes_within_an_area_stay_and_pupils_are_black() -> None:
    image = face()
    pen = ImageDraw.Draw(image)
    pen.arc([800, 1000, 1300, 1450], 20, 160, fill=INK, width=36)
    pen.ellipse([750, 750, 890, 890], fill=INK)
    drawing = page(small(image))
    assert areas(drawing) == 3
    assert (drawing[195:215, 195:215] == 0).all()  # the middle of the pupil
    mouth = drawing[340:365, 255:270]
    assert (mouth < 128).any(0).all() and (mouth > 128).any(0).all()


def test_lines_are_as_wide_as_asked_for_in_every_size() -> None:
    for size, width in ((300, 12), (600, 24)):
        image = face().resize((size, size), Image.Resampling.LANCZOS)
        drawing = page(picture(image), line_width=width)
        column = drawing[:, round(size * 0.55)]  # crosses the head's outline twice
        assert (255 - column.astype(float)).sum() / 255 == pytest.approx(
            2 * width / 1000 * size, rel=0.12
        )


def test_less_detail_has_fewer_areas() -> None:
    few, many = (colouring_page(bear(), PageSettings(detail=d)).areas for d in (1, 5))
    assert few < bear_page().areas <= many


def test_lines_that_reach_the_edge_are_closed_by_a_frame() -> None:
    scene = picture(draw(replace(BEAR, background="meadow"), 320, 320))
    for drawing in (page(scene), page(scene, paper="A4 portrait, 150 dpi")):
        rows, columns = np.nonzero(drawing < 128)  # without the roundness of the corners
        ring = drawing[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()]
        for side in (ring[0], ring[-1], ring[:, 0], ring[:, -1]):
            assert (side < 140).all()


# ------------------------------------------------------------------------------ sizes and papers
def test_a_mirrored_picture_gives_the_mirrored_page() -> None:
    mirrored = page(bear().flip(1))[:, ::-1]
    assert (
        off(bear_page().drawing, mirrored) <= 1.5
    )  # a region's border may lie on the other side of a pixel


def test_a_picture_of_twice_the_size_has_its_lines_in_the_same_places() -> None:
    large = draw(BEAR, 512, 512).resize((1024, 1024), Image.Resampling.BICUBIC)
    halved = np.asarray(Image.fromarray(page(picture(large))).reduce(2))
    assert off(bear_page().drawing, halved) <= 1  # the next pixel


@given(width=st.integers(32, 99), height=st.integers(150, 200), seed=st.integers(0, 99))
@settings(max_examples=examples(3))
def test_every_size_gives_a_page_of_that_size(width: int, height: int, seed: int) -> None:
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    noise = F.interpolate(noise, (height, width), mode="bicubic")[0].movedim(0, -1)
    drawing = page(noise)
    assert drawing.shape == (height, width)


def test_a_sheet_holds_the_picture_within_its_margins() -> None:
    for name in ("A4 landscape, 150 dpi", "Letter portrait, 150 dpi"):
        drawing, sheet = page(small(face()), paper=name), SHEETS[name]
        assert drawing.shape == (sheet.height, sheet.width)
        rows, columns = np.nonzero(drawing < 255)
        assert rows.min() >= sheet.margin <= sheet.height - 1 - rows.max()
        assert columns.min() >= sheet.margin <= sheet.width - 1 - columns.max()
        assert (rows.max() - rows.min()) > 0.6 * min(sheet.inner)
    assert SHEETS["A4 portrait, 300 dpi"][:2] == (2480, 3508)
    assert size_of_page(torch.zeros(2, 40, 50, 3), "as the picture") == (50, 40)


def test_what_is_drawn_fills_the_sheet_with_lines_of_the_same_width() -> None:
    """A tall animal in the lower right of a plain ground, beside the same one in a meadow."""
    sheet, paper = SHEETS["A4 portrait, 150 dpi"], "A4 portrait, 150 dpi"
    ground = torch.full((512, 512, 3), 0.93)
    ground[200:440, 280:380] = torch.tensor([0.9, 0.5, 0.2])
    alone = page(ground, paper=paper)
    rows, columns = np.nonzero(alone < 128)
    assert np.ptp(rows) > 0.93 * sheet.inner[1]
    assert rows.min() + rows.max() == pytest.approx(sheet.height, abs=3)
    assert columns.min() + columns.max() == pytest.approx(sheet.width, abs=3)
    ground[420:] = torch.tensor([0.3, 0.7, 0.3])
    scene = page(ground, paper=paper)
    rows, columns = np.nonzero(scene < 128)
    assert np.ptp(columns) == pytest.approx(sheet.inner[0], abs=3)
    widths = [255 - line.astype(float) for line in (alone[sheet.height // 2], scene[810])]
    # Two sides of the animal, and in the scene two of the frame that are cut to half: the same.
    black = [width[width.nonzero()[0]].sum() / 255 for width in widths]
    assert black[0] == pytest.approx(2 * LINE / 1000 * sheet.inner[0], rel=0.12)
    assert black[1] == pytest.approx(2 * black[0], rel=0.12)


def test_the_steps_of_a_slope_do_not_show_on_a_sheet_that_is_filled() -> None:
    image = Image.new("RGB", (1024, 1024), "white")
    ImageDraw.Draw(image).polygon([(300, 300), (700, 340), (700, 740), (300, 700)], fill=SKIN)
    drawing = page(picture(image), paper="A4 portrait, 300 dpi")
    columns = np.nonzero((drawing < 128).any(0))[0]
    inner = columns[len(columns) // 4 : -len(columns) // 4]
    upper = (drawing[:, inner] < 128).argmax(0)  # the line's upper edge
    waves = upper - np.polyval(np.polyfit(inner, upper, 1), inner)
    assert waves.std() < 0.55  # pixels; 0.8 where lines only grow


def test_a_page_has_the_areas_of_its_picture_in_every_size() -> None:
    on_paper = colouring_page(bear(), PageSettings(paper="A4 portrait, 150 dpi"))
    assert on_paper.areas == bear_page().areas
    assert areas(on_paper.drawing) >= areas(bear_page().drawing)  # narrow ones are open now


# ------------------------------------------------------------------------------ kinds of pictures
def test_alpha_lies_on_white_and_grey_works() -> None:
    colours = small(face())
    alpha = (colours.mean(-1, keepdim=True) < 0.99).float()
    with_alpha = torch.cat([colours * alpha, alpha], -1)  # black where it is transparent
    assert areas(page(with_alpha)) == 3
    assert areas(page(colours.mean(-1, keepdim=True).half())) == 3


def test_what_cannot_be_used_is_refused_with_a_sentence() -> None:
    bad = bear(64)
    bad[10, 10, 1] = float("nan")
    with pytest.raises(ValueError, match="image holds values that are no numbers"):
        page(bad)
    with pytest.raises(ValueError, match="image is 200 x 1 pixels, too small"):
        page(torch.zeros(1, 200, 3))
    with pytest.raises(ValueError, match=r"image has the shape \(64, 64, 2\)"):
        page(torch.zeros(64, 64, 2))
    for wrong, told in (
        ({"line_width": 0.0}, "line_width is 0"),
        ({"detail": 6}, "detail is 6"),
        ({"paper": "A3"}, "paper is 'A3'"),
    ):
        with pytest.raises(ValueError, match=told):
            page(bear(64), **wrong)


def test_without_scikit_image_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        page(bear(64))


def test_a_page_as_an_image_is_grey_in_three_channels() -> None:
    image = as_image(np.array([[0, 255], [51, 0]], np.uint8))
    assert image.shape == (2, 2, 3) and image.dtype == torch.float32
    torch.testing.assert_close(image[1, 0], torch.full((3,), 0.2))


# ------------------------------------------------------------------------------ lines
@given(st.integers(0, 2**16 - 1))
def test_borders_are_all_the_places_where_regions_meet(bits: int) -> None:
    labels = np.array([bits >> i & 1 for i in range(16)]).reshape(4, 4)
    length = (labels[1:] != labels[:-1]).sum() + (labels[:, 1:] != labels[:, :-1]).sum()
    assert sum(len(line) - 1 for line in borders(labels)) == length


def test_chains_are_cut_where_three_meet_and_closed_ones_return() -> None:
    ring = {i: [(i + 1) % 6, (i - 1) % 6] for i in range(6)}
    (closed,) = chains(ring)
    assert closed[0] == closed[-1] and len(closed) == 7
    star = {0: [1, 2, 3], 1: [0], 2: [0], 3: [0]}
    assert sorted(len(chain) for chain in chains(star)) == [2, 2, 2]


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    stairs = [(i // 2, (i + 1) // 2) for i in range(41)]
    line = smooth(stairs)
    np.testing.assert_allclose(line[[0, -1]], [(0, 0), (20, 20)])
    assert np.ptp((line[:, 0] - line[:, 1])[8:-8]) < 0.01  # the steps are gone


@given(st.integers(6, 40), st.floats(1, 4))
@settings(max_examples=examples(10))
def test_enlarging_keeps_rings_and_the_ends_of_lines(radius: int, zoom: float) -> None:
    y, x = np.mgrid[-50:50, -50:50]
    (ring,) = borders((np.hypot(x + 0.5, y + 0.5) < radius).astype(int))
    even = enlarged(ring, zoom)
    np.testing.assert_allclose(even[0], even[-1])
    assert len(even) >= zoom * (len(ring) - 1)
    assert np.hypot(*(even - 50).T) == pytest.approx(np.hypot(*(ring - 50).T).mean(), rel=0.06)
    half = ring[: len(ring) // 2]
    np.testing.assert_allclose(enlarged(half, zoom)[[0, -1]], half[[0, -1]], atol=1e-9)


@pytest.mark.parametrize(("run", "left"), [(8, 0.2), (12, 0.6)])
def test_enlarging_takes_the_steps_of_a_slope_away(run: int, left: float) -> None:
    steps = smooth([(i // run, i - i // run) for i in range(20 * run)])
    waves = []
    for line in (steps, enlarged(steps, 2)):
        x, y = line[len(line) // 4 : -len(line) // 4].T
        waves.append((y - np.polyval(np.polyfit(x, y, 1), x)).std())
    assert waves[1] < left * waves[0]
