"""What a reference cache did in one run of a sampler: for the node and the picture's metadata."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.units import size_text
from .outcome import versions

STOOD_ASIDE = "computed in full: {}"
PLACES = {"gpu": "on the GPU", "ram": "in RAM"}
NOT_COMPUTED = "{} of the {} steps of the schedule were not computed"
NO_DRIFT = "not measurable: nothing was recorded twice"


@dataclass
class CacheRecord:
    """Several GPUs' threads add to it under a lock."""

    steps: int = 0  # of the sampler
    settings: dict[str, Any] = field(default_factory=dict)  # as asked
    in_full: set[int] = field(default_factory=set)  # steps with a pass that was computed in full
    reused: set[int] = field(default_factory=set)  # steps with a pass that reused something
    computed: set[int] = field(default_factory=set)  # steps with any pass
    bytes_held: dict[str, int] = field(default_factory=dict)  # place -> the most at a time
    bytes_expected: int = 0  # of all stores, as reckoned before the load
    aside: list[str] = field(default_factory=list)  # why passes reused nothing
    notes: list[str] = field(default_factory=list)
    ended: str = ""  # how, where no picture was made
    _drift: list[tuple[str, Tensor]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def note(self, sentence: str) -> None:
        """Say something once."""
        with self._lock:
            if sentence and sentence not in self.notes:
                self.notes.append(sentence)

    def stand_aside(self, reason: str) -> None:
        """A pass, or all, reused nothing."""
        with self._lock:
            if reason not in self.aside:
                self.aside.append(reason)

    def passed(self, step: int, full: bool) -> None:
        """A forward pass of a step succeeded."""
        with self._lock:
            (self.in_full if full else self.reused).add(step)
            self.computed.add(step)

    def came(self, step: int) -> None:
        """A forward pass of a step succeeded of which a reason tells (`stand_aside`)."""
        with self._lock:
            self.computed.add(step)

    def drifted(self, name: str, drift: Tensor | None) -> None:
        """A group's drift was measured. It is read only at the end: reading waits for the GPU."""
        if drift is not None:
            with self._lock:
                self._drift.append((name, drift))

    def holds(self, held: dict[str, int]) -> None:
        """The stores hold so many bytes now, by place."""
        with self._lock:
            for place, count in held.items():
                self.bytes_held[place] = max(count, self.bytes_held.get(place, 0))

    @property
    def steps_reused(self) -> int:
        """Steps in which no pass was computed in full."""
        return len(self.reused - self.in_full)

    @property
    def steps_full(self) -> int:
        """Steps in which at least one pass was computed in full."""
        return len(self.in_full)

    @property
    def drift(self) -> float | None:
        """The largest relative change of the references' keys and values that was measured."""
        return self.drift_of("references")

    def drift_of(self, name: str) -> float | None:
        """The largest one of a group; None where it was not measured."""
        values = [float(drift) for each, drift in self._drift if each == name]
        return max(values, default=None)

    def line(self) -> str:
        """For the node."""
        aside = [STOOD_ASIDE.format("; ".join(self.aside))] if self.aside else []
        if self.ended:
            return " · ".join([self.ended, *aside, *self.notes])
        if not self.reused and aside:
            return " · ".join([*aside, *self.notes])
        computed = len(self.computed) or self.steps
        parts = [f"reused in {self.steps_reused} of {computed} steps", *aside]
        if computed < self.steps:
            parts.append(NOT_COMPUTED.format(self.steps - computed, self.steps))
        if (drift := self.drift) is not None:
            parts.append(f"drift up to {drift:.3f}")
        for place, words in PLACES.items():
            if count := self.bytes_held.get(place):
                parts.append(f"{size_text(count)} {words} ({self.settings.get('store_format')})")
        return " · ".join([*parts, *self.notes])

    def facts(self) -> dict[str, Any]:
        """The same as data. Sizes in bytes."""
        drift = self.drift
        return {
            "steps": self.steps,
            "steps_computed": len(self.computed),
            "steps_full": sorted(step + 1 for step in self.in_full),
            "steps_reused": self.steps_reused,
            "drift": NO_DRIFT if drift is None else round(drift, 6),
            "bytes": dict(self.bytes_held),
            "settings": self.settings,
            "computed_in_full_because": self.aside,
            "notes": self.notes,
            "versions": versions(),
        }
