"""What pictures of the embedded model's world can show: scenes and their attributes."""

from __future__ import annotations

import random
from dataclasses import dataclass

Colour = tuple[int, int, int]

ANIMALS = (
    *("bear", "bunny", "cat", "dog", "fox", "pig"),
    *("mouse", "panda", "frog", "duck", "elephant", "lion"),
)
COLOURS: dict[str, Colour] = {
    "red": (222, 66, 56),
    "orange": (243, 147, 47),
    "yellow": (247, 212, 66),
    "green": (98, 180, 84),
    "blue": (74, 130, 222),
    "purple": (146, 92, 196),
    "pink": (245, 152, 186),
    "brown": (150, 100, 62),
}
ACCESSORIES = ("none", "hat", "scarf", "dress", "glasses")
ACTIONS = ("standing", "sitting", "dancing", "sleeping", "reading")
BACKGROUNDS = ("plain", "meadow", "snow", "beach", "night", "room")
ACCESSORY_COLOURS: dict[str, Colour] = {
    "red": (214, 48, 74),
    "blue": (40, 98, 200),
    "green": (36, 150, 110),
    "purple": (122, 70, 180),
}
NATURAL = {
    "bear": "brown",
    "bunny": "pink",
    "cat": "orange",
    "dog": "brown",
    "fox": "orange",
    "pig": "pink",
    "mouse": "purple",
    "panda": "blue",
    "frog": "green",
    "duck": "yellow",
    "elephant": "blue",
    "lion": "yellow",
}  # the colour of an animal when nobody says one


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `jitter` seeds the small differences between equal descriptions."""

    animal: str
    colour: str
    accessory: str = "none"
    action: str = "standing"
    background: str = "plain"
    watermark: bool = False
    jitter: int = 0
    accent: str = ""  # the colour of a hat, scarf or dress; empty: any


def random_scene(rng: random.Random) -> Scene:
    """Every attribute drawn on its own; what prompts often leave out is drawn more often."""
    animal = rng.choice(ANIMALS)
    accessory = "none" if rng.random() < 0.35 else rng.choice(ACCESSORIES[1:])
    named = accessory in ("hat", "scarf", "dress") and rng.random() < 0.3
    return Scene(
        animal,
        NATURAL[animal] if rng.random() < 0.15 else rng.choice(list(COLOURS)),
        accessory,
        "standing" if rng.random() < 0.2 else rng.choice(ACTIONS),
        "plain" if rng.random() < 0.15 else rng.choice(BACKGROUNDS),
        False,
        rng.randrange(1 << 30),
        rng.choice(list(ACCESSORY_COLOURS)) if named else "",
    )
