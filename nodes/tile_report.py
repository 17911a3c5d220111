"""What a tiled edit did: for the node, its report, its plan and the metadata of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core import tile_plan
from .edit_encoding import Outcome, told
from .outcome import versions
from .tile_correction import Correction
from .tile_editing import START, Edited, Settings

LEAST_MOVE, LEAST_COLOUR = 0.005, 0.05  # pixels, of 255: what rounds to zero in the text
ASTRAY = 0.5  # of the way from the guide to the original: measured, edits are lost from here on
FAR = 0.5  # of what can be compared of a tile


def plan_of(picture: Tensor, edited: Edited) -> Tensor:
    """The plan over the picture, with what was corrected as labels, (1, h, w, 3)."""
    grid, window, _ = edited.tiles
    labels = [_label(edited.corrections.get(i)) for i in range(len(grid))]
    return tile_plan.draw(picture, grid, window, labels=labels, skipped=edited.tiles.skipped())


def _label(made: Correction | None) -> str:
    if made is None or not _moved(made):
        return ""
    return f"{_signed(made.down)} {_signed(made.right)} px"


def _moved(made: Correction) -> bool:
    return max(abs(made.down), abs(made.right)) >= LEAST_MOVE


def _most_moved(every: Sequence[Correction]) -> float:
    """In pixels, along one axis."""
    return max((max(abs(c.down), abs(c.right)) for c in every), default=0.0)


def _most_coloured(every: Sequence[Correction]) -> float:
    """Of 255, in one channel."""
    return max((max(map(abs, c.colour)) for c in every), default=0.0)


def _tiles(number: int) -> str:
    return "1 tile" if number == 1 else f"{number} tiles"


def _signed(number: float) -> str:
    """With one place and its sign; what rounds to nothing has that of a sum, not -0.0."""
    return f"{round(number, 1) + 0.0:+.1f}"


def _way(pixels: float, ahead: str, back: str) -> str:
    """A part of a movement, without a sign."""
    return f"{abs(pixels):.2f} px {back if pixels < 0 else ahead}"


def _told(made: Correction) -> str:
    """One correction in words."""
    parts = []
    if _moved(made):
        ways = (_way(made.down, "down", "up"), _way(made.right, "right", "left"))
        parts.append(f"moved {', '.join(ways)}")
    if _most_coloured([made]) >= LEAST_COLOUR:
        parts.append(f"colour {' '.join(map(_signed, made.colour))} of 255")
    return "; ".join(filter(None, [*parts, made.note])) or "nothing to correct"


class Report:
    """Of all pictures of a run."""

    def __init__(self, settings: Settings, made: Sequence[Edited]) -> None:
        self._settings, self._made = settings, made
        self._notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Something to be told besides."""
        if sentence:
            self._notes.append(sentence)

    # ---------------------------------------------------------------------------- the status line
    def line(self, conditionings: Sequence[Outcome], references: Sequence[Outcome]) -> str:
        """For the node."""
        tiles = sum(len(made.tiles.grid) for made in self._made)
        active = sum(len(made.tiles.active) for made in self._made)
        parts = [f"{active} of {tiles} tiles edited"]
        if not active:
            parts = [self._why_nothing()]
        corrections = [c for made in self._made for c in made.corrections.values()]
        if (most := _most_moved(corrections)) >= LEAST_MOVE:
            parts.append(f"moved by up to {most:.2f} px")
        if (most := _most_coloured(corrections)) >= LEAST_COLOUR:
            parts.append(f"colour by up to {most:.1f} of 255")
        parts += self._warnings()
        if any(made.mask_resized for made in self._made):
            parts.append("mask resized to the picture")
        if conditionings:
            parts.append(told("conditioning: ", conditionings))
        if references:
            parts.append(told("latents: ", references))
        return " · ".join([*parts, *self._notes])

    def _warnings(self) -> list[str]:
        """What the user should know of and can do something about."""
        astray = sum(d > ASTRAY for made in self._made for d in made.differences.values())
        far = sum(c.far > FAR for made in self._made for c in made.corrections.values())
        parts = []
        if astray:
            parts.append(f"{_tiles(astray)} far from the guide: lower denoise")
        if far:
            parts.append(f"{_tiles(far)} far from the picture put back: lower denoise")
        if any(made.was_tiled for made in self._made):
            parts.append("tiling of the model left out")
        return parts

    def _why_nothing(self) -> str:
        """Why no tile was edited."""
        if all(len(made.untouched) == len(made.tiles.grid) for made in self._made):
            return "nothing edited: the mask is empty"
        most = max(made.guide.most for made in self._made if made.guide is not None)
        return (
            f"nothing edited: the guide changes at most {most:.1f} of 255, skip_threshold is "
            f"{self._settings.skip_threshold:g}: lower it"
        )

    # --------------------------------------------------------------------------------- the report
    def text(self) -> str:
        """A few lines for each picture."""
        lines = [line for n, made in enumerate(self._made, 1) for line in self._picture(n, made)]
        return "\n".join([*lines, *self._notes])

    def _picture(self, number: int, made: Edited) -> list[str]:
        grid, settings = made.tiles.grid, self._settings
        height, width = made.image.shape[1:3]
        few = len(grid) == 1
        lines = [
            f"Picture {number}: {width}x{height} px, {len(grid)} tile{'' if few else 's'} of "
            f"{grid.tile_width}x{grid.tile_height} px, {settings.mode}, window {made.tiles.window}."
        ]
        lines += self._guide(made)
        if skipped := len(made.tiles.skipped()):
            masked = len(made.untouched)
            why = [f"{masked} by the mask"] if masked else []
            if skipped > masked:
                why.append(
                    f"{skipped - masked} because the guide changes them by less than "
                    f"{settings.skip_threshold:g} of 255"
                )
            lines.append(f"{skipped} of {len(grid)} tiles keep their pixels: {', '.join(why)}.")
        if made.mask_resized:
            lines.append("The mask had another size than the picture and was resized to it.")
        lines += [f"Tile {i + 1}: {_told(c)}." for i, c in sorted(made.corrections.items())]
        lines += [
            f"Tile {i + 1} is far from the guide where that changes the picture: lower denoise."
            for i, difference in sorted(made.differences.items())
            if difference > ASTRAY
        ]
        if made.was_tiled:
            lines.append("The model was tiled by a node in front; that tiling was left out.")
        return lines

    def _guide(self, made: Edited) -> list[str]:
        if made.guide is None:
            if len(made.tiles.grid) > 1:
                return []
            whole = "; it is edited with denoise 1" if self._settings.guide == START else ""
            return [f"No guide: a single tile needs none{whole}."]
        size = made.guide.frame.size
        return [
            f"Guide: {size.width}x{size.height} px, {self._settings.guide}; "
            f"changes at most {made.guide.most:.1f} of 255; {_told(made.guide.correction)}."
        ]

    # ------------------------------------------------------------------------------- the metadata
    def facts(self) -> dict[str, Any]:
        """The same as data."""
        return {"pictures": [self._facts(made) for made in self._made], "versions": versions()}

    def _facts(self, made: Edited) -> dict[str, Any]:
        grid, guide = made.tiles.grid, made.guide
        return {
            "mode": self._settings.mode,
            "tiles": len(grid),
            "tile_px": [grid.tile_width, grid.tile_height],
            "window": made.tiles.window,
            "edited_tiles": sorted(i + 1 for i in made.tiles.active),
            "guide_px": list(guide.frame.size) if guide else None,
            "guide_moved_px": [guide.correction.down, guide.correction.right] if guide else None,
            "moved_px": {str(i + 1): [c.down, c.right] for i, c in made.corrections.items()},
            "colour_of_255": {str(i + 1): list(c.colour) for i, c in made.corrections.items()},
            "notes": {str(i + 1): c.note for i, c in made.corrections.items() if c.note},
            "guide_changes_of_255": guide.most if guide else None,
            "far_from_guide": {str(i + 1): d for i, d in made.differences.items()},
            "tiling_left_out": made.was_tiled,
            "mask_resized": made.mask_resized,
        }
