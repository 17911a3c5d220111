"""What a forward pass needs, and the ordered ladder of ways to need less: numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

EXACT, ROUNDING = "exact", "exact up to rounding"
APPROXIMATE, CHANGED = "approximate", "changed settings"
POLICIES = ("exact only", "allow approximations", "allow changed settings")
TOKEN_SIDE = 16  # px: 8 of the VAE, times patches of 2 latent pixels
LARGEST_SIDE = 16384  # px: where largest_side stops looking
OPTIMISM = 0.85


@dataclass(frozen=True)
class Work:
    """One forward pass as the host asks for it. Sizes in bytes; tokens are of one item.

    `fixed` is what no plan lowers: latents, tables, buffers that weights are cast into.
    `host_estimate` is the host's memory_required for a model that is no Qwen-Image, else None.
    """

    batch: int
    tokens: int
    reference_tokens: int
    text_tokens: int
    width: int
    heads: int
    blocks: int
    element_size: int
    fixed: int = 0
    host_estimate: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a forward pass does differently from what was asked; Plan() is "as asked"."""

    feed_forward: int = 1  # slices of the image stream's feed-forward
    projections: int = 1  # slices in which query, key and value are computed
    attention: int = 1  # slices of the queries
    apart: bool = False  # cond and uncond, and the images of a batch, one at a time
    reference_scale: float = 1.0  # of the sides of the reference latents
    tiles: int = 1  # along the longer side


class Rung(NamedTuple):
    """One way to run, cumulative: it includes every way before it on the ladder."""

    id: str
    text: str
    exactness: str
    plan: Plan
    free_others: bool
    headroom: bool
    release: bool


class Memory(NamedTuple):
    """Bytes of one device.

    `free` is what a forward pass can have without anybody's doing: with dynamic VRAM it counts
    the weights that give way by themselves. `others` are models that nobody needs now,
    `streamable` weights of this model that leave only when they are told to, `held` what other
    patches of this pack hold.
    """

    free: int
    others: int
    streamable: int
    held: int


def need(work: Work, plan: Plan, factor: float = 1.0) -> int:
    """Peak bytes of the activations of this forward pass; `factor` corrects the prediction."""
    batch = 1 if plan.apart else work.batch
    if work.host_estimate is not None:
        return round(factor * work.host_estimate * batch / max(1, work.batch)) + work.fixed
    references = ceil(work.reference_tokens * plan.reference_scale**2)
    tokens = ceil(work.tokens / plan.tiles**2)
    row = batch * work.width * work.element_size
    u, t = (tokens + references) * row, work.text_tokens * row
    j = u + t
    feed_forward = 3 * u + 2 * t + 8 * ceil(u / plan.feed_forward)
    attention = 10 * j
    if plan.projections > 1:
        attention = 7 * j + 3 * ceil(u / plan.projections)
    if plan.attention > 1:
        attention = 4 * j + 5 * ceil(u / plan.attention)
    rope = 2 * ceil(j / work.heads)
    return round(factor * (max(feed_forward, attention, 3 * u + 11 * t) + rope)) + work.fixed


_STEPS: tuple[tuple[str, str, str, dict[str, object]], ...] = (
    ("feed-forward-4", "feed-forward in 4 slices", EXACT, {"feed_forward": 4}),
    (
        "attention-4",
        "feed-forward and attention in 4 slices",
        ROUNDING,
        {"projections": 4, "attention": 4},
    ),
    (
        "attention-16",
        "feed-forward and attention in 16 slices",
        ROUNDING,
        {"feed_forward": 16, "projections": 16, "attention": 16},
    ),
    ("apart", "one picture and one side of CFG at a time", ROUNDING, {"apart": True}),
)


def ladder(work: Work, policy: str) -> tuple[Rung, ...]:
    """Every rung that the policy allows and that can change something for this work, in order."""
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of: {', '.join(POLICIES)}.")
    plan = Plan()
    rungs = [
        Rung("as-asked", "as asked", EXACT, plan, False, False, False),
        Rung("free-others", "other models unloaded", EXACT, plan, True, False, False),
        Rung("headroom", "more weights streamed", EXACT, plan, True, True, False),
    ]
    for name, text, exactness, change in _STEPS:
        smaller = replace(plan, **change)
        if need(work, smaller) < need(work, plan):
            plan = smaller
            rungs.append(Rung(name, text, exactness, plan, True, True, False))
    rungs.append(Rung("release", "what other patches held freed", EXACT, plan, True, True, True))
    return tuple(rungs)


def room(rung: Rung, memory: Memory) -> int:
    """Bytes that a forward pass on this rung may have."""
    return (
        memory.free
        + (memory.others if rung.free_others else 0)
        + (memory.streamable if rung.headroom else 0)
        + (memory.held if rung.release else 0)
    )


def choose(
    rungs: Sequence[Rung], work: Work, memory: Memory, factor: float = 1.0, start: int = 0
) -> int:
    """The first rung from `start` that should fit, else the last."""
    for index in range(start, len(rungs)):
        if need(work, rungs[index].plan, factor) * OPTIMISM <= room(rungs[index], memory):
            return index
    return len(rungs) - 1


def largest_side(work: Work, policy: str, memory: Memory, factor: float = 1.0) -> int:
    """Side in px of the largest square picture that fits with the same references; 0 if none."""
    low, high = 0, LARGEST_SIDE // TOKEN_SIDE
    while low < high:
        middle = (low + high + 1) // 2
        asked = replace(work, tokens=middle * middle)
        if work.host_estimate is not None:
            scaled = work.host_estimate * asked.tokens / max(1, work.tokens)
            asked = replace(asked, host_estimate=round(scaled))
        last = ladder(asked, policy)[-1]
        if need(asked, last.plan, factor) <= room(last, memory):
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_SIDE
