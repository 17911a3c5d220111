"""What a forward pass needs, and the ordered ladder of ways to need less: numbers, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

EXACT, ROUNDING = "exact", "exact up to rounding"
APPROXIMATE, CHANGED = "approximate", "changed settings"
POLICIES = ("exact only", "allow approximations", "allow changed settings")
TOKEN_SIDE = 16  # px: 8 of the VAE, times patches of 2 latent pixels
LARGEST_SIDE = 16384  # px: where largest_side stops looking
OPTIMISM, DOUBT = 0.85, 0.6  # see choose


@dataclass(frozen=True)
class Work:
    """One forward pass as the host asks for it. Sizes in bytes; tokens are of one item.

    `fixed` is what no plan lowers: latents, hints of ControlNets, buffers that weights are cast
    into; the table of positions is no part of it. `host_estimate` is the host's memory_required
    for a model that is no Qwen-Image, else None: then only `batch` and `tokens` matter beside it.
    """

    batch: int  # halves of CFG times images
    tokens: int  # of the picture, without references: one is 16 x 16 px
    reference_tokens: int
    text_tokens: int
    width: int
    heads: int
    blocks: int
    element_size: int
    fixed: int = 0
    host_estimate: int | None = None
    timestep_zero: bool = False  # references are modulated on their own: Qwen-Image-Edit-2511


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


Factor = float | Callable[[Plan], float]  # one correction for all plans, or one for each
_Change = dict[str, int | float | bool]

# In the order of what they cost the user. Slices are few, since weights that are not resident
# stream again for each: from 4 to 16 the peak falls by about a fifth, beyond by next to nothing.
_LADDER: tuple[tuple[str, str, _Change], ...] = (
    ("feed-forward-4", EXACT, {"feed_forward": 4}),
    ("attention-4", ROUNDING, {"feed_forward": 4, "projections": 4, "attention": 4}),
    ("attention-16", ROUNDING, {"feed_forward": 16, "projections": 16, "attention": 16}),
    ("apart", ROUNDING, {"apart": True}),
    ("release", EXACT, {}),
    ("references-75", APPROXIMATE, {"reference_scale": 0.75}),
    ("references-50", APPROXIMATE, {"reference_scale": 0.5}),
    ("tiles-2", APPROXIMATE, {"tiles": 2}),
    ("tiles-4", APPROXIMATE, {"tiles": 4}),
    ("settings", CHANGED, {}),
)
_ALWAYS = {  # they change something else than the plan; what they add to its text
    "release": "what other patches hold released",
    "settings": "a smaller picture with other settings",
}
_ORDER = (EXACT, ROUNDING, APPROXIMATE, CHANGED)
_ALLOWED = dict(zip(POLICIES, (ROUNDING, APPROXIMATE, CHANGED), strict=True))


def need(work: Work, plan: Plan, factor: float = 1.0) -> int:
    """Peak bytes of the activations of this forward pass; `factor` corrects the prediction.

    Counted from comfy/ldm/qwen_image/model.py of ComfyUI 0.33, where each block peaks alike, and
    from how the slices of this pack run it.
    """
    batch = 1 if plan.apart else work.batch
    if work.host_estimate is not None:  # it grows with the batch; nothing else of it is known
        return round(factor * work.host_estimate * batch / work.batch) + work.fixed
    references = ceil(work.reference_tokens * plan.reference_scale**2)
    row = batch * work.width * work.element_size
    picture = (_tile_tokens(work.tokens, plan.tiles) + references) * row
    text = work.text_tokens * row
    peak = max(
        _feed_forward_peak(picture, text, plan, work.timestep_zero and references > 0),
        _attention_peak(picture, text, plan, batch),
    )
    # The table of positions, all the time: cos, -sin, sin, cos for each pair of a head's numbers.
    positions = 2 * ceil((picture + text) / work.heads)
    return round(factor * (peak + positions)) + work.fixed


def _tile_tokens(tokens: int, tiles: int) -> int:
    """Tokens of one tile of a square picture."""
    return ceil(tokens / tiles**2)


def _feed_forward_peak(picture: int, text: int, plan: Plan, timestep_zero: bool) -> int:
    """Bytes while a block's second half runs; `picture` and `text` are one tensor of a stream.

    The picture's stream: what the caller still holds of it, what attention made of it, and its
    modulated form. In each slice, four times as wide: before and after the GELU. The text's: what
    the caller holds and what attention made of it. Then its own feed-forward, never sliced.
    """
    picture_half = 3 * picture + 2 * text + 8 * ceil(picture / plan.feed_forward)
    # The output, written over the modulated form, is gated; with references at timestep zero in
    # two parts, which are joined before they are added.
    gate = (5 if timestep_zero else 4) * picture + 2 * text
    text_half = 3 * picture + 3 * text + 8 * text
    return max(picture_half, gate, text_half)


def _attention_peak(picture: int, text: int, plan: Plan, batch: int) -> int:
    """Bytes while a block's attention runs.

    Both streams, and both modulated (2). Whole: query, key and value apart and joined (6), what
    attention returns (1), and what `to_out` makes of the picture's part of it (1), which is copied
    if a batch has its parts between those of the text.
    """
    joint = picture + text
    if plan.attention > 1:
        # Joined key and value (2); of a slice: query, normed, turned, attended, projected.
        return 4 * joint + 5 * ceil(picture / plan.attention)
    if plan.projections > 1:
        # Joined query, key and value (3), what attention returns, and `to_out` of it.
        return 6 * joint + picture + (picture if batch > 1 else 0)
    return 9 * joint + picture + (picture if batch > 1 else 0)


def ladder(work: Work, policy: str) -> tuple[Rung, ...]:
    """Every rung that the policy allows and that can change something for this work, in order.

    Raises ValueError for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of: {', '.join(POLICIES)}; not {policy}.")
    rungs = [
        Rung("as-asked", "as asked", EXACT, Plan(), False, False, False),
        Rung("free-others", "as asked, other models unloaded", EXACT, Plan(), True, False, False),
        Rung("headroom", "as asked, more of the model streamed", EXACT, Plan(), True, True, False),
    ]
    extra: list[str] = []
    for name, exactness, change in _LADDER:
        before = rungs[-1]
        plan = replace(before.plan, **change)
        worst = max(before.exactness, exactness, key=_ORDER.index)
        if _ORDER.index(worst) > _ORDER.index(_ALLOWED[policy]):
            break
        if name in _ALWAYS or need(work, plan) < need(work, before.plan):
            extra += [_ALWAYS[name]] if name in _ALWAYS else []
            text = ", ".join([plan_text(plan), *extra])
            rungs.append(Rung(name, text, worst, plan, True, True, _ALWAYS["release"] in extra))
    return tuple(rungs)


def plan_text(plan: Plan) -> str:
    """What a plan does, for people."""
    parts = []
    if plan.attention > 1:
        parts.append(f"feed-forward and attention in {plan.attention} slices")
    elif plan.feed_forward > 1:
        parts.append(f"feed-forward in {plan.feed_forward} slices")
    if plan.apart:
        parts.append("pictures and sides of CFG one at a time")
    if plan.reference_scale < 1:
        parts.append(f"references at {plan.reference_scale:.0%} of their size")
    if plan.tiles > 1:
        parts.append(f"{plan.tiles} x {plan.tiles} overlapping tiles")
    return ", ".join(parts) or "as asked"


def room(rung: Rung, memory: Memory) -> int:
    """Bytes that a forward pass on this rung may have."""
    freed = (
        (rung.free_others, memory.others),
        (rung.headroom, memory.streamable),
        (rung.release, memory.held),
    )
    return memory.free + sum(size for is_freed, size in freed if is_freed)


def choose(
    rungs: Sequence[Rung], work: Work, memory: Memory, factor: Factor = 1.0, start: int = 0
) -> int:
    """Index of the first rung from `start` that should fit, else of the last.

    Deliberately optimistic: an attempt that fails costs less than a second, once, while slices that
    were not needed cost a few per cent of every step; so a card on which the host itself completes
    stays on the first rung. A rung is passed over only if what it needs exceeds the memory by more
    than the prediction may be wrong (OPTIMISM). Where the next rung would change the picture, the
    doubt is larger still (DOUBT): rather one attempt in vain than an approximation without need.
    """
    for index in range(start, len(rungs) - 1):
        rung, following = rungs[index], rungs[index + 1]
        changes_picture = following.exactness != rung.exactness and following.exactness in (
            APPROXIMATE,
            CHANGED,
        )
        doubt = DOUBT if changes_picture else OPTIMISM
        needed = need(work, rung.plan, _factor_of(factor, rung.plan))
        if needed * doubt <= room(rung, memory):
            return index
    return len(rungs) - 1


def largest_side(work: Work, policy: str, memory: Memory, factor: Factor = 1.0) -> int:
    """Side in px of the largest square picture that fits on the last rung; 0 if there is none.

    With the same references, and without doubt in its favour: it is what people are told to try.
    """
    low, high = 0, LARGEST_SIDE // TOKEN_SIDE
    while low < high:
        middle = (low + high + 1) // 2
        asked = _of_tokens(work, middle * middle)
        last = ladder(asked, policy)[-1]
        fits = need(asked, last.plan, _factor_of(factor, last.plan)) <= room(last, memory)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * TOKEN_SIDE


def _of_tokens(work: Work, tokens: int) -> Work:
    """The same with a picture of so many tokens."""
    estimate = work.host_estimate
    if estimate is not None:
        estimate = round(estimate * tokens / work.tokens)
    return replace(work, tokens=tokens, host_estimate=estimate)


def _factor_of(factor: Factor, plan: Plan) -> float:
    return factor(plan) if callable(factor) else factor
