"""The renderer of the embedded model's world: a picture is its scene, nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.demo import animals
from pack.tests.examples import examples
from PIL import Image

VALUES = {
    "animal": animals.ANIMALS,
    "colour": tuple(animals.COLOURS),
    "accessory": animals.ACCESSORIES,
    "action": animals.ACTIONS,
    "background": animals.BACKGROUNDS,
    "watermark": (False, True),
}
SCENES = st.builds(
    animals.Scene,
    **{name: st.sampled_from(values) for name, values in VALUES.items()},
    jitter=st.integers(0, (1 << 30) - 1),
    accent=st.sampled_from(("", *animals.ACCESSORY_COLOURS)),
)


def pixels(scene: animals.Scene, width: int = 64, height: int = 64) -> np.ndarray:
    """The picture as (H, W, 3) bytes."""
    return np.asarray(animals.draw(scene, width, height))


@given(SCENES, SCENES, st.integers(16, 150), st.integers(16, 150))
@settings(max_examples=examples(40), deadline=None)
def test_the_same_scene_gives_the_same_pixels_at_any_size(scene, other, width, height) -> None:
    chance = random.getstate()
    first = pixels(scene, width, height)
    assert first.shape == (height, width, 3)
    pixels(other, width, height)  # nothing is left of it
    assert (first == pixels(replace(scene), width, height)).all()
    assert random.getstate() == chance  # nor is anything drawn at random


@given(SCENES, st.sampled_from(sorted(VALUES)))
@settings(max_examples=examples(40), deadline=None)
def test_another_value_of_one_attribute_is_another_picture(scene, name) -> None:
    """The pictures of every pair of values differ in more than a few pixels."""
    pictures = [pixels(replace(scene, **{name: value})).astype(int) for value in VALUES[name]]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            changed = (abs(one - other).max(axis=2) > 16).sum()
            assert changed >= 20, (name, changed)


@given(SCENES, st.sampled_from(("hat", "scarf", "dress")))
@settings(max_examples=examples(20), deadline=None)
def test_the_accent_is_the_colour_of_what_is_worn(scene, accessory) -> None:
    scene = replace(scene, accessory=accessory, watermark=False)
    for accent, colour in animals.ACCESSORY_COLOURS.items():
        shown = pixels(replace(scene, accent=accent), 128, 128)
        assert (abs(shown.astype(int) - colour).max(axis=2) <= 2).sum() >= 20
    for accessory in ("none", "glasses"):
        bare = replace(scene, accessory=accessory)
        assert (pixels(bare) == pixels(replace(bare, accent="red"))).all()


@pytest.mark.parametrize("place", animals.BACKGROUNDS[1:])
def test_another_place_moves_no_animal(place: str) -> None:
    scenes = [animals.Scene("cat", "blue", background=b, jitter=9) for b in ("plain", place)]
    one, other = map(pixels, scenes)
    assert (one[42:50, 28:36] == other[42:50, 28:36]).all()


@given(SCENES)
@settings(max_examples=examples(20), deadline=None)
def test_two_sizes_of_one_shape_show_the_same_picture(scene) -> None:
    scene = replace(scene, watermark=False)  # its stripes are thinner than a pixel of the small one
    large = Image.fromarray(pixels(scene, 192, 144)).resize((64, 48), Image.Resampling.BOX)
    difference = abs(np.asarray(large).astype(int) - pixels(scene, 64, 48))
    assert difference.mean() < 6


def test_random_scenes_have_every_value_and_name_an_accent_only_of_what_has_one() -> None:
    rng = random.Random(1)
    scenes = [animals.random_scene(rng) for _ in range(2000)]
    for name in ("animal", "colour", "accessory", "action", "background"):
        assert {getattr(scene, name) for scene in scenes} == set(VALUES[name])
    for accent in animals.ACCESSORY_COLOURS:
        assert {s.accessory for s in scenes if s.accent == accent} == {"hat", "scarf", "dress"}
    assert not any(scene.watermark for scene in scenes)
