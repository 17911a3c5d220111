"""What attention is called with, and what became of it in one run of a sampler."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.ops
from torch import Tensor

from ..core.attention import BIAS, HIDDEN_KEYS, NO_MASK, attend_to
from ..core.budget import APPROXIMATE, EXACT, ROUNDING
from . import attention_health as health
from . import outcome
from .attention_backends import (
    AS_COMFYUI,
    BACKENDS,
    OWN,
    SDPA,
    SPLIT,
    SUB_QUADRATIC,
    Backend,
    host_is_pytorch,
)
from .attention_health import Length, Situation, Times
from .transformer_options import Options

AUTO, AUTO_QUANTISED = "auto", "auto, also quantised"
SLOW = (SUB_QUADRATIC, SPLIT)  # never faster than PyTorch SDPA, where that works
RAISES = 3  # of a backend in one situation, before a run stops asking it
INSTEAD = "{}: {}. PyTorch SDPA instead"
FAILED = "failed its self-test ({})"
STAYS = "{}: {}. Used all the same: it was chosen"
NOT_USED = "{}: {}. Not used"
NOT_TIMED = "too little free memory to time backends: {}"
SEVERAL = "PyTorch's kernels cannot be chosen while several GPUs compute"
SOME_ONLY = "another node before this one computed {} of {} attention calls by itself"


class Call(NamedTuple):
    """One call of attention in the shape that backends take."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    visible: list[Tensor] | None  # keys, where the mask does nothing but hide some
    scale: float | None
    precise: bool  # the model wants no quantised attention here
    several: bool = False  # other GPUs of this process compute at the same time

    @property
    def situation(self) -> Situation:
        """What a backend is chosen for."""
        kind = NO_MASK if self.mask is None else BIAS if self.visible is None else HIDDEN_KEYS
        query = self.query
        return Situation(query.device, query.dtype, query.shape[-1], kind)

    def by(self, backend: Backend) -> Tensor:
        """(batch, heads, queries, width). Where it can the mask becomes fewer keys, but not for
        PyTorch SDPA, which is to do what ComfyUI does."""
        q, k, v = self[:3]
        if self.visible is not None and backend.name not in AS_COMFYUI:
            return attend_to(backend.attend, q, k, v, self.visible, self.scale)
        return backend.attend(q, k, v, self.mask, self.scale)


def call_of(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, apart: bool, more: Options
) -> Call | None:
    """What ComfyUI's attention functions are called with; None for shapes that are no attention
    of equal heads. `apart`: the heads have a dimension of their own."""
    if not apart:
        if q.ndim != 3 or q.shape[-1] % heads:
            return None
        width = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
    if more.get("enable_gqa", False):
        k, v = comfy.ops.repeat_kv_for_gqa(k, v, q.shape[-3], -3)
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape):
        return None
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1] or q.shape[1] != heads:
        return None
    if mask is not None:  # as ComfyUI's attention_pytorch reads it
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    precise = more.get("low_precision_attention", True) is False
    several = "multigpu_thread_device" in (more.get("transformer_options") or {})
    return Call(q, k, v, mask, None, more.get("scale"), precise, several)


def trusted() -> set[str]:
    """Backends whose results need no look: PyTorch's, by which the others are judged."""
    return {OWN, SDPA} if host_is_pytorch() else {SDPA}


def candidates(wanted: str) -> list[str]:
    """Names of the backends that a choice may lead to."""
    if wanted in BACKENDS:
        return [wanted]
    return [b.name for b in BACKENDS.values() if wanted == AUTO_QUANTISED or not b.quantised]


class Run:
    """What attention did in one run of a sampler. Several GPUs' threads come here at a time."""

    def __init__(self, wanted: str, node_id: str | None = None) -> None:
        self.wanted, self.node_id = wanted, node_id
        self.calls = 0
        self.asked = 0  # calls that another node's override answered, with this one or without
        self.ended = ""  # where no picture was made
        self.used: dict[str, None] = {}  # names, in order
        self.situations: dict[tuple[str, Situation], None] = {}  # what was used where
        self.errors: dict[str, float] = {}  # of the self-tests
        self.times: dict[tuple[Situation, Length], Times] = {}
        self.chosen: dict[tuple[Situation, Length], str] = {}  # of what was timed
        self.notes: dict[str, None] = {}
        self.stopped = False  # PyTorch SDPA for the rest
        self.watched = True
        self._own_failed = False
        self._raised: dict[tuple[str, Situation], int] = {}
        self._chosen: dict[tuple[Any, ...], Backend] = {}
        self._lock = threading.RLock()

    def note(self, text: str) -> None:
        """Say something once, and at once."""
        with self._lock:
            if not text or text in self.notes:
                return
            self.notes[text] = None
        outcome.tell(self.line(), self.node_id)

    def backend_for(self, call: Call, own: Callable[[], Tensor]) -> Backend:
        """Which one computes this call, and count that it does."""
        situation, length = call.situation, health.length_of(call.query, call.key)
        key = situation, length, call.precise, call.several
        with self._lock:
            self.calls += 1
            if self.stopped:
                return self._use(BACKENDS[SDPA], situation)
            if key not in self._chosen:
                auto = self.wanted in (AUTO, AUTO_QUANTISED)
                self._chosen[key] = self._auto(call, own) if auto else self._fixed(call)
            return self._use(self._chosen[key], situation)

    def _use(self, backend: Backend, situation: Situation) -> Backend:
        self.used[backend.name] = None
        self.situations[backend.name, situation] = None
        return backend

    def own_call(self) -> None:
        """One call by ComfyUI's own attention that nothing had to be known about."""
        with self._lock:
            self.calls += 1
            self.used[OWN] = None

    def asked_first(self) -> None:
        """Another node's override answered a call: it had passed it on, or not."""
        with self._lock:
            self.asked += 1

    def _fixed(self, call: Call) -> Backend:
        backend = BACKENDS[self.wanted]
        if backend.name == SDPA or not (reason := self._why_not(backend, call)):
            return backend
        self.note((STAYS if backend.name == OWN else INSTEAD).format(backend.name, reason))
        return BACKENDS[OWN if backend.name == OWN else SDPA]

    def _auto(self, call: Call, own: Callable[[], Tensor]) -> Backend:
        """The fastest that is healthy here. With one that is not quantised, if need be."""
        situation, length = call.situation, health.length_of(call.query, call.key)
        if call.several:
            self.note(SEVERAL)
        calls = self._healthy(call, own)
        usual = OWN if OWN in calls else SDPA
        times = health.measure(situation, length, calls)
        if times is None:
            self.note(NOT_TIMED.format(usual))
            return BACKENDS[usual]
        for name, reason in times.failed.items():
            self.note(NOT_USED.format(name, reason))
        self.times[situation, length] = times
        self.chosen[situation, length] = name = health.fastest(times.seconds, usual)
        return BACKENDS[name]

    def _healthy(self, call: Call, own: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        """What may be chosen for a call. ComfyUI's own, which may be any other, takes the test,
        too; where it is PyTorch SDPA there is no second one to be timed."""
        calls, pytorch = {}, host_is_pytorch()
        reason = "" if pytorch else self._why_not(BACKENDS[OWN], call)
        if reason:
            self._own_failed = True
            self.note(NOT_USED.format(OWN, reason))
        else:
            calls[OWN] = own
        for backend in map(BACKENDS.__getitem__, candidates(self.wanted)):
            known = backend.name == OWN or (backend.name == SDPA and pytorch)
            needless = backend.name in SLOW and (pytorch or SDPA in calls)
            if known or needless or backend.probe(call.query.device):
                continue
            if not self._why_not(backend, call):
                calls[backend.name] = lambda b=backend: call.by(b)
        return calls

    def _why_not(self, backend: Backend, call: Call) -> str:
        """Why a backend is not to compute this, or "". Puts it to the test."""
        if backend.quantised and call.precise:
            return health.LOW_PRECISION
        if backend.of_process and call.several:
            return SEVERAL
        if unable := health.cannot(backend, call.situation):
            return unable
        found = health.verdict(backend, call.situation)
        if found.error is not None:
            self.errors[backend.name] = found.error
        return "" if found.healthy else FAILED.format(found.reason)

    def raised(self, backend: Backend, call: Call, error: Exception) -> None:
        """A backend raised at work. It is asked again for the next call, but not for ever."""
        self.note(INSTEAD.format(backend.name, health.sentence(error)))
        key = backend.name, call.situation
        with self._lock:
            self._raised[key] = self._raised.get(key, 0) + 1
            if self._raised[key] >= RAISES:
                health.distrust(*key, health.sentence(error))
                self._chosen.clear()

    # ------------------------------------------------------------------- what is told
    def exactness(self) -> str:
        """How the picture relates to that of ComfyUI's own attention; where that failed its
        self-test, to that of PyTorch SDPA."""
        if any(BACKENDS[name].quantised for name in self.used):
            return APPROXIMATE
        same = {OWN, SDPA} if host_is_pytorch() else {SDPA if self._own_failed else OWN}
        return EXACT if set(self.used) <= same else ROUNDING

    def line(self) -> str:
        """For the node."""
        parts = [self.ended] if self.ended else []
        if self.used:
            parts.append(f"{self.wanted}: {', '.join(self.used)} ({self.exactness()})")
        devices = {situation.device for situation, _ in self.times}
        for (situation, length), times in self.times.items():
            where = f" on {situation.device}" if len(devices) > 1 else ""
            mask = "" if situation.mask == NO_MASK else f", {situation.mask}"
            taken = self._compared(times, self.chosen[situation, length])
            parts.append(f"at {length.text()}{mask}{where}: {taken}")
        found = [f"{n} {e:.2g}" for n, e in self.errors.items() if n in self.used]
        parts += [f"error in the self-test: {', '.join(found)}"] if found else []
        return " · ".join([*parts, *self.notes])

    @staticmethod
    def _compared(times: Times, chosen: str) -> str:
        """The chosen one beside ComfyUI's own, or the next one; all are in the facts."""
        others = sorted(times.seconds.keys() - {chosen}, key=times.seconds.__getitem__)
        beside = OWN if OWN in others else next(iter(others), None)
        return health.text_of(times.of([chosen, beside]).seconds) or outcome.NOT_KNOWN

    def facts(self) -> dict[str, Any]:
        """The same as data; times in milliseconds, None with the reason under "not_timed"."""
        return {
            "backend": self.wanted,
            "used": list(self.used),
            "exactness": self.exactness() if self.used else outcome.NOT_KNOWN,
            "errors": {n: e for n, e in self.errors.items() if math.isfinite(e)},
            "milliseconds": [
                {
                    "keys": length.keys,
                    "queries": length.queries,
                    "batch": length.batch,
                    "mask": situation.mask,
                    "chosen": self.chosen[situation, length],
                    **{name: 1000 * seconds for name, seconds in times.seconds.items()},
                    **dict.fromkeys(times.failed),
                    "not_timed": times.failed,
                }
                for (situation, length), times in self.times.items()
            ],
            "notes": list(self.notes),
            "versions": outcome.versions(),
        }
