"""Which attention backends work on which device, and how fast: tried once per process.

Nothing of it is kept on disk: a self-test takes milliseconds, and times take a few calls of each
backend, less than a forward pass makes; while drivers, packages and what else uses the card change
between two processes.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from operator import itemgetter

import comfy.model_management
import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..core.attention import BIAS, Verdict, best_seconds, examine, mask_aware, tolerance
from .attention_backends import AS_COMFYUI, BACKENDS, Backend

log = logging.getLogger("qwen_vram")

BEFORE_OWN = 0.95  # what auto takes needs at most this part of the time of ComfyUI's own
FAR_SLOWER = 2.0  # times the fastest so far: no need to time it again
NO_DTYPE = "it does not work with {}"
NO_BIAS = "it takes no mask that adds to the scores"
LOW_PRECISION = "the model asks for full precision here"
RAISED = "{}: {}"
NOT_TRIED = "there, not tried: not asked for"
NO_MEMORY = "there, not tried: out of memory just now"
NO_MEMORY_TO_TIME = "out of memory when it was timed"


@dataclass(frozen=True)
class Situation:
    """What a kernel is chosen for."""

    device: torch.device
    dtype: torch.dtype
    width: int  # of a head
    mask: str  # NO_MASK, HIDDEN_KEYS or BIAS

    def text(self) -> str:
        """In words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"on {self.device}, {dtype}, heads {self.width} wide, {self.mask}"


@dataclass(frozen=True)
class Length:
    """What its time depends on besides; tokens rounded up to a power of two."""

    batch: int
    heads: int
    queries: int
    keys: int

    def text(self) -> str:
        """In words."""
        queries = "" if self.queries == self.keys else f"{self.queries} queries, "
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        return f"{queries}{self.keys} keys{batch}"


@dataclass
class Times:
    """Of one call of backends, by their names."""

    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # why there are none

    def of(self, names: Collection[str]) -> Times:
        """Of some of them."""
        return Times(
            {name: s for name, s in self.seconds.items() if name in names},
            {name: why for name, why in self.failed.items() if name in names},
        )


_lock = threading.RLock()
_verdicts: dict[tuple[str, Situation], Verdict] = {}
_times: dict[tuple[Situation, Length], Times] = {}


def passes(error: BaseException) -> bool:
    """Whether an error is not the backend's: out of memory, or the user stops the run."""
    return isinstance(error, InterruptProcessingException) or comfy.model_management.is_oom(error)


def sentence(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return RAISED.format(type(error).__name__, lines[0][:200] if lines else "no message")


def verdict(backend: Backend, situation: Situation) -> Verdict:
    """Of the self-test on this device, which runs once. Out of memory and interrupts are raised,
    and the test then runs again the next time."""
    key = backend.name, situation
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = _examine(backend, situation)
        return _verdicts[key]


def _examine(backend: Backend, situation: Situation) -> Verdict:
    if missing := backend.probe(situation.device):
        return Verdict(False, missing)
    if unable := cannot(backend, situation):
        return Verdict(False, unable)
    try:
        as_it_is = backend.name in AS_COMFYUI
        attend = backend.attend if as_it_is else mask_aware(backend.attend, backend.takes_masks)
        found = examine(
            attend,
            situation.device,
            situation.dtype,
            situation.width,
            situation.mask,
            backend.quantised,
        )
    except Exception as error:
        if passes(error):
            raise
        found = Verdict(False, sentence(error))
    if not found.healthy:
        log.info("Attention: %s failed its self-test: %s", backend.name, found.reason)
    return found


def cannot(backend: Backend, situation: Situation) -> str:
    """Why a backend is not made for this, or ""."""
    if situation.dtype not in backend.dtypes:
        return NO_DTYPE.format(str(situation.dtype).removeprefix("torch."))
    return NO_BIAS if situation.mask == BIAS and not backend.takes_masks else ""


def distrust(name: str, situation: Situation, reason: str) -> None:
    """A backend failed at work although its self-test did not show it: not again here."""
    with _lock:
        _verdicts[name, situation] = Verdict(False, reason)


def known(name: str, situation: Situation) -> Verdict | None:
    """What was found so far."""
    with _lock:
        return _verdicts.get((name, situation))


def forget() -> None:
    """As in a new process."""
    with _lock:
        _verdicts.clear()
        _times.clear()


# ------------------------------------------------------------------------------ time
def length_of(query: Tensor, key: Tensor) -> Length:
    """Of (batch, heads, tokens, width) both."""
    rounded = [1 << (tokens - 1).bit_length() for tokens in (query.shape[2], key.shape[2])]
    return Length(query.shape[0], query.shape[1], *rounded)


def measure(
    situation: Situation, length: Length, calls: dict[str, Callable[[], Tensor]]
) -> Times | None:
    """Times of backends by name, at the length at hand; None where memory is too short to try.

    `calls`: one attention call each, on the model's own tensors, so that nothing but the outputs
    takes memory. One that fails is not tried again; out of memory may be over the next time.
    """
    with _lock:
        known = _times.setdefault((situation, length), Times())
        tried = {*known.seconds, *known.failed}
        found = known.of(calls)
        if new := {name: call for name, call in calls.items() if name not in tried}:
            if not _has_room(situation, length):
                return None
            taken = _measure(new, situation.device)
            found.seconds |= taken.seconds
            found.failed |= taken.failed
            lasting = {n: why for n, why in taken.failed.items() if why != NO_MEMORY_TO_TIME}
            known.seconds |= taken.seconds
            known.failed |= lasting
            log.info("Attention at %d keys: %s", length.keys, text_of(found.seconds))
        return found


def _has_room(situation: Situation, length: Length) -> bool:
    """For an output and what kernels put aside: copies of query, key and value."""
    tokens = 2 * length.queries + 2 * length.keys
    need = length.batch * length.heads * tokens * situation.width * situation.dtype.itemsize
    return comfy.model_management.get_free_memory(situation.device) > need


def _measure(calls: dict[str, Callable[[], Tensor]], device: torch.device) -> Times:
    found = Times()
    for name, call in calls.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        enough = FAR_SLOWER * min(found.seconds.values(), default=math.inf)
        try:
            compiles = device.type != "cpu"
            found.seconds[name] = best_seconds(call, enough=enough, compiles=compiles)
        except Exception as error:
            if isinstance(error, InterruptProcessingException):
                raise
            oom = comfy.model_management.is_oom(error)  # takes a pending CUDA error away, too
            found.failed[name] = NO_MEMORY_TO_TIME if oom else sentence(error)
            log.info("Attention: %s has no time: %s", name, sentence(error))
    return found


def fastest(seconds: dict[str, float], usual: str) -> str:
    """The usual one, unless another is clearly faster: measured times vary, and so would pictures
    between two processes."""
    best = min(seconds, key=seconds.__getitem__, default=usual)
    before = BEFORE_OWN * seconds.get(usual, math.inf)
    return best if seconds and seconds[best] <= before else usual


def text_of(seconds: dict[str, float]) -> str:
    """In milliseconds, fastest first."""
    ordered = sorted(seconds.items(), key=itemgetter(1))
    return ", ".join(f"{name} {taken * 1000:.3g} ms" for name, taken in ordered)


# ------------------------------------------------------------------------------ the table
def table(situation: Situation, tried: Collection[str]) -> str:
    """All backends in a situation, one line each. Those in `tried` are put to the test; a kernel
    that nobody asked for may be one that brings the driver down."""
    lines = []
    for name, backend in BACKENDS.items():
        lines.append(f"{name}: {_state(backend, situation, name in tried)}")
    return "\n".join(lines)


def _state(backend: Backend, situation: Situation, tried: bool) -> str:
    """Of one backend, in words."""
    if missing := backend.probe(situation.device):
        return f"missing, {missing}"
    if not tried:
        return NOT_TRIED
    try:
        found = verdict(backend, situation)
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
        return NO_MEMORY
    allowed = tolerance(situation.dtype, situation.device, backend.quantised)
    parts = ["healthy" if found.healthy else f"failed, {found.reason}"]
    if found.healthy:
        parts.append(f"error {found.error:.2g} (allowed {allowed:.2g})")
    parts += [f"{1000 * t:.3g} ms at {n} keys" for n, t in _times_by_keys(backend, situation)]
    return ", ".join(parts)


def _times_by_keys(backend: Backend, situation: Situation) -> list[tuple[int, float]]:
    """(keys, seconds) of a backend as far as measured."""
    with _lock:
        found = [(k[1].keys, t.seconds) for k, t in _times.items() if k[0] == situation]
    return [(keys, seconds[backend.name]) for keys, seconds in found if backend.name in seconds]
