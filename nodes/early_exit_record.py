"""What early exit did in one run: for the node, its picture and the metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..core.convergence_plot import Plot, draw
from ..core.early_exit import TABLE, Criterion, Point, Saving, saved_by, savings, stops_at
from . import outcome

LEFTOVER = "nothing stops early: the schedule ends at sigma {:.3g}, the latent goes on with noise"
NOT_MEASURABLE = "change not measurable: {}"
NOT_SEEN = NOT_MEASURABLE.format("the sampler calls the model past ComfyUI's wrappers")
NOT_TOLD = "the sampler tells of no step"
NO_LAST_STEP = "no last step: this sampler or model does not add noise as others do"
TWO_STEPS = "it takes two steps"
OWN_STEPS = "steps saved not measurable: the sampler chooses its own steps"
TOO_LATE = "small enough only when no step was left to save"
NEAR = 0.02  # of the way to the next sigma: what is further off is no step of the schedule


@dataclass
class Record:
    """Of a run with this schedule; `points` as the steps come."""

    criterion: Criterion
    keep_last_step: bool
    sigmas: Sequence[float]
    points: Sequence[Point] = ()
    problems: Sequence[str] = ()  # why changes are not measurable
    stopped: int | None = None  # after so many steps
    last_step: bool = False  # whether the last one was run after that
    notes: list[str] = field(default_factory=list)
    ended: str = ""  # how, where no picture was made

    def note(self, sentence: str) -> None:
        """Say something once."""
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)

    def stop(self, steps: int) -> bool:
        """Whether it may stop after so many, which it then does: it has to save something."""
        if self.goes_on:
            return False
        if self.own_steps:
            worth = self.points[-1].sigma > self._last_sigma
        else:
            worth = saved_by(steps, len(self.sigmas) - 1, self.keep_last_step) > 0
        if worth:
            self.stopped = steps
        return worth

    @property
    def own_steps(self) -> bool:
        """Whether the sampler does not take the steps of the schedule, as dpm_fast."""
        # All begin with the first one, some a little below: there the signal would be 0.
        pairs = zip(self.points[1:], self.sigmas[1:], self.sigmas[2:], strict=False)
        off = any(abs(p.sigma - s) > NEAR * abs(s - after) for p, s, after in pairs)
        return off or len(self.points) > len(self.sigmas) - 1

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where only the sampler knew."""
        if not self.own_steps:
            return len(self.sigmas) - 1
        return None if self.stopped else len(self.points)

    @property
    def goes_on(self) -> bool:
        """Whether the schedule ends with noise, for another sampler: x0 would be no result."""
        return self.sigmas[-1] > 0

    @property
    def _last_sigma(self) -> float:
        return [sigma for sigma in self.sigmas if sigma > 0][-1]

    @property
    def saved(self) -> int | None:
        """Steps that were not computed; None: not measurable."""
        if self.stopped is None:
            return 0
        if self.total is None:
            return None
        return saved_by(self.stopped, self.total, self.last_step)

    def savings(self) -> list[Saving]:
        """What its threshold and others would have saved."""
        thresholds = sorted({*TABLE, self.criterion.threshold} - {0.0})
        last = self.keep_last_step if self.stopped is None else self.last_step
        return savings(self.points, self.criterion, self.total, last, thresholds)

    def changes(self) -> list[float]:
        """Those that could be measured."""
        return [point.change for point in self.points if math.isfinite(point.change)]

    def line(self) -> str:
        """For the node."""
        if self.ended:
            return " · ".join([self.ended, *self.notes])
        total, threshold = self.total, f"{self.criterion.threshold:g}"
        if self.stopped is not None:
            of = "" if total is None else f" of {total}"
            last = " and the last one" if self.last_step else ""
            parts = [f"stopped after step {self.stopped}{of}{last}"]
            parts.append(OWN_STEPS if self.saved is None else f"steps saved: {self.saved}")
            parts.append(f"change {self.points[-1].change:.2g}, threshold {threshold}")
        else:
            parts = [f"all {total} steps", *self._why()]
        return " · ".join([*parts, *self.notes])

    def _why(self) -> list[str]:
        """It did not stop."""
        found = self.changes()
        if self.goes_on:
            return [LEFTOVER.format(self.sigmas[-1])]
        if not found:
            return [] if NOT_SEEN in self.notes else [NOT_MEASURABLE.format(self._problem())]
        lowest = f"lowest change {min(found):.2g}, threshold {self.criterion.threshold:g}"
        met = stops_at(self.points, self.criterion) is not None
        return [lowest, TOO_LATE] if met else [lowest]

    def _problem(self) -> str:
        """Why no change was measurable."""
        if len(self.points) > 1:
            return "; ".join(self.problems)
        return TWO_STEPS if self.points else NOT_TOLD

    def facts(self) -> dict[str, Any]:
        """The same as data. A change that is not measurable is null, as that of the first step."""
        return {
            "steps_of_the_schedule": len(self.sigmas) - 1,
            "stopped_after_step": self.stopped,
            "last_step_run": self.last_step,
            "schedule_ends_with_noise": self.goes_on,
            "steps_saved": OWN_STEPS if self.saved is None else self.saved,
            **self.criterion._asdict(),
            "keep_last_step": self.keep_last_step,
            "curve": [
                {"sigma": p.sigma, "change": p.change if math.isfinite(p.change) else None}
                for p in self.points
            ],
            "changes_not_measurable_because": list(self.problems),
            "would_have_saved": [saving._asdict() for saving in self.savings()],
            "notes": self.notes,
            "versions": outcome.versions(),
        }

    @property
    def picture(self) -> Image.Image:
        """The curve and the table of thresholds."""
        changes = [point.change for point in self.points]
        total = self.total or len(self.points)
        table = self.savings()
        return draw(Plot(changes, self.criterion.threshold, total, self.stopped, table))
