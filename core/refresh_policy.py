"""When the keys and values of reference pictures are computed again: in full, or reused.

The defaults of *auto* come from measurements on the embedded model, as PSNR of the picture against
every step in full (benchmarks/RESULTS.md). Full steps are evenly spaced. With one reference that is
modulated by timestep zero (2511), as many that lie late, where sigma falls fast, were 3 dB better;
with two references they were 6 dB worse. References that are modulated by the step's own time
(2509) drift from each step to the next, and need one full step more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

AUTO, FIRST, EVERY, DRIFTED = "auto", "first step", "every n steps", "when drifted"
MODES = (AUTO, FIRST, EVERY, DRIFTED)
SAME = 1e-5  # of a sigma: what float32 may make of it
AUTO_FULL = 4  # full steps in a run, evenly spaced
AUTO_FULL_ZERO = 3  # the same, with timestep zero
FEW_STEPS, FEW_FULL_ZERO = 8, 2  # and with a Lightning LoRA, where each full step costs more


class Pass(Enum):
    """How a forward pass treats what was recorded."""

    FULL = "full"
    REUSE = "reuse"
    PROBE = "probe"  # reuse, unless the first blocks show too much drift


@dataclass(frozen=True)
class Policy:
    """A rule for one run of a sampler.

    `every`: 1 makes every step a full one in any mode, and so does a `threshold` of 0. `sigmas`:
    the schedule, one more than there are steps. `zero`: references are modulated by timestep zero.
    """

    mode: str
    every: int
    threshold: float
    full_last: int
    sigmas: tuple[float, ...]
    zero: bool = False

    @property
    def steps(self) -> int:
        """Of the run."""
        return len(self.sigmas) - 1

    @property
    def always_full(self) -> bool:
        """Whether nothing is ever reused."""
        return self.every == 1 or self.threshold == 0 or self.full_last >= self.steps

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
        if step == recorded_at:
            return Pass.REUSE
        if self.mode == DRIFTED:
            return Pass.PROBE
        return Pass.FULL if self._is_old(step, recorded_at) else Pass.REUSE

    def _is_old(self, step: int, recorded_at: int) -> bool:
        """Whether what was recorded in an earlier step has done its time."""
        age = abs(step - recorded_at)
        if self.mode == EVERY:
            return age >= self.every
        if self.mode == FIRST:
            return False
        return age >= max(2, math.ceil(self.steps / self._full_steps()))

    def _full_steps(self) -> int:
        """How many there are in a run, with auto."""
        if not self.zero:
            return AUTO_FULL
        return FEW_FULL_ZERO if self.steps <= FEW_STEPS else AUTO_FULL_ZERO


def step_of(sigma: float, sigmas: Sequence[float], before: int = 0) -> int:
    """Which step of a schedule a call of the model belongs to, from 0.

    Samplers call the model between two sigmas, several times at one, or not at all where another
    patch skips it: only the schedule itself tells the steps. `sigmas` mostly falls, or rises where
    a picture is turned into noise. Where it goes up and down it has several steps with such a
    sigma: it is the first one that does not come before step `before`.
    """
    if len(sigmas) < 2:
        return 0
    slack = SAME * abs(sigma)
    exact = [step for step, one in enumerate(sigmas[:-1]) if abs(sigma - one) <= slack]
    found = exact or [
        step
        for step, (one, other) in enumerate(pairwise(sigmas))
        if min(one, other) < sigma < max(one, other) and abs(sigma - other) > slack
    ]
    if found:
        return next((step for step in found if step >= before), found[-1])
    sign = 1 if sigmas[0] >= sigmas[-1] else -1
    return sum(sign * each >= sign * sigma for each in sigmas[1:-1])
