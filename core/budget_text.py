"""The sentences of the error where nothing fits into the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, sqrt
from typing import NamedTuple

from .budget import CHANGED, POLICIES, TOKEN_SIDE, Memory, Rung, Work, ladder, need
from .units import size_text

NOT_TRIED = "Not tried, because they need more than there was, or hardly less than what failed:"


class Attempt(NamedTuple):
    """A rung that ran out of memory: bytes that it needs as predicted, and that it could have."""

    rung: Rung
    needed: int
    available: int


def failure_text(
    work: Work,
    attempts: Sequence[Attempt],
    memory: Memory,
    largest: int,
    policy: str = POLICIES[0],
) -> str:
    """Say what was tried, what each rung needed, what was free, what would fit, and one remedy.

    There is at least one attempt. `largest` is from `largest_side`, for the same policy. Raises
    ValueError for an unknown policy.
    """
    tried = [attempt.rung.plan for attempt in attempts]
    others = [
        rung
        for rung in ladder(work, policy, held=memory.held > 0)
        if rung.plan not in tried and rung.exactness != CHANGED  # which needs as much
    ]
    lines = [
        f'There is not enough memory, with everything done that the policy "{policy}" permits.',
        "Tried, one after the other:",
        *(f"- {_attempt_text(attempt)}" for attempt in attempts),
        *([NOT_TRIED] if others else []),
        *(f"- {rung.text}: about {size_text(need(work, rung.plan))}" for rung in others),
        f"Free now: {size_text(max(0, memory.free))}.",
        _remedy(work, memory, largest, policy),
    ]
    return "\n".join(lines)


def _attempt_text(attempt: Attempt) -> str:
    return (
        f"{attempt.rung.text}: needs about {size_text(attempt.needed)}, "
        f"{size_text(attempt.available)} could be had"
    )


def share_of_sides(work: Work, largest: int) -> float:
    """A side in px, as of `largest_side`, by the sides of the picture of this work."""
    return largest / (sqrt(work.tokens) * TOKEN_SIDE)


def _remedy(work: Work, memory: Memory, largest: int, policy: str) -> str:
    """The size that would fit and the one thing to do; by a size only if it is smaller."""
    references = " with the same references" if work.reference_tokens else ""
    share = share_of_sides(work, largest)
    if share >= 1:
        size = f"A square picture of {largest} x {largest} px should fit{references}"
        if work.host_estimate is not None:  # nobody knows how many px a latent of this model has
            size = "A picture of this size should fit"
        return f"{size}, so something else takes memory at the same time: close it, and run again."
    if work.host_estimate is not None and (percent := floor(100 * share)):
        return (
            f"A picture with sides of {percent} % of those asked for should fit: make it no larger "
            "than that."
        )
    if largest > 0 and work.host_estimate is None:
        return (
            f"The largest square picture that should fit is {largest} x {largest} px{references}: "
            "make the picture no larger than that."
        )
    if policy == POLICIES[0]:
        return f'No picture of any size would fit{references}: set the policy to "{POLICIES[1]}".'
    return f"No picture of any size would fit{references}: close what else uses the device."
