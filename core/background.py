"""Work that nobody waits for: one daemon thread, started with the first job, bounded in bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("qwen_vram")

IDLE_SECONDS = 2.0  # without work for so long, the thread ends; the next job starts another


class Worker:
    """Runs jobs in order, one at a time. Safe to use from several threads.

    `max_bytes` bounds what waiting jobs hold; a single larger job is taken when none waits.
    """

    def __init__(self, name: str, max_bytes: int) -> None:
        self.name = name
        self.max_bytes = max_bytes
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._submitted = self._done = 0
        self._running = False

    def submit(self, job: Callable[[], None], size: int = 0, wait_seconds: float = 0.0) -> bool:
        """Queue a job that holds `size` bytes; False when there is no room in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(size), wait_seconds):
                return False
            if not self._running and not self._start():
                return False
            self._jobs.append((job, size))
            self._bytes += size
            self._submitted += 1
            self._changed.notify_all()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until all jobs submitted so far have run; False after `timeout` seconds."""
        with self._changed:
            target = self._submitted
            return self._changed.wait_for(lambda: self._done >= target, timeout)

    def _fits(self, size: int) -> bool:
        return not self._bytes or self._bytes + size <= self.max_bytes

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._work, name=self.name, daemon=True).start()
        except RuntimeError as error:  # no more threads, or the interpreter is ending
            log.warning("Cannot start a thread for %s (%s).", self.name, error)
            return False
        self._running = True
        return True

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            job, size = taken
            try:
                job()
            except Exception:  # a job reports what can go wrong; the rest must not end the thread
                log.exception("A job of %s failed.", self.name)
            del job, taken
            with self._changed:
                self._bytes -= size
                self._done += 1
                self._changed.notify_all()

    def _next(self) -> tuple[Callable[[], None], int] | None:
        with self._changed:
            if self._changed.wait_for(lambda: self._jobs, IDLE_SECONDS):
                return self._jobs.popleft()
            self._running = False
            return None


class Deadline:
    """What is left of a number of seconds that several steps share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._end - time.monotonic())
