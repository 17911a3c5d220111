"""Tiles cover a picture with the overlap that was asked for, and blend to what was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.tiling import PATCH, STEP, Tile, TileGrid, hann, window

sides = st.integers(1, 300)


@settings(deadline=None)
@given(height=sides, width=sides, steps=st.integers(2, 40), data=st.data())
def test_tiles_cover_all_with_the_overlap_and_one_size(height, width, steps, data) -> None:
    tile = steps * STEP
    overlap = data.draw(st.integers(0, tile - PATCH))
    tiles = TileGrid(height, width, tile, overlap).tiles()
    assert {(t.height, t.width) for t in tiles} == {(min(tile, height), min(tile, width))}
    assert len(set(tiles)) == len(tiles)
    for side, starts in ((height, {t.top for t in tiles}), (width, {t.left for t in tiles})):
        starts = sorted(starts)
        assert starts[0] == 0 and starts[-1] == max(0, side - tile)
        assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
        assert all(start % PATCH == 0 for start in starts[:-1])


@settings(deadline=None)
@given(height=sides, width=sides, count=st.integers(1, 12), overlap=st.integers(0, 64))
def test_as_many_tiles_along_the_longer_side_as_asked_at_most(
    height, width, count, overlap
) -> None:
    grid = TileGrid.along(height, width, count, overlap)
    tiles = grid.tiles()
    longer = "left" if width >= height else "top"
    assert len({getattr(t, longer) for t in tiles}) <= count
    # Not larger than needed: one step less would not reach over the side with so many.
    smaller = grid.tile - STEP
    assert smaller < STEP or count * smaller - (count - 1) * grid.overlap < max(height, width)


@settings(deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), steps=st.integers(2, 12))
def test_blending_gives_back_what_was_cut(height, width, steps) -> None:
    tile = steps * STEP
    picture = torch.rand(height, width)
    total, weights = torch.zeros(height, width), torch.zeros(height, width)
    for t in TileGrid(height, width, tile, tile // 4).tiles():
        rows, columns = slice(t.top, t.top + t.height), slice(t.left, t.left + t.width)
        weight = window(t)
        total[rows, columns] += picture[rows, columns] * weight
        weights[rows, columns] += weight
    assert weights.min() > 0
    torch.testing.assert_close(total / weights, picture, rtol=1e-5, atol=1e-6)


def test_what_a_16_megapixel_picture_is_cut_into() -> None:
    grid = TileGrid.along(512, 512, 2, 16)
    assert (grid.tile, grid.overlap) == (264, 16)
    assert grid.tiles() == (
        Tile(0, 0, 264, 264),
        Tile(0, 248, 264, 264),
        Tile(248, 0, 264, 264),
        Tile(248, 248, 264, 264),
    )
    assert TileGrid.along(8, 8, 2, 16).tiles() == (Tile(0, 0, 8, 8),)


@pytest.mark.parametrize("side", [1, 2, 3, 64, 513])
def test_the_window_is_symmetric_and_nowhere_zero(side: int) -> None:
    found = hann(side)
    assert found.min() > 0 and found.max() <= 1
    torch.testing.assert_close(found, found.flip(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 8, 0), "no picture"),
        ((8, 8, 6, 0), "multiple of 4"),
        ((8, 8, 8, 7), "between 0 and 6"),
        ((8, 8, 8, -1), "between 0 and 6"),
    ],
)
def test_what_no_grid_can_be_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileGrid(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        TileGrid.along(8, 8, 0, 4)
