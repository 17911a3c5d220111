"""Whether an attention backend computes attention: a self-test, and its time.

A backend here is a function (query, key, value, mask, scale) -> output over tensors of the shape
(batch, heads, tokens, width of a head), with keys and values of one length, which need not be that
of the queries. `mask` is added to the scores (True and False: seen and hidden), broadcastable to
(batch, heads, queries, keys); `scale` None is width ** -0.5.

Kernels that fail on one card, head width or version give NaN, ignore the mask, or overflow where
values are large: half-precision sums over many keys do (SageAttention's issue 93). The test holds
each of these against the scaled dot product attention of torch in float32 on the CPU, which shares
no kernel with what runs on a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

NO_MASK, HIDDEN_KEYS, BIAS = "no mask", "hidden keys", "bias"
# No multiples of the blocks of 64 or 128 that kernels work in, and fewer queries than keys.
BATCH, QUERIES, KEYS = 2, 200, 600
ONE_KEY = 2 * 128 + 1  # in the last block
HEADS, GPU_HEADS = 3, 32  # with little to do kernels split up the keys: others than at work run
TF32 = 2.0**-10  # the step of what GPUs may round float32 to in matrix products
WORST = 4.0  # times the tolerance: what a single query may be off
LARGE = 300.0


# ------------------------------------------------------------------------------ masks
def visible_keys(mask: Tensor) -> list[Tensor] | None:
    """Which keys are seen, (keys,) indices for each item of the mask's batch, if that is all that
    the mask says: None for one that differs between queries or heads, or adds anything else.

    mask: (batch or 1, heads or 1, queries or 1, keys). A key that has the smallest number of its
    type, as ComfyUI hides padding, has exactly no weight: without it nothing changes. Waits for
    the device once.
    """
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    rows = mask[:, 0, 0].cpu()
    if rows.dtype == torch.bool:
        visible = rows
    else:
        visible = rows == 0
        if not (visible | (rows <= torch.finfo(rows.dtype).min)).all():
            return None
    if not visible.any(dim=-1).all():  # softmax over nothing: what comes out is the backend's
        return None
    return [row.nonzero()[:, 0] for row in visible]


def attend_to(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: list[Tensor],
    scale: float | None,
) -> Tensor:
    """Attention to the visible keys alone, by a backend that needs no mask for it."""
    if all(torch.equal(row, visible[0]) for row in visible[1:]):
        kept = visible[0]
        return attend(query, _only(key, kept), _only(value, kept), None, scale)
    items = []
    for i, row in enumerate(visible):
        q, k, v = (x[i : i + 1] for x in (query, key, value))
        items.append(attend(q, _only(k, row), _only(v, row), None, scale))
    return torch.cat(items)


def _only(x: Tensor, kept: Tensor) -> Tensor:
    """Some of the tokens."""
    return x if len(kept) == x.shape[2] else x.index_select(2, kept.to(x.device))


def mask_aware(attend: Attend, takes_masks: bool) -> Attend:
    """The backend with every mask that it can honour; ValueError for one that it cannot."""

    def attended(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """See above."""
        visible = None if mask is None else visible_keys(mask)
        if visible is not None:
            return attend_to(attend, query, key, value, visible, scale)
        if mask is not None and not takes_masks:
            raise ValueError("it takes no mask")
        return attend(query, key, value, mask, scale)

    return attended


# ------------------------------------------------------------------------------ the self-test
@dataclass(frozen=True)
class Verdict:
    """Of a self-test. Errors are relative L2: of the whole output, and of its worst query."""

    healthy: bool
    reason: str = ""  # why not
    error: float | None = None
    worst: float | None = None


class Case(NamedTuple):
    """One input, in float32 on the CPU, but representable in the type under test."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    finite_only: bool = False


def tolerance(dtype: torch.dtype, device: torch.device, quantised: float = 0.0) -> float:
    """The relative L2 error that a healthy backend may have.

    Weights and outputs are rounded to the type, whose step is eps: each adds an error of up to
    eps / 2, about 0.3 eps in the mean. Sums in another order add less. Twice eps leaves room for
    scores that are rounded, too. float32 on a GPU may go through TF32; on a CPU long sums cost
    more than the step: 1e-5. `quantised`: what a backend's own rounding (int8, fp8, fp4) may add.
    """
    step = torch.finfo(dtype).eps
    if dtype == torch.float32:
        step = TF32 if device.type != "cpu" else 5e-6
    return max(2 * step, quantised)


def examine(
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    mask: str = NO_MASK,
    quantised: float = 0.0,
) -> Verdict:
    """Try a backend on a device, with heads of one width, without or with one kind of mask.

    Raises whatever the backend raises: the caller knows what is to pass (out of memory).
    """
    allowed, errors, worst = tolerance(dtype, device, quantised), [], []
    heads = HEADS if device.type == "cpu" else GPU_HEADS
    for case in _cases(dtype, width, heads, mask):
        given = [x.to(device, dtype) for x in case[1:4]]
        before = [x.clone() for x in given]
        own_mask = case.mask if case.mask is None else case.mask.to(device, dtype)
        found = attend(*given, own_mask, case.scale)
        if reason := _unusable(found, given, before):
            return Verdict(False, f"{reason} ({case.name})")
        if case.finite_only:
            continue
        error, of_a_query = errors_of(found.float().cpu(), _expected(case))
        errors.append(error)
        worst.append(of_a_query)
        if not (error <= allowed and of_a_query <= WORST * allowed):
            why = _what_is_wrong(found.float().cpu(), case, allowed)
            text = f"{why}: error {error:.2g}, allowed {allowed:.2g} ({case.name})"
            return Verdict(False, text, error, of_a_query)
    return Verdict(True, "", max(errors), max(worst))


def errors_of(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 error of the whole, and of the worst query."""
    difference = (found - expected).norm(dim=-1)
    size = expected.norm(dim=-1)
    whole = difference.norm() / size.norm()
    return float(whole), float((difference / size.clamp_min(1e-30)).max())


def _cases(dtype: torch.dtype, width: int, heads: int, kind: str) -> Iterator[Case]:
    """What is tried. Numbers are rounded to the type first: both sides compute with the same."""
    generator = torch.Generator().manual_seed(20)

    def normal(tokens: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normally distributed."""
        x = torch.randn(BATCH, heads, tokens, width, generator=generator)
        return (x * size + mean).to(dtype).float()

    def mask(keys: int = KEYS) -> Tensor | None:
        """Another one each time."""
        return _mask(kind, keys, dtype, generator)

    # SageAttention 1.0.6 gives the 63 keys that are not there the score 0, and so weight.
    query, key, value = normal(QUERIES), normal(ONE_KEY), normal(ONE_KEY)
    yield Case("one key in the last block", query, key, value, mask(ONE_KEY), None)
    yield Case("normal values", normal(QUERIES), normal(KEYS), normal(KEYS), mask(), None)
    own = 0.4 * width**-0.5
    yield Case("a scale of its own", normal(QUERIES, 2), normal(KEYS), normal(KEYS), mask(), own)
    # Almost equal weights: a kernel that sums in half precision overflows above 65504.
    value = normal(KEYS, LARGE / 3, LARGE)
    yield Case("large values", normal(QUERIES, 0.05), normal(KEYS), value, mask(), None)
    query, key = normal(QUERIES, 30), normal(KEYS, 30, 100)  # before scaling about 1e5
    yield Case("large scores", query, key, normal(KEYS), mask(), None, finite_only=True)


def _mask(kind: str, keys: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    """A mask of one kind: hides about half of the keys, others for each item of the batch."""
    if kind == NO_MASK:
        return None
    shape = (BATCH, 1, QUERIES if kind == BIAS else 1, keys)
    hidden = torch.rand(shape, generator=generator) < 0.5
    added = torch.randn(shape, generator=generator) if kind == BIAS else torch.zeros(shape)
    smallest = torch.finfo(dtype).min
    return added.to(dtype).float().masked_fill_(hidden, smallest)


def _expected(case: Case, masked: bool = True) -> Tensor:
    """By torch, in float32, on the CPU."""
    mask = case.mask if masked else None
    return scaled_dot_product_attention(*case[1:4], attn_mask=mask, scale=case.scale)


def _unusable(found: Tensor, given: list[Tensor], before: list[Tensor]) -> str:
    """What no output may be, whatever its numbers; or ""."""
    query = given[0]
    if found.shape != query.shape or found.dtype != query.dtype:
        return f"gives {tuple(found.shape)} {found.dtype} for {tuple(query.shape)} {query.dtype}"
    if found.isnan().any():
        return "gives NaN"
    if not found.isfinite().all():
        return "overflows"
    if not all(map(torch.equal, given, before)):
        return "writes over its input"
    return ""


def _what_is_wrong(found: Tensor, case: Case, allowed: float) -> str:
    """A likely cause, in words."""
    if case.mask is not None and errors_of(found, _expected(case, masked=False))[0] <= allowed:
        return "ignores the mask"
    default = case._replace(scale=None)
    if case.scale is not None and errors_of(found, _expected(default))[0] <= allowed:
        return "ignores the scale"
    return "wrong numbers"


# ------------------------------------------------------------------------------ time
def best_seconds(
    call: Callable[[], Tensor],
    repeats: int = 3,
    budget: float = 0.5,
    enough: float = math.inf,
    compiles: bool = True,
) -> float:
    """Shortest time of a call, after one that warms up: what else the machine does only adds to it.

    Stops early once `budget` seconds went, and after a call that took more than `enough`: that is
    too slow, however often it is repeated.

    compiles: the first call may do more than the others, and its time says nothing; else a slow
    one is the last.
    """
    first = _seconds(call)
    if not compiles and first > min(enough, budget):
        return first
    taken: list[float] = []
    while len(taken) < repeats and sum(taken) < budget and max(taken, default=0.0) <= enough:
        taken.append(_seconds(call))
    return min(taken)


def _seconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    _finished(call())
    return time.perf_counter() - begin


def _finished(output: Tensor) -> None:
    """Wait for the device: one number is fetched."""
    output[(0,) * output.ndim].item()
