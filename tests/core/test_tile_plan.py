"""The plan shows every tile where it is, and what is skipped; for any picture."""

from __future__ import annotations

import pytest
import torch
from pack.core.tile_plan import draw, summary
from pack.core.tiling import PIXEL_PATCH, PIXEL_STEP, WINDOWS, TileGrid

DARK, LIGHT = 0.02, 0.98


def grid_of(height: int, width: int, tile: int, overlap: int) -> TileGrid:
    return TileGrid.cover(height, width, tile, overlap, PIXEL_STEP, PIXEL_PATCH)


@pytest.mark.parametrize(
    ("height", "width", "tile", "shape", "channels"),
    [
        (1, 1, 32, (1024, 1024), 1),
        (17, 4000, 1024, (160, 1024), 2),
        (600, 300, 256, (1024, 512), 4),
        (1800, 2400, 320, (768, 1024), 3),
        (2000, 2000, 32, (1024, 1024), 3),  # more tiles than numbers could be read
    ],
)
def test_a_plan_of_any_picture_has_the_size_that_was_asked(
    height, width, tile, shape, channels
) -> None:
    grid = grid_of(height, width, tile, tile // 4 // 16 * 16)
    plan = draw(torch.rand(1, height, width, channels), grid, "hann", skipped={0})
    assert plan.shape == (1, *shape, 3) and plan.dtype == torch.float32
    assert plan.min() >= 0 and plan.max() <= 1
    small = draw(torch.rand(1, height, width, channels), grid, "hann", longest=100)
    assert max(small.shape[1:3]) == 100


@pytest.mark.parametrize("ground", [DARK, LIGHT])
def test_edges_numbers_and_labels_are_seen_on_any_ground(ground) -> None:
    """Each is white beside black, so some pixels are far from what lies below, whatever it is."""
    grid = grid_of(3072, 3072, 1024, 128)
    picture = torch.full((1, 3072, 3072, 3), ground)
    plan = draw(picture, grid, "hann")[0]
    edge = round(grid.lefts[1] * 1024 / 3072)
    across = plan[10, edge - 3 : edge + 3]
    assert across.min() < 0.05 and across.max() > 0.95
    middle = plan[60:200, 80:220]  # of tile 1
    assert middle.min() < 0.05 and middle.max() > 0.95
    labelled = draw(picture, grid, "hann", labels=["0.3 px"])[0]
    changed = (labelled != plan).any(dim=-1)
    assert changed[:256, :300].any()
    assert not changed[300:].any() and not changed[:, 320:].any()


def test_colours_mix_as_the_weights_do() -> None:
    """Across the seam between two tiles the colour goes from one to the other, half at its middle."""
    grid = grid_of(512, 1024 - 64, 512, 64)
    plan = draw(torch.zeros(1, 512, 960, 3), grid, "linear", longest=960)[0]
    row = plan[20]  # above the number
    first, second = row[440], row[520]
    middle = (row[479] + row[480]) / 2
    assert (first - second).abs().max() > 0.2
    torch.testing.assert_close(middle, (first + second) / 2, rtol=0, atol=0.02)


def test_skipped_tiles_show_the_picture_darker_and_hatched() -> None:
    grid = grid_of(1024, 1024, 512, 0)
    picture = torch.ones(1, 1024, 1024, 3) * torch.tensor([0.2, 0.8, 0.2])
    plan = draw(picture, grid, "hann", skipped={3})[0]
    inside = plan[800:1000, 800:1000].reshape(-1, 3)
    plain = torch.tensor([0.1, 0.4, 0.1])
    share = ((inside - plain).abs().amax(dim=-1) < 0.01).float().mean()
    assert 0.5 < share < 0.95  # the rest is the hatching
    other = plan[20:60, 20:60].reshape(-1, 3)
    assert (other - other[0]).abs().max() == 0  # none there
    assert (other[0] - plain).abs().max() > 0.1


def test_the_plan_is_of_the_window_that_blends() -> None:
    grid, picture = grid_of(300, 900, 320, 128), torch.full((1, 300, 900, 3), 0.5)
    plans = [draw(picture, grid, window) for window in WINDOWS]
    assert all(not torch.equal(a, b) for i, a in enumerate(plans) for b in plans[:i])


def test_a_grid_in_words() -> None:
    assert summary(grid_of(3072, 3072, 1024, 128)) == (
        "16 tiles of 1024 x 1024, at least 336 shared, 4 x 4"
    )
    assert summary(grid_of(512, 2000, 1024, 128)) == (
        "3 tiles of 1024 x 512, at least 528 shared, 3 x 1"
    )
    assert summary(grid_of(30, 50, 1024, 128)) == "1 tile of 50 x 30: the whole picture"
