"""When the keys and values of reference pictures are computed again: in full, or reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

AUTO, FIRST, EVERY, DRIFTED = "auto", "first step", "every n steps", "when drifted"
MODES = (AUTO, FIRST, EVERY, DRIFTED)
SAME = 1e-5  # of a sigma: what float32 may make of it


class Pass(Enum):
    """How a forward pass treats what was recorded."""

    FULL = "full"
    REUSE = "reuse"
    PROBE = "probe"  # reuse, unless the first blocks show too much drift


@dataclass(frozen=True)
class Policy:
    """A rule for one run of a sampler with this many steps.

    `every`: 1 makes every step a full one in any mode, and so does a `threshold` of 0.
    """

    mode: str
    every: int
    threshold: float
    full_last: int
    steps: int

    @property
    def always_full(self) -> bool:
        """Whether nothing is ever reused."""
        return self.every == 1 or self.threshold == 0

    def decide(self, step: int, recorded_at: int | None, constant: bool = False) -> Pass:
        """For a pass in this step, counted from 0; `recorded_at`: the last full step's, if any.

        `constant`: what is recorded depends on nothing that changes in a run.
        """
        if recorded_at is None or self.always_full:
            return Pass.FULL
        if constant:
            return Pass.REUSE
        if step >= self.steps - self.full_last:
            return Pass.FULL
        if self.mode == EVERY and abs(step - recorded_at) >= self.every:
            return Pass.FULL
        if self.mode == DRIFTED and step != recorded_at:
            return Pass.PROBE
        return Pass.REUSE


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Which step of a schedule a call of the model belongs to, from 0.

    Samplers call the model between two sigmas, several times at one, or not at all where another
    patch skips it: only the schedule itself tells the steps. `sigmas` falls, or rises where a
    picture is turned into noise.
    """
    if len(sigmas) < 2:
        return 0
    sign = 1 if sigmas[0] >= sigmas[-1] else -1
    slack = SAME * abs(sigma)
    return sum(sign * each >= sign * sigma - slack for each in sigmas[1:-1])
