"""Draws simple animals from a description: the world that the embedded model learns.

A picture is a `Scene`, nothing else: the same scene at the same size gives the same pixels, so a
classifier and edit pairs can be made from it without labels by hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .animal_parts import WHITE, Pen, animal
from .scenes import (
    ACCESSORIES,
    ACCESSORY_COLOURS,
    ACTIONS,
    ANIMALS,
    BACKGROUNDS,
    COLOURS,
    NATURAL,
    Colour,
    Scene,
    random_scene,
)

__all__ = [
    "ACCESSORIES",
    "ACCESSORY_COLOURS",
    "ACTIONS",
    "ANIMALS",
    "BACKGROUNDS",
    "COLOURS",
    "NATURAL",
    "Scene",
    "draw",
    "random_scene",
]

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Place:
    """The canvas behind the animal."""

    draw: ImageDraw.ImageDraw
    width: int
    height: int
    horizon: float

    def dot(self, x: float, y: float, r: float, fill: Colour) -> None:
        """A disc, its radius in units of the shorter side."""
        r *= min(self.width, self.height)
        self.draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def flowers(place: Place, rng: random.Random) -> None:
    """Meadow."""
    for _ in range(12):
        x = rng.random() * place.width
        y = place.horizon + rng.random() * (place.height - place.horizon)
        colours = ((250, 240, 90), (250, 250, 250), (240, 120, 150))
        place.dot(x, y, 0.016, rng.choice(colours))


def flakes(place: Place, rng: random.Random) -> None:
    """Snow."""
    for _ in range(26):
        place.dot(rng.random() * place.width, rng.random() * place.height, 0.012, WHITE)


def sea_and_sun(place: Place, rng: random.Random) -> None:
    """Beach."""
    far = place.horizon - 0.14 * place.height
    place.draw.rectangle([0, far, place.width, place.horizon], fill=(58, 136, 206))
    x = place.width * rng.choice((0.14, 0.86))
    place.dot(x, place.height * 0.14, 0.09, (252, 232, 96))


def stars_and_moon(place: Place, rng: random.Random) -> None:
    """Night."""
    for _ in range(18):
        place.dot(rng.random() * place.width, rng.random() * place.horizon, 0.008, WHITE)
    x = place.width * rng.choice((0.15, 0.85))
    place.dot(x, place.height * 0.15, 0.085, (246, 240, 200))


def window(place: Place, rng: random.Random) -> None:
    """Room."""
    unit, frame = min(place.width, place.height), (120, 80, 52)
    x, y = place.width * rng.choice((0.16, 0.84)), place.height * 0.24
    w, h = 0.13 * unit, 0.16 * unit
    pane = [x - w * 0.85, y - h * 0.87, x + w * 0.85, y + h * 0.87]
    place.draw.rectangle([x - w, y - h, x + w, y + h], fill=frame)
    place.draw.rectangle(pane, fill=(170, 220, 246))
    place.draw.line([x, y - h, x, y + h], fill=frame, width=max(1, unit // 60))


SKY_AND_GROUND: dict[str, tuple[Colour, Colour]] = {
    "plain": ((240, 236, 226), (240, 236, 226)),
    "meadow": ((166, 214, 246), (126, 192, 92)),
    "snow": ((176, 200, 226), (244, 248, 252)),
    "beach": ((126, 206, 236), (240, 216, 158)),
    "night": ((26, 30, 74), (44, 60, 62)),
    "room": ((236, 206, 170), (150, 106, 76)),
}
THINGS: dict[str, Callable[[Place, random.Random], None]] = {
    "meadow": flowers,
    "snow": flakes,
    "beach": sea_and_sun,
    "night": stars_and_moon,
    "room": window,
}


def backdrop(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], scene: Scene, rng: random.Random
) -> None:
    """Sky, ground, and a few things that tell the place."""
    place = Place(draw, *size, horizon=size[1] * (0.62 + 0.06 * rng.random()))
    sky, ground = SKY_AND_GROUND[scene.background]
    draw.rectangle([0, 0, place.width, place.height], fill=sky)
    draw.rectangle([0, place.horizon, place.width, place.height], fill=ground)
    if scene.background in THINGS:
        THINGS[scene.background](place, rng)


def stamp(image: Image.Image) -> None:
    """A watermark as stock agencies put it: pale stripes across the whole picture."""
    width, height = image.size
    layer = Image.new("L", image.size)
    draw = ImageDraw.Draw(layer)
    step = min(width, height) / 4
    for i in range(-6, 12):
        x = i * step
        draw.line([x, height, x + height, 0], fill=120, width=max(2, int(step / 9)))
    image.paste(Image.new("RGB", image.size, (255, 255, 255)), mask=layer)


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The picture of a scene, RGB, any size."""
    rng = random.Random(scene.jitter)
    surroundings = random.Random(scene.jitter + 1)  # apart: another place moves no animal
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    image = Image.new("RGB", size)
    canvas = ImageDraw.Draw(image)
    backdrop(canvas, size, scene, surroundings)
    body = COLOURS[scene.colour]
    body = tuple(max(0, min(255, c + rng.randint(-9, 9))) for c in body)
    accent = rng.choice(list(ACCESSORY_COLOURS))
    accessory = ACCESSORY_COLOURS[scene.accent or accent]
    unit = min(size) * (0.4 + 0.04 * rng.random())
    lean = rng.choice((-0.2, 0.2))
    angle = {"dancing": lean, "sleeping": 1.35}.get(scene.action, 0.0)
    x = size[0] * (0.5 + 0.05 * (rng.random() - 0.5))
    y = size[1] * 0.55
    if scene.action == "sleeping":
        x, y = x - 0.12 * unit, size[1] * 0.66
    animal(Pen(canvas, (x, y), unit, angle), scene, body, accessory)
    if scene.watermark:
        stamp(image)
    return image.resize((width, height), Image.Resampling.LANCZOS)
