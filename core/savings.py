"""How much the cache has saved: hits and seconds, of this process and of all before it."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .atomic_file import write_atomically


class Totals(NamedTuple):
    """Counts, and seconds saved."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0


class Savings:
    """Counts in memory; `persist` adds them to a file beside the entries.

    Processes that persist at the very same moment may lose one another's counts: they are figures
    to look at, and no lock that can hang is worth them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.now = Totals()
        self._pending = Totals()

    def hit(self, seconds: float) -> None:
        """Count a hit that saved so many seconds."""
        self._add(Totals(hits=1, seconds=seconds))

    def miss(self) -> None:
        """Count a miss."""
        self._add(Totals(misses=1))

    def total(self) -> Totals:
        """Of all processes that used this directory."""
        return _sum(self._stored(), self._pending)

    def persist(self) -> None:
        """Add what was counted since the last time to the file. Raises OSError."""
        with self._lock:
            pending, self._pending = self._pending, Totals()
        if pending == Totals():
            return
        total = _sum(self._stored(), pending)
        try:
            write_atomically(self.path, json.dumps(total._asdict()))
        except OSError:
            self._add_pending(pending)
            raise

    def forget(self) -> None:
        """Start again from zero, on disk too. Raises OSError."""
        with self._lock:
            self.now = self._pending = Totals()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _add(self, more: Totals) -> None:
        with self._lock:
            self.now = _sum(self.now, more)
        self._add_pending(more)

    def _add_pending(self, more: Totals) -> None:
        with self._lock:
            self._pending = _sum(self._pending, more)

    def _stored(self) -> Totals:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            hits, misses = int(content["hits"]), int(content["misses"])
            return Totals(hits, misses, float(content["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: counted anew
            return Totals()


def _sum(one: Totals, other: Totals) -> Totals:
    return Totals(*(a + b for a, b in zip(one, other, strict=True)))
