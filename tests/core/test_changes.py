"""What an edit changed is found; what a model and a VAE leave everywhere is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.benchmarks import tile_pictures as pictures
from pack.core.changes import change_map, changed_tiles, share
from pack.core.disk_backed import reduced
from pack.core.tiling import TileGrid
from pack.tests.examples import examples
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

THRESHOLD = 6.0  # of 255: what noise and shifts stay below
DEFAULT = 3.0  # of the node: a tile edited for nothing costs time, one left out the edit
KINDS = (*pictures.PICTURES, "objects")


def drawn(kind: str, side: int = 160, seed: int = 0) -> Tensor:
    """A picture as a VAE leaves it: no detail of a single pixel."""
    return pictures.blurred(getattr(pictures, kind)(side, side, seed), 1.0)


def most(before: Tensor, after: Tensor) -> float:
    """The greatest change, of 255."""
    return float(change_map(before, after).max()) * 255


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    st.floats(0, 0.012),
    st.tuples(st.floats(-0.7, 0.7), st.floats(-0.7, 0.7)),
)
@settings(max_examples=examples(8))
def test_drift_noise_and_shift_are_no_change(kind, drift, noise, shift) -> None:
    before = drawn(kind)
    after = pictures.noisy(pictures.moved(before, *shift) + torch.tensor(drift) / 255, noise)
    assert most(before, after) < THRESHOLD


def test_nothing_is_no_change_at_all() -> None:
    before = drawn("textured")
    assert most(before, before) == 0


def marked(picture: Tensor, opacity: float) -> Tensor:
    """With a small watermark in its lower right corner."""
    height, width = picture.shape[1:3]
    layer = Image.new("L", (width, height), 0)
    place = (int(width * 0.5), int(height * 0.85))
    ImageDraw.Draw(layer).text(place, "(c) Studio", fill=255, font=ImageFont.load_default(12))
    share = opacity * torch.tensor(list(layer.tobytes())).reshape(1, height, width, 1) / 255
    return picture * (1 - share) + (picture.mean() < 0.5).float() * share


@pytest.mark.parametrize(
    ("kind", "opacity"), [("flat", 0.2), ("gradient", 0.2), ("objects", 0.2), ("textured", 0.5)]
)
def test_a_small_faint_watermark_is_a_change_where_it_is(kind: str, opacity: float) -> None:
    after = drawn(kind)
    before = marked(after, opacity)
    change = change_map(before, pictures.noisy(after + 4 / 255, 0.01))[0] * 255
    assert change[-30:, 70:].max() > THRESHOLD
    assert change[:110].max() < THRESHOLD


def test_another_background_is_a_change_though_most_of_the_picture_shares_it() -> None:
    before = drawn("flat")
    after = before + 0.2
    after[:, 60:100, 60:100] = before[:, 60:100, 60:100]
    change = change_map(before, after)[0] * 255
    assert change[:50].min() > 40 and change[70:90, 70:90].max() == 0


def test_a_drift_is_taken_off_that_most_of_what_is_left_shares() -> None:
    before = drawn("textured")
    after = before + torch.tensor([5.0, -3.0, 2.0]) / 255
    after[:, :100] += 0.3
    change = change_map(before, after)[0] * 255
    assert change[:90].min() > 20 and change[110:].max() < 0.1


@pytest.mark.parametrize(("grain", "size"), [(0.0, 24), (0.02, 60)])
def test_a_faint_watermark_on_16_megapixels_is_a_change(grain: float, size: int) -> None:
    """Of 15 %, in small letters, as a guide of 1 megapixel shows it; the edit is perfect."""
    side = 4096
    layer = Image.new("L", (side, 200))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(layer).text((3000, 60), "(c) Photographer 2026", fill=255, font=font)
    opacity = torch.zeros(1, side, side, 1)
    letters = torch.frombuffer(bytearray(layer.tobytes()), dtype=torch.uint8)
    opacity[0, 3400:3600, :, 0] = letters.view(200, side) / 255 * 0.15
    noise = torch.randn(1, side, side, 1, generator=torch.Generator().manual_seed(0))
    clean = 0.5 + grain * noise
    both = (reduced(one, 1024, 1024) for one in (clean * (1 - opacity) + opacity, clean))
    change = change_map(*(one.expand(-1, -1, -1, 3) for one in both))  # grey: thrice the same
    found = changed_tiles(change, TileGrid.cover(side, side, 1024, 128, 32, 16), DEFAULT)
    assert 0 < len(found) <= 6
    taken = share(change, DEFAULT)[0]
    assert taken[850:900, 750:850].max() == 1 and not taken[:800].any()


@given(st.floats(0.5, 20), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=examples(30))
def test_an_edit_is_taken_whole_where_it_is_and_not_at_all_further_off(threshold, row, column):
    change = torch.zeros(1, 100, 128)
    change[0, row, column] = 1.5 * threshold / 255
    taken = share(change, threshold)[0]
    assert taken[row, column] == pytest.approx(1) and taken.min() >= 0 and taken.max() <= 1
    rows, columns = torch.arange(100)[:, None], torch.arange(128)
    far = torch.maximum((rows - row).abs(), (columns - column).abs())
    assert not taken[far > 8].any() and (taken[far <= 2] > 0.99).all()
    assert (taken.diff(dim=0).abs() < 0.5).all() and (taken.diff(dim=1).abs() < 0.5).all()
    assert not share(change / 4, threshold).any()
    assert (share(change, 0) == 1).all()


def test_pictures_of_unlike_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        change_map(torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 9, 3))


# ------------------------------------------------------------------------------ tiles
GRIDS = st.builds(
    TileGrid.cover,
    st.integers(32, 900),
    st.integers(32, 900),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([0, 16, 32]),
)


@given(GRIDS, st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 2, 3.7]))
@settings(max_examples=examples(50))
def test_the_tiles_that_hold_a_change_are_found(grid, down, right, smaller) -> None:
    height, width = (max(1, int(side / smaller)) for side in (grid.height, grid.width))
    change = torch.zeros(1, height, width)
    row, column = int(down * (height - 1)), int(right * (width - 1))
    change[0, row, column] = 10 / 255
    found = changed_tiles(change, grid, 6.0)
    # In the grid's own pixels, a margin of 1/64 of the longer side around it, and a rounding.
    y, x = row * grid.height / height, column * grid.width / width
    reach = max(grid.height, grid.width) / 64 + 3 * smaller
    for index, tile in enumerate(grid.tiles()):
        inside = tile.top <= y < tile.top + tile.height and tile.left <= x < tile.left + tile.width
        below, above = y - tile.top - tile.height, tile.top - y
        before, behind = x - tile.left - tile.width, tile.left - x
        if inside:
            assert index in found
        if max(below, above, before, behind) > 2 * reach:
            assert index not in found


def test_a_threshold_of_zero_takes_all_tiles_and_a_high_one_none() -> None:
    grid, change = TileGrid.cover(256, 256, 128, 32), torch.full((1, 64, 64), 5 / 255)
    assert changed_tiles(change, grid, 0) == frozenset(range(len(grid)))
    assert changed_tiles(change, grid, 5.1) == frozenset()
    assert changed_tiles(change, grid, 4.9) == frozenset(range(len(grid)))


def test_a_change_close_to_a_tile_takes_it_along() -> None:
    grid, change = TileGrid.cover(256, 256, 128, 0), torch.zeros(1, 256, 256)
    change[0, 20, 125] = 1.0
    assert changed_tiles(change, grid, 6.0) == {0, 1}
