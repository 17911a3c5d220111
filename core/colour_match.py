"""What separates a tile's colours from its target's over wide distances, and nothing finer.

Normalised convolution (Knutsson and Westin 1993): only trusted places count, and what they tell is
carried on smoothly over the rest. Computed on a small copy: such a difference is smooth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # cells along the longer side of the small copy, at most
CELL = 8  # pixels of a cell's side, at least: texture that has moved is the same on the average
REACH = 1 / 20  # standard deviation of the blur, of the longer side
MOST = 24 / 255  # more is no drift: taken off where trusted, but not carried on
TWICE = 8  # rounds in which what is left is matched again (Tukey's twicing)
LEAST_TRUST = 0.02  # of the tile
FAINT = 1e-3  # weight of the tile's mean difference, where nothing trusted is near


class Match(NamedTuple):
    """What to add to a tile, (1, h, w, 3); how much of what was trusted lay beyond `MOST`."""

    difference: Tensor
    beyond: float


def trust(trusted: Tensor) -> float:
    """The share of a tile that can be trusted."""
    return float(trusted.float().mean())


def colour_match(tile: Tensor, target: Tensor, trusted: Tensor) -> Match:
    """What a tile (1, h, w, 3) lacks of the target's colours where they are `trusted`, (1, h, w).

    Trust is in 0..1; at least `LEAST_TRUST` of the tile must have some.
    """
    small = _small(
        torch.cat([tile, target, trusted[..., None]], -1).movedim(-1, 1).float(), trusted
    )
    channels = tile.shape[-1]
    own, wanted, weight = small.split([channels, channels, 1], 1)
    apart = (wanted - own) / weight.clamp(min=1e-6)
    beyond = (apart.abs().amax(1, keepdim=True) > MOST).float()
    apart = apart.clamp(-MOST, MOST)
    smooth = torch.zeros_like(apart)
    for _ in range(1 + TWICE):
        smooth = smooth + _carried(apart - smooth, weight)
    smooth = smooth.clamp(-MOST, MOST)
    # Far off where the target is the truth: the tile went wrong there, and follows it.
    known = (weight > 1e-6).float()
    rest = known * beyond * ((wanted - own) / weight.clamp(min=1e-6) - smooth)
    smooth, rest, known = (
        F.interpolate(v, size=tile.shape[1:3], mode="bilinear").movedim(1, -1)
        for v in (smooth, rest, known)
    )
    rest = rest / known.clamp(min=1e-6) * trusted[..., None]
    return Match(smooth + rest, float((beyond * weight).sum() / weight.sum()))


def _small(values: Tensor, trusted: Tensor) -> Tensor:
    """Sums by trust over the cells of the small copy; the last channel is the trust itself."""
    height, width = values.shape[-2:]
    scale = max(CELL, max(height, width) / SIDE)
    weighted = torch.cat([values[:, :-1] * trusted[:, None], values[:, -1:]], 1)
    return F.adaptive_avg_pool2d(
        weighted, (max(1, int(height / scale)), max(1, int(width / scale)))
    )


def _carried(values: Tensor, weight: Tensor) -> Tensor:
    """Blurred over what has weight. Every cell reaches every other: no hole is too wide."""
    rows, columns = (
        _gaussian(side, max(values.shape[-2:]), values.device) for side in values.shape[-2:]
    )
    mean = (values * weight).sum((-2, -1), keepdim=True) / weight.sum()
    total = rows @ (values * weight) @ columns + FAINT * mean
    return total / (rows @ weight @ columns + FAINT)


def _gaussian(side: int, longest: int, device: torch.device) -> Tensor:
    """The weight of each cell of a side for each other, (side, side), rows that sum to one."""
    place = torch.arange(side, dtype=torch.float32, device=device)
    weights = torch.exp(-((place[:, None] - place) / (REACH * longest)).square() / 2)
    return weights / weights.sum(1)[side // 2]
