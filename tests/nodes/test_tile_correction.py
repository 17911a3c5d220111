"""Edited tiles are put back in place and in colour, or left alone with a reason."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.benchmarks import tile_pictures as pictures
from pack.tests.examples import examples
from pack.tests.host import Host
from torch import Tensor

SIDE, EDGE = 160, 8


@pytest.fixture(scope="module")
def correction(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.tile_correction")


def tile_and_target(
    kind: str, shift: tuple[float, float], share: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile that has moved, its target, and the trust in it: none where it was edited."""
    whole = getattr(pictures, kind)(SIDE + 2 * EDGE, SIDE + 2 * EDGE, seed)
    inner = slice(EDGE, EDGE + SIDE)
    target, tile = (p[:, inner, inner] for p in (whole, pictures.moved(whole, *shift)))
    trusted, rows = torch.ones(1, SIDE, SIDE), int(SIDE * share**0.5)
    if rows:
        top, left = (int((SIDE - rows) * ((seed * step) % 7) / 6) for step in (1, 3))
        new = pictures.textured(rows, rows, seed + 1)
        tile[:, top : top + rows, left : left + rows] = new
        trusted[:, top : top + rows, left : left + rows] = 0
    return tile.clamp(0, 1), target, trusted


@pytest.mark.parametrize("kind", ["textured", "text", "objects"])
@given(
    st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    st.sampled_from([0.0, 0.01, 0.02]),
    st.sampled_from([0.0, 0.6, 1.0]),
    st.integers(0, 20),
)
@settings(max_examples=examples(10))
def test_a_shift_is_found_to_a_quarter_of_a_pixel(
    correction, kind, shift, share, noise, blur, seed
) -> None:
    tile, target, trusted = tile_and_target(kind, shift, share, seed)
    tile = pictures.noisy(pictures.blurred(tile, blur) + 5 / 255, noise, seed)
    _, done = correction.correct(tile, target, trusted, register=True, colour=False)
    assert abs(done.down + shift[0]) < 0.25 and abs(done.right + shift[1]) < 0.25, done


def test_a_tile_that_is_moved_back_is_the_target_again(correction) -> None:
    tile, target, trusted = tile_and_target("textured", (1.4, -2.3))
    fixed, done = correction.correct(tile, target, trusted, register=True, colour=True)
    inner = slice(8, -8)
    before, after = ((t - target)[:, inner, inner].abs().mean() * 255 for t in (tile, fixed))
    assert after < 0.4 < 5 < before and done.note == ""


def test_a_tile_that_has_not_moved_is_not_resampled(correction) -> None:
    tile, target, trusted = tile_and_target("textured", (0.03, -0.05))
    fixed, done = correction.correct(tile, target, trusted, register=True, colour=False)
    assert fixed is tile and (done.down, done.right) == (0, 0)


@pytest.mark.parametrize("kind", ["flat", "gradient"])
def test_a_plain_tile_has_nothing_to_register(correction, kind: str) -> None:
    tile, target, trusted = tile_and_target(kind, (2.0, 1.0))
    fixed, done = correction.correct(tile, target, trusted, register=True, colour=False)
    assert fixed is tile and done.note == "too little detail to measure a shift"


def test_another_picture_is_not_moved(correction) -> None:
    _, target, trusted = tile_and_target("textured", (0.0, 0.0))
    for seed in range(4):
        tile = pictures.textured(SIDE, SIDE, seed + 50)
        fixed, done = correction.correct(tile, target, trusted, register=True, colour=False)
        assert fixed is tile and done.note


def test_nothing_is_moved_along_stripes(correction) -> None:
    place = torch.arange(SIDE + 8.0)
    stripes = (0.5 + 0.3 * torch.sin(place / 5)).expand(SIDE + 8, -1)[None, ..., None]
    whole = stripes.expand(-1, -1, -1, 3).contiguous()
    target, tile = whole[:, 8:, 8:], pictures.noisy(whole[:, 3:-5, 6:-2], 0.01)
    _, done = correction.correct(
        tile, target, torch.ones(1, SIDE, SIDE), register=True, colour=False
    )
    assert abs(done.down) < 0.1 and abs(done.right + 2) < 0.1, done


def test_where_all_was_edited_nothing_is_corrected(correction) -> None:
    tile, target, trusted = tile_and_target("textured", (2.0, 1.0))
    fixed, done = correction.correct(tile, target, 0.01 * trusted, register=True, colour=True)
    assert fixed is tile
    assert done == (0, 0, (0, 0, 0), "edited everywhere, nothing to compare with", 0)


def test_each_correction_can_be_switched_off(correction) -> None:
    tile, target, trusted = tile_and_target("textured", (2.0, 1.0))
    tile = (tile + 0.03).clamp(0, 1)
    same, done = correction.correct(tile, target, trusted, register=False, colour=False)
    assert same is tile and done == (0, 0, (0, 0, 0), "", 0)
    _, done = correction.correct(tile, target, trusted, register=True, colour=False)
    assert done.down and done.colour == (0, 0, 0)
    _, done = correction.correct(target + 0.03, target, trusted, register=False, colour=True)
    assert not done.down and done.colour == pytest.approx((-7.65,) * 3)


def test_a_difference_that_is_no_drift_is_told(correction) -> None:
    tile, target, trusted = tile_and_target("flat", (0.0, 0.0))
    _, done = correction.correct(tile + 0.2, target, trusted, register=False, colour=True)
    assert done.colour == pytest.approx((-51,) * 3, abs=1e-3) and done.far == 1
    assert done.note == (
        "100% of what the guide leaves alone differed by more than 24 of 255 and was put back"
    )


def test_a_tile_that_is_moved_stays_between_black_and_white(correction) -> None:
    """Cubic splines swing beyond a hard edge."""
    tile, target, trusted = tile_and_target("text", (1.4, -2.3))
    tile, target = ((t > 0.5).float() for t in (tile, target))
    fixed, done = correction.correct(tile, target, trusted, register=True, colour=False)
    assert done.down and fixed.min() >= 0 and fixed.max() <= 1


def test_without_scikit_image_a_sentence_says_what_to_do(correction, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    tile, target, trusted = tile_and_target("flat", (0.0, 0.0))
    with pytest.raises(ImportError, match="pip install scikit-image"):
        correction.correct(tile, target, trusted, register=True, colour=False)
    correction.correct(tile, target, trusted, register=False, colour=True)
