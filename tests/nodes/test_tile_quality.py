"""Seams, shift and colour of tiled edits, sampled by ComfyUI on a model with known faults."""

from __future__ import annotations

import math

import pytest
import torch
from pack.benchmarks import tile_quality as quality
from pack.benchmarks.tile_figures import Figures, measure, step_of
from pack.benchmarks.tile_quality import Faults
from pack.core.tiling import TileGrid
from pack.tests.host import Host

SIDE = 512
GRID = TileGrid.cover(SIDE, SIDE, quality.TILE, quality.OVERLAP, 32, 16)
KINDS = tuple(quality.pictures.PICTURES)
STEP = 0.5  # of 255: what 8 bits cannot show
# All tiles alike, but for a rest: what the steps of one sampling agree upon. Each on its own: what
# tiles that do not know of each other do.
FAULTS = {"together": Faults(), "one after another": Faults(shift=0.3, apart=1.5)}


@pytest.fixture(scope="module")
def faulty(host: Host) -> Host:
    """The host with the nodes of the benchmark."""
    quality.add_nodes(host)
    return host


def figures(host: Host, kind: str, mode: str, faults: Faults, **inputs: object) -> Figures:
    """Of an edit that should change nothing. One after another, a tile's last step decides alone."""
    inputs = {"steps": 2 if mode == "together" else 1, **inputs}
    graph = quality.tiled_edit(quality.write(host, kind, SIDE), faults, mode=mode, **inputs)
    with torch.inference_mode():
        return measure(*quality.edited(host, graph), GRID)


# Both ways, each with a picture whose shift can be measured and one whose colour is plain.
WAYS = [
    ("flat", "together"),
    ("gradient", "one after another"),
    ("textured", "together"),
    ("text", "one after another"),
]


@pytest.mark.parametrize(("kind", "mode"), WAYS)
def test_no_seam_no_shift_and_no_drift_is_left(faulty, kind: str, mode: str) -> None:
    found = figures(faulty, kind, mode, FAULTS[mode])
    assert found.seam < 1.05 and found.step < STEP
    assert found.colour < 1
    assert math.isnan(found.shift) if kind in ("flat", "gradient") else found.shift < 0.25


@pytest.mark.parametrize("kind", ["gradient", "text"])
def test_without_corrections_the_faults_are_seen(faulty, kind: str) -> None:
    off = {"registration": False, "colour_match": False, "steps": 2}
    found = figures(faulty, kind, "one after another", FAULTS["one after another"], **off)
    assert found.colour > 2 and found.step > 3 * STEP
    assert found.seam > 1.05 or kind in ("textured", "text")  # their own edges hide it there
    assert math.isnan(found.shift) if kind in ("flat", "gradient") else found.shift > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_seam_is_seen_on_every_picture(kind: str) -> None:
    """A tile that is lighter than its neighbours, cut hard or blended; a line between tiles."""
    picture = quality.drawn(kind, SIDE)
    assert step_of(picture - picture, GRID) == 0
    middle, fall = SIDE // 2, torch.linspace(1, 0, quality.OVERLAP)
    hard, blended, line = torch.zeros(3, 1, SIDE, SIDE, 1).unbind()
    hard[:, :middle, :middle] = 4
    blended[:, :, : middle - 16], blended[:, :, middle - 16 : middle + 16] = 4, 4 * fall[:, None]
    line[:, middle - 1 : middle + 1] = 16
    for added in (hard, blended, line):
        assert step_of(picture + added / 255 - picture, GRID) > 1.9 * STEP


def test_an_edit_that_lies_four_pixels_off_is_put_back(faulty) -> None:
    found = figures(faulty, "textured", "together", Faults(shift=4.0))
    assert found.shift < 0.25 and found.colour < 1
