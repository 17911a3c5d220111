"""The table of steps, CFG and sampler by free memory: the last resort, and only if allowed.

Fewer steps and a lower CFG change the picture and save time; they do not lower the peak of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

DEFAULT = "12: 30, 7, dpmpp_2m\n8: 25, 6, euler\n0: 20, 5, ddim"
GB = 1_000_000_000  # decimal, as every size that is shown
MOST_STEPS, HIGHEST_CFG = 10_000, 100.0  # of ComfyUI's KSampler
_FULL_WIDTH = str.maketrans("：，．０１２３４５６７８９", ":,.0123456789")  # Chinese keyboards


class Row(NamedTuple):
    """Settings for a device with more than `above` bytes free."""

    above: int
    steps: int
    cfg: float
    sampler: str


def parse(text: str) -> tuple[Row, ...]:
    """Read lines "GB free: steps, CFG, sampler" into rows, most memory first.

    Whether a sampler exists is the host's to say. Raises ValueError naming the line and the remedy.
    """
    rows: dict[int, Row] = {}
    for number, line in enumerate(text.translate(_FULL_WIDTH).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except ValueError as why:
            raise ValueError(f"settings, line {number} ({line.strip()}): {why}") from None
        if row.above in rows:
            raise ValueError(
                f"settings, line {number} ({line.strip()}): an earlier line begins with the same "
                "number; keep one of them."
            )
        rows[row.above] = row
    if 0 not in rows:
        raise ValueError(
            "settings: no line begins with 0; add one for all other cards: 0: 20, 5, ddim"
        )
    return tuple(sorted(rows.values(), reverse=True))


def row_for(rows: Sequence[Row], free_bytes: int) -> Row:
    """The first row (from `parse`) with less than what is free; the last if nothing is."""
    return next((row for row in rows if free_bytes > row.above), rows[-1])


def _row(line: str) -> Row:
    """One line. Raises ValueError with what is wrong and what to do."""
    above, colon, rest = line.partition(":")
    parts = [part.strip() for part in rest.split(",")]
    if not colon or len(parts) != 3 or not parts[2]:
        raise ValueError("write it as GB free: steps, CFG, sampler; for example 8: 25, 6, euler")
    gigabytes = _number(above, "the GB free")
    steps, cfg = _number(parts[0], "steps"), _number(parts[1], "CFG")
    if steps != int(steps) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be a whole number from 1 to {MOST_STEPS}")
    if cfg > HIGHEST_CFG:
        raise ValueError(f"CFG must be a number from 0 to {HIGHEST_CFG:.0f}")
    return Row(round(gigabytes * GB), int(steps), cfg, parts[2])


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a number, 0 or more, not {text.strip() or 'nothing'}")
    return value
