"""What a forward pass needs, and the ordered ladder of ways to need less: numbers, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import NamedTuple

AS_ASKED = "as asked"
EXACT, ROUNDING = "exact", "exact up to rounding"
APPROXIMATE, CHANGED = "approximate", "changed settings"
POLICIES = ("exact only", "allow approximations", "allow changed settings")
TOKEN_SIDE = 16  # px: 8 of the VAE, times patches of 2 latent pixels
LARGEST_SIDE = 16384  # px: where largest_side stops looking
TILE_OVERLAP = 16  # latent pixels that neighbouring tiles share
OPTIMISM = 0.85  # see choose
CLEARLY_LESS = 0.9  # of what failed: see following
LEAST_ROWS = 2048  # of a slice of queries: with fewer, flash attention is a third slower
HOST_TAKES = 0.5  # of what the host reserves; Qwen-Image takes 0.45 of it


@dataclass(frozen=True)
class Work:
    """One forward pass as the host asks for it. Sizes in bytes; tokens are of one item.

    `fixed` is what no plan lowers: latents, hints of ControlNets, the largest quantised weight that
    is dequantised for a product; the table of positions is no part of it. `host_estimate` is the
    host's memory_required for a model that is no Qwen-Image, else None: then only batch and tokens
    matter beside it.
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
    aspect: float = 1.0  # longer side of the picture by the shorter
    tileable: bool = True  # no other node's patch looks at the whole picture
    together: int = 1  # items that have to stay in one call where a batch runs apart


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
RELEASE, SETTINGS = "release", "settings"
SETTINGS_TEXT = "a smaller picture with other settings"

# In the order of what they cost the user. Slices are few, since weights that are not resident
# stream again for each: from 4 to 16 the peak falls by about a sixth, beyond by next to nothing.
# In slices every token is computed by the same formula from the same numbers. All but those of
# attention gave the same bits in nearly every size that was tried on a card and on a CPU; none
# promises it, since libraries choose by the number of rows in which order they add up.
_LADDER: tuple[tuple[str, str, _Change], ...] = (
    ("feed-forward-4", ROUNDING, {"feed_forward": 4}),
    ("projections-4", ROUNDING, {"feed_forward": 4, "projections": 4}),
    ("attention-4", ROUNDING, {"attention": 4}),
    ("attention-16", ROUNDING, {"feed_forward": 16, "projections": 16, "attention": 16}),
    ("apart", ROUNDING, {"apart": True}),
    (RELEASE, EXACT, {}),
    ("references-75", APPROXIMATE, {"reference_scale": 0.75}),
    ("references-50", APPROXIMATE, {"reference_scale": 0.5}),
    ("tiles-2", APPROXIMATE, {"tiles": 2}),
    ("tiles-4", APPROXIMATE, {"tiles": 4}),
    (SETTINGS, CHANGED, {}),
)
_ALWAYS = {  # they change something else than the plan; what they add to its text
    RELEASE: "what other patches hold released",
    SETTINGS: SETTINGS_TEXT,
}
ORDER = (EXACT, ROUNDING, APPROXIMATE, CHANGED)
_ALLOWED = dict(zip(POLICIES, (ROUNDING, APPROXIMATE, CHANGED), strict=True))


def need(work: Work, plan: Plan, factor: float = 1.0) -> int:
    """Peak bytes of the activations of this forward pass; `factor` corrects the prediction.

    Counted from comfy/ldm/qwen_image/model.py of ComfyUI 0.33, where each block peaks alike, and
    from how the slices of this pack run it. Scores of attention are no part of it: the usual
    kernels keep none, and ComfyUI's own (sub-quadratic, split) as many as there is room for.
    """
    batch = min(work.batch, work.together) if plan.apart else work.batch
    references = ceil(work.reference_tokens * plan.reference_scale**2)
    tokens = _tile_tokens(work, plan.tiles) + references
    if work.host_estimate is not None:
        # It grows with the tokens of the whole batch; nothing else is known of it.
        part = HOST_TAKES * batch * tokens / (work.batch * (work.tokens + work.reference_tokens))
        return round(factor * round(work.host_estimate * part)) + work.fixed
    row = batch * work.width * work.element_size
    picture, text = tokens * row, work.text_tokens * row
    copied = 1 if batch > 1 else 0  # slices of a batch do not lie together, so they are copied
    peak = max(
        _feed_forward_peak(picture, text, plan, copied, work.timestep_zero and references > 0),
        _attention_peak(picture, text, plan, copied),
    )
    # The table of positions, all the time: cos, -sin, sin, cos for each pair of a head's numbers.
    positions = 2 * ceil((picture + text) / work.heads)
    return round(factor * (peak + positions)) + work.fixed


def _tile_tokens(work: Work, tiles: int) -> int:
    """Tokens of one of the tiles that TileGrid.along makes of a picture of these tokens."""
    if tiles == 1:
        return work.tokens
    shorter = 2 * sqrt(work.tokens / work.aspect)  # latent pixels, two of a token
    longer = work.aspect * shorter
    shared = min(TILE_OVERLAP, longer // (2 * tiles))
    tile = 4 * ceil((longer + shared * (tiles - 1)) / tiles / 4)
    return min(work.tokens, ceil(min(tile, longer) * min(tile, shorter) / 4))


def _feed_forward_peak(
    picture: int, text: int, plan: Plan, copied: int, timestep_zero: bool
) -> int:
    """Bytes while a block's second half runs; `picture` and `text` are one tensor of a stream.

    Of the picture: what the caller holds, what attention made of it, and that modulated (3); then
    what is four times as wide, before and after the GELU (8). Of the text: the first two.
    """
    wide = 8 if plan.feed_forward == 1 else 8 + copied
    picture_half = 3 * picture + 2 * text + wide * ceil(picture / plan.feed_forward)
    # The output, written over the modulated form, is added by its gate; with references at
    # timestep zero in two parts, which are joined first.
    gate = (5 if timestep_zero else 4) * picture + 2 * text
    # The text's own feed-forward is never sliced; the modulated picture is still there.
    text_half = 3 * picture + 3 * text + 8 * text
    return max(picture_half, gate, text_half)


def _attention_peak(picture: int, text: int, plan: Plan, copied: int) -> int:
    """Bytes while a block's attention runs: first of all both streams, and both modulated (2)."""
    joint = picture + text
    if plan.attention > 1:
        # Key and value, joined (2), the text's query and result (2); of a slice: query, what
        # attention returns, and that with its heads side by side (3).
        return 4 * joint + 2 * text + (3 + copied) * ceil(picture / plan.attention)
    # What attention returns, and that with its heads side by side (2); or that, what `to_out`
    # makes of the picture's part, and in a batch its copy, since the text lies between.
    after = max(2 * joint, joint + (1 + copied) * picture)
    if plan.projections > 1:
        # Query, key and value, joined (3), and the text's query; `to_out` comes after them.
        return 5 * joint + text + max(2 * joint, 3 * ceil(picture / plan.projections))
    return 8 * joint + after  # query, key and value, apart and joined (6)


def _steps(work: Work) -> list[tuple[str, str, _Change]]:
    """The ladder for this work: queries in slices of too few rows only if nothing else fits."""
    rows = work.batch * (work.tokens + work.reference_tokens)
    steps = {step[0]: step for step in _LADDER}
    few = max(2, min(4, rows // LEAST_ROWS))
    steps["attention-4"] = ("attention-4", ROUNDING, {"attention": few})
    order = list(steps)
    if rows < 16 * LEAST_ROWS:
        order.remove("attention-16")
        order.insert(order.index("apart") + 1, "attention-16")
    return [steps[name] for name in order]


def ladder(work: Work, policy: str, held: bool = True) -> tuple[Rung, ...]:
    """Every rung that the policy allows and that can change something for this work, in order.

    `held`: whether other patches hold something that could be released. Raises ValueError for an
    unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of: {', '.join(POLICIES)}; not {policy}.")
    rungs = [
        Rung("as-asked", AS_ASKED, EXACT, Plan(), False, False, False),
        Rung("free-others", "as asked, other models unloaded", EXACT, Plan(), True, False, False),
        Rung("headroom", "as asked, more of the model streamed", EXACT, Plan(), True, True, False),
    ]
    extra: list[str] = []
    for name, exactness, change in _steps(work):
        if (name == RELEASE and not held) or ("tiles" in change and not work.tileable):
            continue
        before = rungs[-1]
        plan = replace(before.plan, **change)
        worst = max(before.exactness, exactness, key=ORDER.index)
        if ORDER.index(worst) > ORDER.index(_ALLOWED[policy]):
            break
        if name in _ALWAYS or need(work, plan) < need(work, before.plan):
            extra += [_ALWAYS[name]] if name in _ALWAYS else []
            text = ", ".join([plan_text(plan, work.together == 1), *extra])
            rungs.append(Rung(name, text, worst, plan, True, True, _ALWAYS[RELEASE] in extra))
    return tuple(rungs)


def plan_text(plan: Plan, pictures: bool = True) -> str:
    """What a plan does, for people; `pictures`: a batch apart is each of its pictures."""
    parts = []
    if plan.attention > 1 and plan.attention == plan.feed_forward:
        parts.append(f"feed-forward and attention in {plan.attention} slices")
    elif plan.attention > 1:
        parts.append(f"feed-forward in {plan.feed_forward} slices, attention in {plan.attention}")
    elif plan.projections > 1:
        parts.append(f"feed-forward and projections in {plan.projections} slices")
    elif plan.feed_forward > 1:
        parts.append(f"feed-forward in {plan.feed_forward} slices")
    if plan.apart:
        parts.append(f"{'pictures and ' if pictures else ''}sides of CFG one at a time")
    if plan.reference_scale < 1:
        parts.append(f"references at {plan.reference_scale:.0%} of their size")
    if plan.tiles > 1:
        parts.append(f"{plan.tiles} x {plan.tiles} overlapping tiles")
    return ", ".join(parts) or AS_ASKED


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
    """Index of the first rung from `start` that should fit, else of the last that gives anything.

    Deliberately optimistic: an attempt that fails costs less than a second, once, while slices that
    were not needed cost a few per cent of every step; so a card on which the host itself completes
    stays on the first rung. A rung is passed over only if what it needs exceeds the memory by more
    than the prediction may be wrong. Who wants no approximation before every exact way has really
    failed hands over the exact rungs first.
    """
    for index in range(start, len(rungs)):
        needed = need(work, rungs[index].plan, _factor_of(factor, rungs[index].plan))
        if needed * OPTIMISM <= room(rungs[index], memory):
            return index
    last = len(rungs) - 1
    while last > start and _gives_nothing(rungs[last - 1], rungs[last], memory):
        last -= 1
    return last


def _gives_nothing(before: Rung, rung: Rung, memory: Memory) -> bool:
    """Whether a rung does the same as the one before, with no more memory."""
    return rung.plan == before.plan and room(rung, memory) <= room(before, memory)


def following(
    rungs: Sequence[Rung],
    work: Work,
    memory: Memory,
    failed: int,
    lowest: int,
    factor: Factor = 1.0,
) -> int | None:
    """Index of the rung to repeat a pass on that ran out on the rung `failed`; None if there is
    none that promises more.

    `lowest` is the smallest need (bytes) that has failed: there was less than that, so another
    plan promises more only if it needs clearly less. The same plan does with room that it did not
    have: for what lacks, and a quarter of its need for what the prediction does not know.
    """
    plan, had = rungs[failed].plan, room(rungs[failed], memory)
    last = None
    for index in range(failed + 1, len(rungs)):
        rung = rungs[index]
        needed = need(work, rung.plan, _factor_of(factor, rung.plan))
        gained = room(rung, memory) - had
        if rung.plan == plan:
            promises, enough = gained > 0, gained >= max(needed - had, needed // 4)
        else:
            promises = needed <= CLEARLY_LESS * lowest
            enough = needed * OPTIMISM <= room(rung, memory)
        if promises and enough:
            return index
        last = index if promises else last
    return last


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
