"""Tiles cover a picture with the overlap that was asked for, and blend to what was cut."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.tiling import PATCH, STEP, WINDOWS, TileBlender, TileGrid, Weights, crop

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


@settings(deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    steps=st.integers(2, 12),
    share=st.sampled_from((0.0, 0.2, 0.5, 0.8)),
    window=st.sampled_from(list(WINDOWS)),
)
def test_blending_gives_back_what_was_cut(height, width, steps, share, window) -> None:
    tile = steps * STEP
    picture = torch.rand(2, 3, 1, height, width)
    grid = TileGrid.cover(height, width, tile, int((tile - PATCH) * share))
    blender = TileBlender(grid, picture.shape, window)
    weights = Weights(grid, window)
    for index, each in enumerate(grid.tiles()):
        assert weights.of(index).min() > 0
        blender.add(index, crop(picture, each))
    torch.testing.assert_close(blender.result(), picture, rtol=0, atol=1e-6)


def test_what_a_16_megapixel_picture_is_cut_into() -> None:
    grid = TileGrid.along(512, 512, 2, 16)
    assert (grid.tile_height, grid.tops) == (264, (0, 248))


@pytest.mark.parametrize("bad", [{"tile": 6}, {"tile": 0}, {"overlap": 31}, {"overlap": -1}])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(bad) -> None:
    with pytest.raises(ValueError, match="must"):
        TileGrid.cover(**{"height": 100, "width": 100, "tile": 32, "overlap": 8, **bad})
