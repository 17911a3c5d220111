"""Draws one animal, part by part, in coordinates of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import ImageDraw

from .scenes import Colour, Scene

Point = tuple[float, float]

DARK: Colour = (52, 40, 44)
WHITE: Colour = (252, 250, 246)


def shade(colour: Colour, factor: float) -> Colour:
    """Lighter above 1, darker below."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws in units of half the shorter side around a centre, turned by an angle."""

    def __init__(self, draw: ImageDraw.ImageDraw, centre: Point, unit: float, angle: float) -> None:
        self.draw, self.centre, self.unit = draw, centre, unit
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point."""
        return (
            self.centre[0] + self.unit * (x * self.cos - y * self.sin),
            self.centre[1] + self.unit * (x * self.sin + y * self.cos),
        )

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([self.at(*p) for p in points], fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour, turn: float = 0) -> None:
        """A filled ellipse, turned by `turn` radians about its centre."""
        c, s = math.cos(turn), math.sin(turn)
        ring = [
            (rx * math.cos(t / 20 * math.pi), ry * math.sin(t / 20 * math.pi)) for t in range(40)
        ]
        self.polygon([(x + a * c - b * s, y + a * s + b * c) for a, b in ring], fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        """A line of `width` units."""
        pixels = max(1, round(width * self.unit))
        self.draw.line([self.at(*p) for p in points], fill=fill, width=pixels, joint="curve")


def ears_round(pen: Pen, body: Colour, inner: Colour) -> None:
    """Bear, mouse, panda, lion: two discs."""
    for side in (-1, 1):
        pen.oval(side * 0.3, -0.68, 0.15, 0.15, body)
        pen.oval(side * 0.3, -0.68, 0.08, 0.08, inner)


def ears_big(pen: Pen, body: Colour, inner: Colour) -> None:
    """Mouse: discs as large as half the head."""
    for side in (-1, 1):
        pen.oval(side * 0.4, -0.68, 0.24, 0.24, body)
        pen.oval(side * 0.4, -0.68, 0.15, 0.15, inner)


def ears_long(pen: Pen, body: Colour, inner: Colour) -> None:
    """Bunny."""
    for side in (-1, 1):
        pen.oval(side * 0.17, -0.9, 0.11, 0.32, body, side * 0.15)
        pen.oval(side * 0.17, -0.9, 0.05, 0.22, inner, side * 0.15)


def ears_pointed(pen: Pen, body: Colour, inner: Colour) -> None:
    """Cat."""
    for side in (-1, 1):
        pen.polygon([(side * 0.1, -0.72), (side * 0.42, -0.92), (side * 0.42, -0.48)], body)
        pen.polygon([(side * 0.2, -0.7), (side * 0.37, -0.82), (side * 0.37, -0.56)], inner)


def ears_fox(pen: Pen, body: Colour, inner: Colour) -> None:
    """Fox: tall, dark at the tip."""
    for side in (-1, 1):
        pen.polygon([(side * 0.08, -0.7), (side * 0.38, -1.05), (side * 0.44, -0.46)], body)
        pen.polygon([(side * 0.29, -0.95), (side * 0.38, -1.05), (side * 0.4, -0.86)], DARK)


def ears_floppy(pen: Pen, body: Colour, inner: Colour) -> None:
    """Dog: hanging at the sides."""
    for side in (-1, 1):
        pen.oval(side * 0.43, -0.4, 0.12, 0.28, shade(body, 0.7), side * -0.25)


def ears_folded(pen: Pen, body: Colour, inner: Colour) -> None:
    """Pig: small triangles that bend outwards."""
    for side in (-1, 1):
        pen.polygon(
            [(side * 0.14, -0.76), (side * 0.46, -0.84), (side * 0.34, -0.56)], shade(body, 0.85)
        )


def ears_elephant(pen: Pen, body: Colour, inner: Colour) -> None:
    """Elephant: fans."""
    for side in (-1, 1):
        pen.oval(side * 0.52, -0.42, 0.26, 0.32, body)
        pen.oval(side * 0.52, -0.42, 0.17, 0.22, inner)


def eyes_frog(pen: Pen, body: Colour, inner: Colour) -> None:
    """Frog: eyes on top of the head instead of ears."""
    for side in (-1, 1):
        pen.oval(side * 0.24, -0.74, 0.15, 0.15, body)
        pen.oval(side * 0.24, -0.76, 0.1, 0.1, WHITE)
        pen.oval(side * 0.24, -0.75, 0.05, 0.05, DARK)


def mane(pen: Pen, body: Colour, inner: Colour) -> None:
    """Lion: a ring of tufts behind the head."""
    for i in range(14):
        t = i / 14 * 2 * math.pi
        pen.oval(0.46 * math.cos(t), -0.42 + 0.44 * math.sin(t), 0.15, 0.15, shade(body, 0.6))
    ears_round(pen, body, inner)


def no_ears(pen: Pen, body: Colour, inner: Colour) -> None:
    """Duck: a tuft."""
    for turn in (-0.4, 0, 0.4):
        pen.oval(turn * 0.2, -0.82, 0.03, 0.11, shade(body, 0.8), turn)


EARS: dict[str, Callable[[Pen, Colour, Colour], None]] = {
    "bear": ears_round,
    "bunny": ears_long,
    "cat": ears_pointed,
    "dog": ears_floppy,
    "fox": ears_fox,
    "pig": ears_folded,
    "mouse": ears_big,
    "panda": ears_round,
    "frog": eyes_frog,
    "duck": no_ears,
    "elephant": ears_elephant,
    "lion": mane,
}


def face(pen: Pen, scene: Scene, body: Colour) -> None:
    """Eyes, nose and mouth, and what only one animal has."""
    asleep = scene.action == "sleeping"
    if scene.animal == "panda":
        for side in (-1, 1):
            pen.oval(side * 0.18, -0.46, 0.11, 0.13, shade(body, 0.45), side * 0.4)
    if scene.animal == "fox":
        pen.polygon([(-0.4, -0.36), (0.4, -0.36), (0, -0.06)], WHITE)
    if scene.animal != "frog" or asleep:
        for side in (-1, 1):
            if asleep:
                pen.line(
                    [(side * 0.1, -0.46), (side * 0.18, -0.42), (side * 0.26, -0.46)], DARK, 0.035
                )
            else:
                pen.oval(side * 0.18, -0.47, 0.075, 0.085, WHITE)
                pen.oval(side * 0.17, -0.46, 0.045, 0.055, DARK)
    muzzle(pen, scene.animal, body)


def muzzle(pen: Pen, animal: str, body: Colour) -> None:
    """What is in the middle of the face."""
    if animal == "duck":
        pen.oval(0, -0.25, 0.24, 0.09, (246, 160, 40))
        pen.line([(-0.2, -0.25), (0.2, -0.25)], (190, 110, 20), 0.025)
    elif animal == "elephant":
        pen.line([(0, -0.38), (0.02, -0.2), (0.0, 0.0), (0.14, 0.1)], shade(body, 0.75), 0.15)
    elif animal == "pig":
        pen.oval(0, -0.28, 0.16, 0.11, shade(body, 0.75))
        for side in (-1, 1):
            pen.oval(side * 0.06, -0.28, 0.03, 0.04, DARK)
    elif animal == "frog":
        pen.line([(-0.26, -0.32), (0, -0.22), (0.26, -0.32)], DARK, 0.035)
    else:
        pen.oval(0, -0.27, 0.17, 0.12, shade(body, 1.6))
        pen.oval(0, -0.33, 0.06, 0.045, DARK)
        pen.line([(-0.09, -0.25), (0, -0.21), (0.09, -0.25)], DARK, 0.025)
        if animal in ("cat", "mouse", "lion"):
            for side in (-1, 1):
                for dy in (-0.03, 0.05):
                    pen.line([(side * 0.14, -0.28 + dy / 2), (side * 0.4, -0.28 + dy)], DARK, 0.016)


def tail(pen: Pen, animal: str, body: Colour) -> None:
    """Behind the body."""
    if animal in ("cat", "mouse", "lion"):
        pen.line([(0.25, 0.55), (0.55, 0.5), (0.62, 0.2)], shade(body, 0.85), 0.06)
        if animal == "lion":
            pen.oval(0.62, 0.18, 0.08, 0.09, shade(body, 0.6))
    elif animal == "fox":
        pen.oval(0.48, 0.45, 0.15, 0.32, body, 0.5)
        pen.oval(0.58, 0.26, 0.09, 0.13, WHITE, 0.5)
    elif animal == "bunny":
        pen.oval(0.34, 0.6, 0.12, 0.12, WHITE)
    elif animal == "dog":
        pen.line([(0.25, 0.5), (0.5, 0.25)], shade(body, 0.85), 0.09)


def limbs(pen: Pen, scene: Scene, body: Colour) -> None:
    """Arms and legs tell the action."""
    dark = shade(body, 0.86)
    if scene.action == "sitting":
        for side in (-1, 1):
            pen.oval(side * 0.36, 0.78, 0.24, 0.12, dark, side * 0.2)
            pen.oval(side * 0.56, 0.76, 0.09, 0.12, shade(body, 1.4))
            pen.oval(side * 0.33, 0.35, 0.09, 0.22, dark, side * -0.3)
        return
    for side in (-1, 1):
        foot = side * (0.3 if scene.action == "dancing" else 0.17)
        lift = 0.12 if scene.action == "dancing" and side > 0 else 0.0
        pen.line([(side * 0.15, 0.6), (foot, 0.86 - lift)], dark, 0.16)
        pen.oval(foot + side * 0.04, 0.88 - lift, 0.13, 0.075, dark)
    if scene.action == "dancing":
        for side in (-1, 1):
            pen.line([(side * 0.24, 0.22), (side * 0.6, -0.12)], dark, 0.13)
            pen.oval(side * 0.61, -0.14, 0.08, 0.08, dark)
    elif scene.action == "reading":
        for side in (-1, 1):
            pen.line([(side * 0.28, 0.22), (side * 0.34, 0.45), (side * 0.2, 0.5)], dark, 0.12)
    else:
        for side in (-1, 1):
            pen.oval(side * 0.36, 0.34, 0.08, 0.22, dark, side * -0.35)


def book(pen: Pen) -> None:
    """An open book in front of the chest."""
    for side in (-1, 1):
        pen.polygon([(0, 0.36), (side * 0.34, 0.3), (side * 0.34, 0.64), (0, 0.7)], (176, 52, 60))
        pen.polygon([(0, 0.38), (side * 0.3, 0.33), (side * 0.3, 0.6), (0, 0.66)], WHITE)
        for row in (0.44, 0.51, 0.58):
            pen.line([(side * 0.06, row), (side * 0.26, row - 0.04)], (150, 150, 160), 0.018)


def wear(pen: Pen, accessory: str, colour: Colour) -> None:
    """A hat, a scarf or glasses; a dress is drawn with the body."""
    if accessory == "hat":
        pen.polygon([(-0.27, -0.72), (0.27, -0.72), (0.2, -1.08), (-0.2, -1.08)], colour)
        pen.polygon(
            [(-0.26, -0.8), (0.26, -0.8), (0.245, -0.88), (-0.245, -0.88)], shade(colour, 0.6)
        )
        pen.oval(0, -0.72, 0.44, 0.075, colour)
    elif accessory == "scarf":
        pen.oval(0, 0.03, 0.36, 0.1, colour)
        pen.polygon([(0.1, 0.05), (0.27, 0.03), (0.33, 0.42), (0.15, 0.45)], shade(colour, 0.8))
        for x in (-0.2, 0.0, 0.2):
            pen.oval(x, 0.03, 0.04, 0.09, shade(colour, 1.5))
    elif accessory == "glasses":
        for side in (-1, 1):
            ring = [
                (side * 0.19 + 0.14 * math.cos(t), -0.46 + 0.14 * math.sin(t))
                for t in [i / 12 * math.pi for i in range(25)]
            ]
            pen.line(ring, (24, 24, 30), 0.045)
        pen.line([(-0.06, -0.47), (0.06, -0.47)], (24, 24, 30), 0.045)


def torso(pen: Pen, scene: Scene, body: Colour, accessory: Colour) -> None:
    """Body, belly and dress."""
    pen.oval(0, 0.38, 0.34, 0.38, body)
    pen.oval(0, 0.42, 0.21, 0.26, shade(body, 1.45))
    if scene.accessory == "dress":
        pen.polygon([(-0.22, 0.04), (0.22, 0.04), (0.5, 0.76), (-0.5, 0.76)], accessory)
        pen.polygon(
            [(-0.26, 0.36), (0.26, 0.36), (0.29, 0.44), (-0.29, 0.44)], shade(accessory, 0.65)
        )
        for x, y in ((-0.2, 0.58), (0.02, 0.62), (0.24, 0.58), (-0.08, 0.2), (0.1, 0.22)):
            pen.oval(x, y, 0.035, 0.035, WHITE)


def animal(pen: Pen, scene: Scene, body: Colour, accessory: Colour) -> None:
    """The whole animal, from back to front."""
    inner = shade(body, 1.5)
    tail(pen, scene.animal, body)
    limbs_first = scene.action not in ("dancing", "reading")
    if limbs_first:
        limbs(pen, scene, body)
    torso(pen, scene, body, accessory)
    if not limbs_first:
        limbs(pen, scene, body)
    EARS[scene.animal](pen, shade(body, 0.45) if scene.animal == "panda" else body, inner)
    if scene.animal == "duck":
        pen.oval(0, -0.42, 0.36, 0.38, body)
    else:
        pen.oval(0, -0.42, 0.44, 0.38, body)
    if scene.animal == "frog":
        eyes_frog(pen, body, inner)
    face(pen, scene, body)
    wear(pen, scene.accessory, accessory)
    if scene.action == "reading":
        book(pen)
