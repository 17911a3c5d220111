"""Tiles cover a picture with the overlap that was asked for, and blend to what was cut."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pack.core.tiling import (
    PATCH,
    PIXEL_PATCH,
    PIXEL_STEP,
    STEP,
    WINDOWS,
    TileBlender,
    TileGrid,
    Weights,
    crop,
)
from pack.tests.examples import examples
from torch import Tensor

sides = st.integers(1, 300)


@settings(deadline=None)
@given(height=sides, width=sides, steps=st.integers(2, 40), patch=st.integers(1, 4), data=st.data())
def test_tiles_cover_all_with_the_overlap_and_one_size(height, width, steps, patch, data) -> None:
    tile = steps * STEP
    overlap = data.draw(st.integers(0, tile - patch))
    grid = TileGrid.cover(height, width, tile, overlap, patch=patch)
    assert (grid.tile_height, grid.tile_width) == (min(tile, height), min(tile, width))
    assert len(set(grid.tiles())) == len(grid.tiles()) == len(grid)
    for side, starts in ((height, grid.tops), (width, grid.lefts)):
        assert starts[0] == 0 and starts[-1] == max(0, side - tile)
        assert all(a < b <= a + tile - overlap for a, b in pairwise(starts))
        assert all(start % patch == 0 for start in starts[:-1])
        fewest = ceil((side - overlap) / (tile - overlap)) if side > tile else 1
        assert len(starts) >= fewest
        if patch == 1:
            assert len(starts) == fewest


@settings(deadline=None)
@given(height=sides, width=sides, count=st.integers(1, 12), overlap=st.integers(0, 64))
def test_as_many_tiles_along_the_longer_side_as_asked_at_most(
    height, width, count, overlap
) -> None:
    grid = TileGrid.along(height, width, count, overlap)
    starts = grid.lefts if width >= height else grid.tops
    assert len(starts) <= count


MOST = 1 << 19  # values of a picture in a test: long sides come as strips
MOST_TILES = 1000
LAYOUTS = {  # the whole's shape, the dimension of its rows, what one pixel holds
    "picture": (lambda b, c, h, w: (b, h, w, c), -3),
    "mask": (lambda b, c, h, w: (b, h, w), -2),
    "latent": (lambda b, c, h, w: (b, c, h, w), -2),
    "latent of Qwen-Image": (lambda b, c, h, w: (b, c, 1, h, w), -2),
}


@st.composite
def grids(draw: Any) -> TileGrid:
    """Of pictures of 16 to 5000 px a side and of latents."""
    pixels = draw(st.booleans())
    step, patch = (PIXEL_STEP, PIXEL_PATCH) if pixels else (STEP, PATCH)
    long = draw(st.integers(16, 5000))
    short = draw(st.integers(16, max(16, min(long, MOST // long))))
    height, width = (long, short) if draw(st.booleans()) else (short, long)
    tile = step * draw(st.integers(1, min(2048, long + step) // step))
    overlap = draw(st.integers(0, tile - patch))
    grid = TileGrid.cover(height, width, tile, overlap, step, patch)
    assume(len(grid) <= MOST_TILES)
    return grid


@st.composite
def wholes(draw: Any) -> tuple[TileGrid, Tensor, int]:
    """A grid, what it cuts, and the dimension of its rows."""
    grid = draw(grids())
    make, dim = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    room = max(1, MOST // (grid.height * grid.width))
    batch = draw(st.integers(1, min(3, room)))
    channels = draw(st.integers(1, min(16, max(1, room // batch))))
    shape = make(batch, channels, grid.height, grid.width)
    whole = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    return grid, whole.to(dtype), dim


windows = st.sampled_from(list(WINDOWS))


@settings(max_examples=examples(40))
@given(whole=wholes(), window=windows, random=st.randoms(use_true_random=False))
def test_blending_gives_back_what_was_cut_in_any_order(whole, window, random: Random) -> None:
    """Bit for bit, also in half precision. Corners and borders are part of it."""
    grid, picture, dim = whole
    order = list(enumerate(grid.tiles()))
    random.shuffle(order)
    blender = TileBlender(grid, picture.shape, window, dim=dim)
    for index, each in order:
        blender.add(index, crop(picture, each, dim))
    assert torch.equal(blender.result(), picture.float())


@settings(max_examples=examples(40))
@given(grid=grids(), window=windows)
def test_the_weights_sum_to_one_and_none_is_zero(grid, window) -> None:
    weights = Weights(grid, window)
    sums = []
    for side, starts, along in (
        (grid.height, grid.tops, weights.vertical),
        (grid.width, grid.lefts, weights.horizontal),
    ):
        total = torch.zeros(side, dtype=torch.float64)
        for start, each in zip(starts, along, strict=True):
            assert each.min() > 0
            total[start : start + len(each)] += each.double()
        sums.append(total)
    total = sums[0][:, None] * sums[1][None, :]  # the weights of all tiles at each pixel
    assert (total - 1).abs().max() < 1e-6
    assert weights.of(len(grid) - 1).min() > 0  # no product underflows, not even in the corners


@pytest.mark.parametrize(
    ("window", "outer", "inner"),
    [  # at 1/8 and 3/8 of a tile, by hand
        ("hann", 0.14644661, 0.85355339),
        ("linear", 0.25, 0.75),
        ("cosine", 0.38268343, 0.92387953),
        ("gaussian", 0.00088383, 0.45783336),  # exp(-7.03125) and exp(-0.78125)
    ],
)
def test_a_window_has_the_values_of_its_formula(window, outer, inner) -> None:
    expected = torch.tensor([outer, inner, inner, outer], dtype=torch.float64)
    torch.testing.assert_close(WINDOWS[window](4), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("window", WINDOWS)
def test_towards_an_outer_edge_a_window_stays_as_high_as_in_its_middle(window) -> None:
    """Two tiles that share three quarters: the inner half of each counts up to the edge."""
    left, right = Weights(TileGrid.cover(8, 40, 32, 24), window).horizontal
    shape = WINDOWS[window](32)
    first, second = shape.clone(), shape.clone()
    first[:16], second[16:] = shape[16], shape[16]
    total = first[8:] + second[:24]
    torch.testing.assert_close(left[8:].double(), first[8:] / total, rtol=0, atol=1e-6)
    torch.testing.assert_close(right[:24].double(), second[:24] / total, rtol=0, atol=1e-6)
    assert (left[:8] == 1).all() and (right[24:] == 1).all()


def test_where_hundreds_of_tiles_overlap_nothing_is_rounded() -> None:
    picture = torch.rand(1, 700, 700, 1, generator=torch.Generator().manual_seed(1))
    grid = TileGrid.cover(700, 700, 512, 496, PIXEL_STEP, PIXEL_PATCH)
    blender = TileBlender(grid, picture.shape, dim=-3)
    for index, tile in enumerate(grid.tiles()):
        blender.add(index, crop(picture, tile, -3))
    assert len(grid) > 100
    assert torch.equal(blender.result(), picture)


@settings(max_examples=examples(30))
@given(whole=wholes(), window=windows, data=st.data())
def test_over_a_base_only_what_tiles_change_is_changed(whole, window, data) -> None:
    grid, base, dim = whole
    every = st.integers(0, len(grid) - 1)
    changed = data.draw(st.sets(every, max_size=3))
    same = data.draw(st.sets(every, max_size=3)) - changed
    blender = TileBlender(grid, base.shape, window, dim=dim, base=base)
    touched = torch.zeros(base.shape, dtype=torch.bool)
    for index in changed | same:
        tile = crop(base, grid.tiles()[index], dim)
        blender.add(index, tile + 1 if index in changed else tile)
    for index in changed:
        crop(touched, grid.tiles()[index], dim).fill_(True)
    result = blender.result()
    assert torch.equal(result[~touched], base.float()[~touched])
    assert (result >= base.float()).all()
    assert (result[touched] > base.float()[touched]).any() == bool(changed)


@pytest.mark.parametrize("window", WINDOWS)
def test_with_all_tiles_a_base_makes_no_difference(window) -> None:
    torch.manual_seed(1)
    base, picture = torch.rand(2, 1, 3, 70, 90), torch.rand(2, 1, 3, 70, 90)
    grid = TileGrid.cover(70, 90, 32, 10)
    with_base = TileBlender(grid, base.shape, window, base=base)
    without = TileBlender(grid, base.shape, window)
    for index, tile in enumerate(grid.tiles()):
        for blender in (with_base, without):
            blender.add(index, crop(picture, tile) * (index + 1) / len(grid))
    torch.testing.assert_close(with_base.result(), without.result(), rtol=0, atol=1e-6)


@settings(max_examples=examples(60))
@given(grid=grids(), window=windows, random=st.randoms(use_true_random=False))
def test_tiles_that_differ_are_blended_by_their_weights_in_any_order(grid, window, random) -> None:
    """Against the sum in float64."""
    values = torch.rand(len(grid), generator=torch.Generator().manual_seed(1))
    weights, total = Weights(grid, window), torch.zeros(grid.height, grid.width).double()
    blender, order = TileBlender(grid, (grid.height, grid.width), window), list(range(len(grid)))
    random.shuffle(order)
    for index in order:
        tile = grid.tiles()[index]
        crop(total, tile).add_(values[index].double() * weights.of(index).double())
        blender.add(index, values[index].expand(tile.height, tile.width))
    torch.testing.assert_close(blender.result().double(), total, rtol=0, atol=1e-5)


def test_the_memory_of_the_sum_may_be_given_and_need_not_lie_in_one_piece() -> None:
    grid = TileGrid.cover(70, 90, 32, 10)
    memory = torch.full((1, 90, 140, 3), torch.nan).transpose(1, 2)[:, ::2]
    blender = TileBlender(grid, memory.shape, dim=-3, into=memory)
    for index, tile in enumerate(grid.tiles()):
        blender.add(index, torch.ones(1, 3, tile.width, tile.height).transpose(1, 3))
    assert blender.result() is memory
    torch.testing.assert_close(memory, torch.ones_like(memory), rtol=0, atol=1e-6)


def test_a_grid_of_latents_is_one_of_pixels_eight_times_as_large() -> None:
    grid = TileGrid.cover(100, 131, 32, 8)
    pixels = grid.scaled(8)
    assert pixels.tiles() == tuple(tuple(8 * v for v in tile) for tile in grid.tiles())
    assert pixels.scaled(1, 8) == grid
    assert grid.scaled(3, 1).scaled(1, 3) == grid
    with pytest.raises(ValueError, match="is no whole pixel"):
        grid.scaled(1, 2)


def test_what_does_not_belong_is_refused_in_a_sentence() -> None:
    grid = TileGrid.cover(64, 64, 48, 16)
    with pytest.raises(ValueError, match="no window 'flat'. Choose one of hann, linear"):
        Weights(grid, "flat")
    with pytest.raises(ValueError, match="one of 64 x 64, not of 32 x 64"):
        TileBlender(grid, (1, 3, 64, 32))
    blender = TileBlender(grid, (1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"Tile 1 came as \(1, 3, 48, 32\) instead of"):
        blender.add(0, torch.rand(1, 3, 48, 32))
    blender.add(0, torch.rand(1, 3, 48, 48))
    with pytest.raises(ValueError, match="Tile 1 came twice"):
        blender.add(0, torch.rand(1, 3, 48, 48))
    with pytest.raises(ValueError, match="3 tiles are missing: 2, 3, 4"):
        blender.result()


def test_what_a_16_megapixel_picture_is_cut_into() -> None:
    grid = TileGrid.along(512, 512, 2, 16)
    assert (grid.tile_height, grid.tops) == (264, (0, 248))


@pytest.mark.parametrize("bad", [{"tile": 6}, {"tile": 0}, {"overlap": 31}, {"overlap": -1}])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(bad) -> None:
    with pytest.raises(ValueError, match="must"):
        TileGrid.cover(**{"height": 100, "width": 100, "tile": 32, "overlap": 8, **bad})
