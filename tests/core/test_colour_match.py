"""A tile takes on the target's colours and keeps what was edited."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.benchmarks import tile_pictures as pictures
from pack.core.colour_match import LEAST_TRUST, MOST, colour_match
from pack.tests.examples import examples
from torch import Tensor
from torch.nn import functional

SIDES = st.sampled_from([(96, 96), (64, 160), (200, 144)])


def drift(height: int, width: int, slopes: Tensor, most: float) -> Tensor:
    """A smooth difference of up to `most` of 255, for each channel another, (1, h, w, 3)."""
    down, right = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    shapes = torch.stack([down, right, down * right, torch.ones_like(down)], -1) @ slopes.T
    return (shapes / shapes.abs().max() * most / 255)[None]


def edited(height: int, width: int, share: float, place: float) -> Tensor:
    """Trust, (1, h, w): none in a rectangle of that share of the tile."""
    trusted = torch.ones(1, height, width)
    rows, columns = int(height * share**0.5), int(width * share**0.5)
    top, left = int((height - rows) * place), int((width - columns) * (1 - place))
    trusted[:, top : top + rows, left : left + columns] = 0
    return trusted


@pytest.mark.parametrize("kind", pictures.PICTURES)
@given(SIDES, st.integers(0, 99), st.floats(0, 14), st.floats(0, 0.5), st.floats(0, 1))
@settings(max_examples=examples(12))
def test_no_colour_is_off_by_one_outside_of_the_edit(kind, sides, seed, most, share, place) -> None:
    target = pictures.PICTURES[kind](*sides, seed=seed)
    slopes = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    trusted, off = edited(*sides, share, place), drift(*sides, slopes, most)
    tile = pictures.noisy(target, 0.01, seed) + off
    tile = torch.where(trusted[..., None] > 0, tile, torch.tensor([0.9, 0.1, 0.3]) + off)
    match = colour_match(tile, target, trusted)
    left = (tile + match.difference - target) * trusted[..., None] * 255
    mean = left.sum((1, 2)) / trusted.sum()
    assert mean.abs().max() < 0.5
    cells = functional.adaptive_avg_pool2d(left.movedim(-1, 1), 4)
    assert cells.abs().max() < 1  # drift is followed, not only its mean
    assert match.beyond == 0


def test_what_was_edited_gets_what_its_surroundings_get() -> None:
    target, trusted = pictures.textured(128, 128), edited(128, 128, 0.3, 0.5)
    tile = torch.where(trusted[..., None] > 0, target + 8 / 255, torch.tensor(0.9))
    match = colour_match(tile, target, trusted)
    assert (match.difference * 255 + 8).abs().max() < 0.1


def test_what_is_far_off_is_put_back_where_trusted_and_no_more_than_a_drift_elsewhere() -> None:
    target, trusted = pictures.flat(128, 128), edited(128, 128, 0.25, 0.5)
    match = colour_match(target + 60 / 255, target, trusted)
    inside = trusted[0] > 0
    assert (match.difference[0, inside] * 255 + 60).abs().max() < 0.5
    assert match.difference[0, ~inside].abs().max() <= MOST + 1e-6
    assert match.beyond == 1


def test_an_edit_that_was_trusted_by_mistake_stays_local() -> None:
    target = pictures.flat(128, 128)
    tile = target.clone()
    tile[:, :12, :12] = 0.0
    match = colour_match(tile, target, torch.ones(1, 128, 128))
    assert match.difference[:, 16:, 16:].abs().max() * 255 < 9
    assert match.difference[:, 64:, 64:].abs().max() * 255 < 0.5
    assert 0 < match.beyond < 0.02


def test_a_pixel_each_and_lines_are_no_special_case() -> None:
    for sides in ((1, 1), (1, 40), (40, 3)):
        target = torch.full((1, *sides, 3), 0.5)
        match = colour_match(target - 0.02, target, torch.full((1, *sides), LEAST_TRUST))
        torch.testing.assert_close(
            match.difference, torch.full_like(target, 0.02), atol=1e-4, rtol=0
        )


def test_an_equal_tile_stays_as_it_is() -> None:
    target = pictures.textured(96, 96)
    assert colour_match(target, target, torch.ones(1, 96, 96)).difference.abs().max() == 0
