"""The table of steps, CFG and sampler by free memory: the last resort, only if it is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

DEFAULT = "12: 30, 7, dpmpp_2m\n8: 25, 6, euler\n0: 20, 5, ddim"
GB = 1_000_000_000


class Row(NamedTuple):
    """Settings for a device with more than `above` bytes free."""

    above: int
    steps: int
    cfg: float
    sampler: str


def parse(text: str) -> tuple[Row, ...]:
    """Read "GB free: steps, CFG, sampler" lines. Raises ValueError naming line and remedy."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            rows.append(_row(line, number))
    rows.sort(reverse=True)
    return tuple(rows)


def _row(line: str, number: int) -> Row:
    try:
        above, rest = line.split(":")
        steps, cfg, sampler = (part.strip() for part in rest.split(","))
        return Row(round(float(above) * GB), int(steps), float(cfg), sampler)
    except ValueError:
        raise ValueError(
            f"settings, line {number} ({line.strip()!r}): write it as "
            "GB free: steps, CFG, sampler; for example 8: 25, 6, euler."
        ) from None


def row_for(rows: Sequence[Row], free_bytes: int) -> Row:
    """The first row (from `parse`) whose limit lies below what is free."""
    return next((row for row in rows if free_bytes > row.above), rows[-1])
