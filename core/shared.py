"""One model per file and options, however many nodes and graphs ask for it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from .file_identity import FileIdentity

Model = TypeVar("Model")


class ModelKey(NamedTuple):
    """What makes two requests the same: the version of the file, and every option of the load."""

    file: FileIdentity
    options: tuple[Hashable, ...]


class Loaded(NamedTuple):
    """What a loader hands over: the model, and what else is needed to build a handle around it."""

    model: Any
    parts: dict[str, Any]


@dataclass(eq=False)
class Entry(Generic[Model]):
    """A live model: held weakly, with the handles that were given out for it."""

    model: weakref.ref[Model]
    parts: dict[str, Any]
    seconds: float
    handles: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


class Acquired(NamedTuple):
    """The answer to `SharedRegistry.acquire`. `seconds` is what the load took, now or then."""

    model: Any
    parts: dict[str, Any]
    reused: bool
    seconds: float
    entry: Entry[Any]


class SharedRegistry(Generic[Model]):
    """Models by key, held weakly: what nobody uses any more is gone, unless it was kept.

    The registry never moves or frees memory: the models are ComfyUI's ModelPatchers, which
    ComfyUI evicts by its own rules (https://github.com/Comfy-Org/ComfyUI/issues/5536).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a weak reference may die, and call back, at any line
        self._loads = threading.Lock()
        self._entries: dict[ModelKey, Entry[Model]] = {}
        self._kept: dict[ModelKey, tuple[Model, set[str]]] = {}
        self._leaving: dict[ModelKey, Model] = {}

    def acquire(self, key: ModelKey, load: Callable[[], Loaded], keeper: str | None) -> Acquired:
        """Return the live model of `key`, or load it, and hold on to it for `keeper`, if any.

        A keeper (a loader node) keeps one model at a time.
        """
        with self._loads:
            acquired = self._live(key) or self._load(key, load)
        with self._lock:
            self._leaving.pop(key, None)
            if keeper is not None:
                self.let_go(keeper)
                self.forget_leaving()
                self._retire(key)
                self._kept.setdefault(key, (acquired.model, set()))[1].add(keeper)
        return acquired

    def let_go(self, keeper: str, path: str | None = None) -> None:
        """End what `keeper` keeps (of the file `path`); what somebody else holds stays.

        The model itself stays until it is acquired again or `forget_leaving`: the loader that was
        switched off may be about to run.
        """
        with self._lock:
            for key, (model, keepers) in list(self._kept.items()):
                if path in (None, key.file.path):
                    keepers.discard(keeper)
                if not keepers:
                    del self._kept[key]
                    self._leaving[key] = model

    def forget_leaving(self) -> None:
        """Drop what nobody keeps any more."""
        with self._lock:
            self._leaving.clear()

    def kept(self) -> list[ModelKey]:
        """Keys of the models that `keep` holds on to."""
        with self._lock:
            return list(self._kept)

    def live(self) -> list[tuple[Model, int]]:
        """Every live model, with the number of handles that nodes hold for it."""
        with self._lock:
            found = [(entry.model(), len(entry.handles)) for entry in self._entries.values()]
        return [(model, count) for model, count in found if model is not None]

    def release(self) -> int:
        """Let go of every kept model; what somebody else holds stays. Returns how many."""
        with self._lock:
            count = len(self._kept)
            self._kept.clear()
            self._leaving.clear()
            return count

    def _live(self, key: ModelKey) -> Acquired | None:
        with self._lock:
            entry = self._entries.get(key)
            model = entry.model() if entry else None
            if entry is None or model is None:
                return None
            return Acquired(model, entry.parts, True, entry.seconds, entry)

    def _load(self, key: ModelKey, load: Callable[[], Loaded]) -> Acquired:
        with self._lock:
            self._retire(key)
        start = time.perf_counter()
        loaded = load()
        seconds = time.perf_counter() - start
        entry: Entry[Model] = Entry(
            weakref.ref(loaded.model, lambda _: self._forget(key)), loaded.parts, seconds
        )
        with self._lock:
            self._entries[key] = entry
        return Acquired(loaded.model, loaded.parts, False, seconds, entry)

    def _retire(self, key: ModelKey) -> None:
        """Drop what is kept of other versions of the same file: nobody can ask for them again."""
        for old in [k for k in self._kept if k.file.path == key.file.path and k.file != key.file]:
            del self._kept[old]

    def _forget(self, key: ModelKey) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.model() is None:
                del self._entries[key]
