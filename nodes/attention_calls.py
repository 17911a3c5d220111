"""What attention is called with, and what became of it in one run of a sampler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.ops
from comfy.ldm.modules.attention import get_attention_function
from torch import Tensor

from ..core.attention import BIAS, HIDDEN_KEYS, NO_MASK, attend_to
from ..core.budget import APPROXIMATE, EXACT, ROUNDING
from . import attention_health as health
from . import outcome
from .attention_backends import BACKENDS, OWN, SDPA, Backend
from .attention_health import Length, Situation, Times
from .transformer_options import Options

AUTO, AUTO_QUANTISED = "auto", "auto, also quantised"
TRUSTED = (OWN, SDPA)
RAISES = 3  # of a backend in one situation, before a run stops asking it
INSTEAD = "{}: {}. PyTorch SDPA instead"
FAILED = "failed its self-test ({})"
NOT_TIMED = "too little free memory to time backends: ComfyUI's own"


class Call(NamedTuple):
    """One call of attention in the shape that backends take."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    visible: list[Tensor] | None  # keys, where the mask does nothing but hide some
    scale: float | None
    precise: bool  # the model wants no quantised attention here

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
        if self.visible is not None and backend.name not in TRUSTED:
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
    return Call(q, k, v, mask, None, more.get("scale"), precise)


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
        self.used: dict[str, None] = {}  # names, in order
        self.situations: dict[tuple[str, Situation], None] = {}  # what was used where
        self.errors: dict[str, float] = {}  # of the self-tests
        self.times: dict[Length, Times] = {}
        self.notes: dict[str, None] = {}
        self.stopped = False  # PyTorch SDPA for the rest
        self.watched = True
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
        key = situation, length, call.precise
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

    def _fixed(self, call: Call) -> Backend:
        backend, situation = BACKENDS[self.wanted], call.situation
        if backend.name in TRUSTED:
            return backend
        reason = self._unfit(backend, call)
        if not reason:
            found = health.verdict(backend, situation)
            if found.error is not None:
                self.errors[backend.name] = found.error
            reason = "" if found.healthy else FAILED.format(found.reason)
        if reason:
            self.note(INSTEAD.format(backend.name, reason))
            return BACKENDS[SDPA]
        return backend

    def _auto(self, call: Call, own: Callable[[], Tensor]) -> Backend:
        """The fastest that is healthy here. With one that is not quantised, if need be."""
        situation, length = call.situation, health.length_of(call.query, call.key)
        calls = {OWN: own}
        for backend in map(BACKENDS.__getitem__, candidates(self.wanted)):
            if backend.name == OWN:
                continue
            if backend.probe(situation.device) or self._unfit(backend, call):
                continue
            found = health.verdict(backend, situation)
            if found.error is not None:
                self.errors[backend.name] = found.error
            if found.healthy:
                calls[backend.name] = lambda b=backend: call.by(b)
        times = health.measure(situation, length, calls)
        if times is None:
            self.note(NOT_TIMED)
            return BACKENDS[OWN]
        self.times[length] = times
        return BACKENDS[health.fastest(times)]

    def _unfit(self, backend: Backend, call: Call) -> str:
        if backend.quantised and call.precise:
            return health.LOW_PRECISION
        return health.cannot(backend, call.situation)

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
        """How the picture relates to that of ComfyUI's own attention."""
        if any(BACKENDS[name].quantised for name in self.used):
            return APPROXIMATE
        host = get_attention_function("optimized") is get_attention_function("pytorch")
        same = {OWN, SDPA} if host else {OWN}
        return EXACT if set(self.used) <= same else ROUNDING

    def line(self) -> str:
        """For the node."""
        parts = []
        if self.used:
            parts = [f"{self.wanted}: {', '.join(self.used)} ({self.exactness()})"]
        parts += [f"at {n.keys} keys: {health.text_of(t)}" for n, t in self.times.items()]
        found = [f"{n} {e:.2g}" for n, e in self.errors.items() if n in self.used]
        parts += [f"error in the self-test: {', '.join(found)}"] if found else []
        return " · ".join([*parts, *self.notes])

    def facts(self) -> dict[str, Any]:
        """The same as data; times in milliseconds."""
        return {
            "backend": self.wanted,
            "used": list(self.used),
            "exactness": self.exactness() if self.used else outcome.NOT_KNOWN,
            "errors": self.errors,
            "milliseconds": [
                {"keys": n.keys, "queries": n.queries, **{k: 1000 * s for k, s in t.items()}}
                for n, t in self.times.items()
            ],
            "notes": list(self.notes),
            "versions": outcome.versions(),
        }
