"""The renderer and the prompts of the embedded model's world."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pack.demo import animals, prompts


def test_same_scene_same_pixels() -> None:
    scene = animals.Scene("bear", "red", "hat", "dancing", "snow", jitter=5)
    one, other = (np.asarray(animals.draw(scene, 96, 64)) for _ in range(2))
    assert one.shape == (64, 96, 3)
    assert (one == other).all()


def test_another_place_moves_no_animal() -> None:
    scenes = [animals.Scene("cat", "blue", background=b, jitter=9) for b in ("plain", "night")]
    one, other = (np.asarray(animals.draw(scene, 64, 64)) for scene in scenes)
    assert (one[42:50, 28:36] == other[42:50, 28:36]).all()


@pytest.mark.parametrize("seed", range(50))
def test_prompts_name_what_is_not_default(seed: int) -> None:
    rng = random.Random(seed)
    scene = animals.random_scene(rng)
    text = prompts.describe(rng, scene).lower()
    for value in (scene.animal, scene.colour, scene.accessory):
        if value not in ("none", animals.NATURAL[scene.animal]):
            words = [*prompts.EN[value], *prompts.ZH[value]]
            assert any(word.lower() in text for word in words), (value, text)
