"""An edited tile brought back to where its target has it, and to its target's colours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..core import colour_match
from . import registration


class Correction(NamedTuple):
    """What was done to a tile.

    `down` and `right` are the pixels that it was moved by, `colour` the mean of what was added to
    red, green and blue, of 255. `note` says what was not corrected and why, or is empty. `far` is
    how much of what can be compared was off by more than a drift.
    """

    down: float
    right: float
    colour: tuple[float, float, float]
    note: str
    far: float = 0.0


NOTHING = (0.0, 0.0, 0.0)


def correct(
    tile: Tensor, target: Tensor, unchanged: Tensor, *, register: bool, colour: bool
) -> tuple[Tensor, Correction]:
    """A tile (1, h, w, 3) moved onto its target, then in its colours.

    `unchanged` (1, h, w) in 0..1 says where the target can be trusted pixel by pixel. Where it
    cannot, the tile gets what its surroundings get. Raises ImportError: `register` without
    scikit-image.
    """
    if not (register or colour):
        return tile, Correction(0.0, 0.0, NOTHING, "")
    if colour_match.trust(unchanged) < colour_match.LEAST_TRUST:
        return tile, Correction(0.0, 0.0, NOTHING, "edited everywhere, nothing to compare with")
    notes = []
    by = registration.Displacement(0.0, 0.0)
    if register:
        by = registration.displacement(tile, target, unchanged)
        if by.down or by.right:
            tile = registration.moved(tile, by).clamp(0, 1)  # cubic splines overshoot
        notes.append(by.note)
    added, far = NOTHING, 0.0
    if colour:
        match = colour_match.colour_match(tile, target, unchanged)
        tile = (tile + match.difference).clamp(0, 1)
        red, green, blue = (255 * match.difference.mean((0, 1, 2))).tolist()
        added, far = (red, green, blue), match.beyond
        notes.append(_told(match))
    return tile, Correction(by.down, by.right, added, "; ".join(filter(None, notes)), far)


def _told(match: colour_match.Match) -> str:
    """About a tile that was more than a drift off."""
    if match.beyond < 0.1:
        return ""
    most = round(255 * colour_match.MOST)
    return (
        f"{match.beyond:.0%} of what the guide leaves alone differed by more than {most} of 255 "
        "and was put back"
    )
