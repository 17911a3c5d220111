"""Conditioning by key: memory, a directory of safetensors files, and Redis if there is one.

Keys are SHA-256 digests of everything that the result depends on. Whatever reads wrong is a miss;
whatever cannot be written costs speed, never an image. Files and Redis are written in the
background, from bytes that were copied when the value was put.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from . import conditioning_codec as codec
from .background import Deadline, Worker
from .disk_tier import DiskTier, parts_of
from .miss_reason import miss_reason
from .statistics import Removed, Size, Usage

if TYPE_CHECKING:
    from .redis_tier import RedisTier

log = logging.getLogger("qwen_vram")

EXPLAINED_ENTRIES = 256  # each is a file to open, and they only serve to explain a miss
REMEMBERED_PARTS = 4096
QUEUE_BYTES = 128 << 20
QUEUE_WAIT_SECONDS = 0.25
TOUCH_SECONDS = 60.0  # a use in memory is noted on disk and in Redis at most this often
CLEAR_WAIT_SECONDS = 10.0
CLOSE_WAIT_SECONDS = 10.0
_OPEN: weakref.WeakSet[ConditioningStore] = weakref.WeakSet()


@dataclass(frozen=True)
class Hit:
    """A stored entry, and where it was found: "memory", "disk" or "redis"."""

    entry: codec.Entry
    tier: str


@dataclass
class _Kept:
    """Bytes in memory; when they were used, here and as the slower tiers know (monotonic)."""

    data: bytes
    used: float
    noted: float


class ConditioningStore:
    """Thread-safe. `directory` is made when first written; bounds are in bytes."""

    def __init__(
        self, directory: Path, memory_bytes: int, disk_bytes: int, redis: RedisTier | None = None
    ) -> None:
        self.memory_bytes = memory_bytes
        self._disk = DiskTier(directory, disk_bytes)
        self._redis = redis
        self._lock = threading.RLock()
        self._memory: OrderedDict[str, _Kept] = OrderedDict()
        self._pending: dict[str, bytes] = {}
        self._writer = Worker("qwen_vram disk", QUEUE_BYTES)
        self._broken: str | None = None
        self._parts: dict[str, dict[str, str]] | None = None
        self._damaged: set[str] = set()
        self._warned: set[str] = set()
        _OPEN.add(self)

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._disk.directory

    @property
    def disk_bytes(self) -> int:
        """The bound of the directory."""
        return self._disk.max_bytes

    def lookup(self, key: str, disk: bool = True) -> Hit | None:
        """Return a fresh copy of what was stored under `key`; not `disk`: from memory only."""
        self._disk.path(key)
        now = time.monotonic()
        with self._lock:
            kept = self._memory.get(key)
            if kept is not None:
                self._memory.move_to_end(key)
                kept.used = now
            data = kept.data if kept else self._pending.get(key)
        if data is not None:
            if disk and kept and now - kept.noted >= TOUCH_SECONDS:
                kept.noted = now
                self._note_use(key, data)
            return self._decoded(key, data, "memory")
        if not disk:
            return None
        return self._from_disk(key) or self._from_redis(key)

    def put(self, key: str, entry: codec.Entry, disk: bool = True) -> str | None:
        """Store a copy of `entry`, made now. Returns None, or why it is not (wholly) stored.

        What goes wrong when it is written later is logged, and returned by the next call.
        """
        self._disk.path(key)
        try:
            data = codec.encode(entry)
        except (codec.Unstorable, RuntimeError, MemoryError) as error:  # no memory for the copy
            return f"not stored: {error}"
        in_memory = self._remember(key, data, noted=disk)
        with self._lock:
            self._damaged.discard(key)
            self._note_parts(key, entry.parts)
        reason = self._queue(key, data) if disk else None
        if disk and self._redis:
            self._redis.send(key, data)
        if not in_memory and not disk:
            reason = f"its {len(data)} bytes are more than the memory cache may hold"
        return reason and f"{'kept in memory only' if in_memory else 'not stored'}: {reason}"

    def why_missed(self, key: str, parts: dict[str, str]) -> str:
        """Compare with what is stored: say which part of the key is new, in words.

        Only the first difference in the order of `parts` is told; the later ones follow from it.
        """
        with self._lock:
            if key in self._damaged:
                return "its stored file was damaged"
        return miss_reason(parts, self._known_parts())

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until what was put is written, as far as it can be; False after `timeout` seconds"""
        deadline = Deadline(timeout)
        written = self._writer.flush(timeout)
        return (self._redis is None or self._redis.flush(deadline.left())) and written

    def configure(
        self,
        *,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        redis: RedisTier | None | EllipsisType = ...,
    ) -> None:
        """Change bounds or the Redis tier while running; a lower bound takes effect at once."""
        if memory_bytes is not None:
            with self._lock:
                self.memory_bytes = memory_bytes
                self._shrink_memory()
        if disk_bytes is not None and disk_bytes != self._disk.max_bytes:
            lower = disk_bytes < self._disk.max_bytes
            self._disk.max_bytes = disk_bytes
            if lower:
                self._writer.submit(self._trim)
        if redis is not ... and redis is not self._redis:
            before, self._redis = self._redis, redis
            if before and not self._writer.submit(before.close):  # it may wait for the network
                before.close()

    def clear(self, unused_seconds: float = 0.0) -> Removed:
        """Remove what was not used for so long from every tier; 0: everything that is ours."""
        everything = unused_seconds <= 0
        with self._lock:
            if everything:
                self._pending.clear()  # their jobs find nothing to write
        self._writer.flush(CLEAR_WAIT_SECONDS)
        now = time.monotonic()
        with self._lock:
            ages = {key: now - kept.used for key, kept in self._memory.items()}
            old = [key for key, age in ages.items() if everything or age >= unused_seconds]
            sizes = [len(self._memory.pop(key).data) for key in old]
            self._parts = None
            self._damaged.clear()
        used = {key: time.time() - age for key, age in ages.items()}
        on_disk, failed = self._disk.clear(unused_seconds, used)
        in_redis = self._redis.clear(unused_seconds) if self._redis else None
        return Removed(Size(len(sizes), sum(sizes)), on_disk, in_redis, tuple(failed))

    def usage(self) -> Usage:
        """What each tier holds."""
        in_redis = self._redis.usage() if self._redis else None
        return Usage(self.memory_usage(), self._disk.usage(), in_redis)

    def memory_usage(self) -> Size:
        """What the tier in memory holds; quick, unlike the others."""
        with self._lock:
            sizes = [len(kept.data) for kept in self._memory.values()]
        return Size(len(sizes), sum(sizes))

    def forget_memory(self) -> None:
        """Keep only what is on disk and in Redis, as after a restart; waits for pending writes."""
        self.flush()
        with self._lock:
            self._memory.clear()
            self._parts = None
            self._damaged.clear()

    def close(self) -> None:
        """Write what is pending, within a bound of time. The store can be used again after."""
        if not self._writer.flush(CLOSE_WAIT_SECONDS):
            log.warning("The disk is too slow: the last prompts are not stored.")
        if self._redis:
            self._redis.close()

    def _remember(self, key: str, data: bytes, noted: bool) -> bool:
        """Keep bytes in memory; whether they fit. `noted`: the slower tiers know of this use."""
        now = time.monotonic()
        with self._lock:
            self._memory.pop(key, None)
            if len(data) <= self.memory_bytes:
                self._memory[key] = _Kept(data, now, now if noted else -TOUCH_SECONDS)
            self._shrink_memory()
            return key in self._memory

    def _shrink_memory(self) -> None:
        total = sum(len(kept.data) for kept in self._memory.values())
        while total > self.memory_bytes:
            total -= len(self._memory.popitem(last=False)[1].data)

    def _decoded(self, key: str, data: bytes, tier: str) -> Hit | None:
        """A hit, or None for an entry that cannot be used here. Raises codec.Corrupt."""
        try:
            return Hit(codec.decode(data), tier)
        except (codec.FutureVersion, codec.Elsewhere, MemoryError) as error:
            why = str(error) or "there is not enough memory"
            self._warn(key, f"Cannot use the cached prompt {key} ({tier}): {why}.")
            return None

    def _from_disk(self, key: str) -> Hit | None:
        try:
            data = self._disk.read(key) if self.disk_bytes else None
            hit = self._decoded(key, data, "disk") if data else None
        except codec.Corrupt as error:
            self._set_aside(key, error)
            return None
        except (OSError, MemoryError) as error:
            why = str(error) or "there is not enough memory"
            self._warn("read", f"Cannot read the prompt cache {self.directory}: {why}.")
            return None
        if hit and data:
            self._remember(key, data, noted=True)
            self._note_use(key, data)
        return hit

    def _set_aside(self, key: str, error: Exception) -> None:
        with self._lock:
            self._damaged.add(key)
        name = self._disk.path(key).name
        try:
            self._disk.set_aside(key)
            log.warning("The cached prompt %s is damaged (%s); it is set aside.", name, error)
        except FileNotFoundError:  # another process set it aside, and said so
            return
        except OSError as refusal:  # it stays, and is refused again
            self._warn(
                key, f"The cached prompt {name} is damaged ({error}); cannot rename it: {refusal}."
            )

    def _from_redis(self, key: str) -> Hit | None:
        redis = self._redis
        data = redis.fetch(key) if redis else None
        if not redis or data is None:
            return None
        try:
            hit = self._decoded(key, data, "redis")
        except codec.Corrupt as error:
            log.warning("The prompt %s in Redis is damaged (%s); it is deleted.", key, error)
            redis.discard(key)
            return None
        if hit:
            self._remember(key, data, noted=True)
            self._note_use(key, data)
        return hit

    def _queue(self, key: str, data: bytes) -> str | None:
        """Have bytes written to disk; None, or why that fails, or failed the last time."""
        if len(data) > self.disk_bytes:
            return f"its {len(data)} bytes are more than the disk cache may hold"
        try:
            self._disk.prepare()
        except OSError as error:
            return self._cannot_write(error)
        with self._lock:
            self._pending[key] = data
        job = self._writer.submit(lambda: self._write_pending(key), len(data), QUEUE_WAIT_SECONDS)
        if not job:
            with self._lock:
                self._pending.pop(key, None)
            reason = f"writing to {self.directory} is too slow"
            self._warn("slow", f"Some prompts are kept in memory only: {reason}.")
            return reason
        return self._broken

    def _write_pending(self, key: str) -> None:
        """In the background: write what was put last under `key`."""
        with self._lock:
            data = self._pending.get(key)
        if data is None:  # cleared, or already written for an earlier job
            return
        try:
            self._write(key, data)
        finally:
            with self._lock:
                cleared = key not in self._pending
                if self._pending.get(key) is data:
                    del self._pending[key]
        if cleared:
            self._disk.discard(key)

    def _write(self, key: str, data: bytes) -> None:
        try:
            self._disk.write(key, data)
        except OSError as error:
            self._cannot_write(error)
            with self._lock:
                if key in self._memory:  # tried again when it is used again
                    self._memory[key].noted = -TOUCH_SECONDS
            return
        with self._lock:
            self._broken = None
            self._warned.discard("write")

    def _cannot_write(self, error: OSError) -> str:
        reason = f"cannot write to {self.directory} ({error.strerror or error})"
        with self._lock:
            self._broken = reason
        self._warn(
            "write",
            f"Prompts are kept in memory only: {reason}. Free space there, or make it writable.",
        )
        return reason

    def _trim(self) -> None:
        try:
            self._disk.trim()
        except OSError as error:
            self._cannot_write(error)

    def _note_use(self, key: str, data: bytes) -> None:
        """Tell the slower tiers that `key` is in use, in the background; write what they lack."""

        def note() -> None:
            if len(data) <= self.disk_bytes and not self._disk.touch(key):
                self._write(key, data)

        self._writer.submit(note, len(data))
        if self._redis:
            self._redis.touch(key, data)

    def _note_parts(self, key: str, parts: dict[str, str]) -> None:
        if self._parts is not None:  # else they are read with the others, when a miss asks
            self._parts[key] = parts
            while len(self._parts) > REMEMBERED_PARTS:
                del self._parts[next(iter(self._parts))]

    def _known_parts(self) -> list[dict[str, str]]:
        """Digests of the parts of the newest entries, read once from their headers."""
        with self._lock:
            unread = self._parts is None
        on_disk = self._disk.newest_parts(EXPLAINED_ENTRIES) if unread else {}
        with self._lock:
            if self._parts is None:
                self._parts = on_disk
                here = {**{key: kept.data for key, kept in self._memory.items()}, **self._pending}
                self._parts.update((key, parts_of(data)) for key, data in here.items())
            return list(self._parts.values())

    def _warn(self, what: str, message: str) -> None:
        with self._lock:
            known = what in self._warned
            self._warned.add(what)
        if not known:
            log.warning(message)


@atexit.register
def _close_all() -> None:
    """A process that ends right after a prompt still writes it."""
    for store in list(_OPEN):
        store.close()
