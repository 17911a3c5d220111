"""Sentences about what was done to fit into the memory there is, and about why it did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .budget import Memory, Rung, Work
from .units import size_text


class Attempt(NamedTuple):
    """A rung that was tried and ran out of memory: bytes predicted, and bytes it could have."""

    rung: Rung
    needed: int
    available: int


def failure_text(
    work: Work, attempts: Sequence[Attempt], memory: Memory, largest: int, policy: str
) -> str:
    """Say what was tried, what it needed, what there was, what would fit, and one remedy."""
    tried = "; ".join(
        f"{a.rung.text} (needs about {size_text(a.needed)}, {size_text(a.available)} could be used)"
        for a in attempts
    )
    fits = f"The largest square picture that should fit is {largest}x{largest}."
    return f"Out of memory. Free: {size_text(memory.free)}. Tried: {tried}. {fits}"


def done_text(
    rung: Rung,
    predicted: int,
    measured: int | str,
    retries: int = 0,
    step: int | None = None,
    steps: int | None = None,
) -> str:
    """One line of what was really done; `measured` in bytes, or why it is not measurable."""
    after = f" after {retries} {'retry' if retries == 1 else 'retries'}" if retries else ""
    at = f" at step {step} of {steps}" if retries and step is not None else ""
    took = size_text(measured) if isinstance(measured, int) else f"not measurable ({measured})"
    return f"{rung.text}{after}{at}, peak predicted {size_text(predicted)}, measured {took}"
