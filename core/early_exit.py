"""When sampling has converged: the prediction of the clean image no longer changes.

How far the latent moves in a step tells of the schedule. How far the prediction of the clean image
(x0) moves per unit of sigma tells of the picture, and compares steps of any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_FINITE = "the prediction is not a finite number"
ZERO = "the prediction is zero"
SAME_SIGMA = "the sigma stays the same"
TABLE = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 1.0, 2.0)  # thresholds that the user is told of


class Criterion(NamedTuple):
    """Stop when the change was under `threshold` for `patience` steps in a row, and at least
    `min_steps` are done. A threshold of 0 never stops."""

    threshold: float
    patience: int
    min_steps: int


class Point(NamedTuple):
    """What one step of a sampler showed. `change` per unit of sigma; NaN: not measurable, as for
    the first step."""

    sigma: float
    change: float


class Saving(NamedTuple):
    """What a run would have saved. `steps` and `saved` are None where this run cannot tell: it
    stopped before."""

    threshold: float
    steps: int | None
    saved: int | None


class Curve:
    """The points of one run of a sampler, step by step."""

    def __init__(self, mask: Tensor | None = None) -> None:
        """`mask`: of the shape of x0, above 0 where the picture may change; None: everywhere."""
        self.points: list[Point] = []
        self.problems: list[str] = []  # why changes are not measurable, each once
        self._mask = mask
        self._before: Tensor | None = None

    def add(self, sigma: float, x0: Tensor) -> None:
        """The next step predicted x0 (batch, ...) from a state at this sigma."""
        change = math.nan
        if self._before is not None:
            away = abs(self.points[-1].sigma - sigma)
            relative = relative_change(x0, self._before, self._mask)
            change = relative / away if away > 0 else math.nan
            if not math.isfinite(change):
                self._tell_problem(away, x0, self._before)
        self.points.append(Point(sigma, change))
        self._before = x0.clone()  # a sampler may go on to work in it

    def _tell_problem(self, away: float, x0: Tensor, before: Tensor) -> None:
        """Why two predictions cannot be compared; the largest change of a batch has one reason."""
        finite = bool(x0.isfinite().all() and before.isfinite().all())
        problem = ZERO if finite else NOT_FINITE
        problem = problem if away > 0 else SAME_SIGMA
        if problem not in self.problems:
            self.problems.append(problem)


def relative_change(x0: Tensor, before: Tensor, mask: Tensor | None = None) -> float:
    """The relative L2 change of each item of a batch, the largest of them; NaN if any has none.

    With a mask only what it lets change counts, or a small mask would hide any change: the rest is
    the original picture. An item that may not change at all has not changed.
    """
    changed, size = x0.float() - before.float(), before.float()
    if mask is not None:
        inside = (mask > 0).expand_as(size)
        changed, size = changed * inside, size * inside
    norms = (torch.linalg.vector_norm(each.flatten(1), dim=1) for each in (changed, size))
    relative = torch.div(*norms)
    if mask is not None:
        relative = relative.where(inside.flatten(1).any(1), 0.0)
    return float(relative.max())


def stops_at(points: Sequence[Point], criterion: Criterion) -> int | None:
    """After how many steps the criterion was first met, or None."""
    in_a_row = 0
    for step, point in enumerate(points, 1):
        in_a_row = in_a_row + 1 if point.change < criterion.threshold else 0  # NaN is not less
        if in_a_row >= criterion.patience and step >= criterion.min_steps:
            return step
    return None


def saved_by(steps: int, total: int, keep_last_step: bool) -> int:
    """Steps that are not computed in a run of `total` that stops after `steps`."""
    return max(total - steps - keep_last_step, 0)


def savings(
    points: Sequence[Point],
    criterion: Criterion,
    total: int | None,
    keep_last_step: bool,
    thresholds: Sequence[float] = TABLE,
) -> list[Saving]:
    """What runs with other thresholds would have saved, from the curve of this one.

    `total`: steps of a run that does not stop; None: not known, and so is what is saved.
    """
    found = []
    for threshold in thresholds:
        steps = stops_at(points, criterion._replace(threshold=threshold))
        if steps is None and (total is None or len(points) < total):
            found.append(Saving(threshold, None, None))
        elif total is None:
            found.append(Saving(threshold, steps, None))
        else:
            saved = saved_by(total if steps is None else steps, total, keep_last_step)
            found.append(Saving(threshold, steps if saved else total, saved))
    return found
