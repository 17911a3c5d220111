"""Conditioning by key: a memory tier, a disk tier of safetensors files, bounds and eviction.

Keys are SHA-256 digests of everything that the result depends on. Whatever reads wrong is a miss;
whatever cannot be written costs speed, never an image.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp

from . import conditioning_codec as codec

log = logging.getLogger("qwen_vram")

SUFFIX = ".safetensors"
SET_ASIDE = ".unreadable"
TEMPORARY = ".writing"
ABANDONED_AFTER_SECONDS = 3600
HEADER_GLANCE_BYTES = 1 << 16
EXPLAINED_ENTRIES = 256  # each is a file to open, and they only serve to explain a miss
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Hit:
    """A stored entry, and where it was found: "memory" or "disk"."""

    entry: codec.Entry
    tier: str


class ConditioningStore:
    """Thread-safe. `directory` is made when first written; bounds are in bytes."""

    def __init__(self, directory: Path, memory_bytes: int, disk_bytes: int) -> None:
        self.directory = directory
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self._lock = threading.RLock()
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._parts: dict[str, dict[str, str]] | None = None
        self._damaged: set[str] = set()
        self._warned: set[str] = set()

    def lookup(self, key: str, disk: bool = True) -> Hit | None:
        """Return a fresh copy of what was stored under `key`, from memory or else from disk."""
        with self._lock:
            data = self._memory.get(key)
            if data is not None:
                self._memory.move_to_end(key)
        if data is None:
            return self._from_disk(key) if disk else None
        if disk and not self._path(key).exists():  # stored for memory only, or the disk was full
            self._to_disk(key, data)
        return Hit(codec.decode(data), "memory")

    def put(self, key: str, entry: codec.Entry, disk: bool = True) -> str | None:
        """Store a copy of `entry`. Returns None, or why it was not (wholly) stored."""
        try:
            data = codec.encode(entry)
        except codec.Unstorable as error:
            return f"not stored: {error}"
        self._remember(key, data)
        with self._lock:
            self._known_parts()[key] = entry.parts
            self._damaged.discard(key)
        return self._to_disk(key, data) if disk else None

    def why_missed(self, key: str, parts: dict[str, str]) -> str:
        """Compare with what is stored: say which part of the key is new, in words.

        Only the first difference in the order of `parts` is told; the later ones follow from it.
        """
        with self._lock:
            if key in self._damaged:
                return "its stored file was damaged"
            known = list(self._known_parts().values())
        same_text = [p for p in known if p.get("text") == parts["text"]]
        if not same_text:
            return "new text"
        different = min(([n for n in parts if p.get(n) != parts[n]] for p in same_text), key=len)
        return f"{different[0]} changed" if different else "evicted"

    def _remember(self, key: str, data: bytes) -> None:
        with self._lock:
            self._memory.pop(key, None)
            if len(data) <= self.memory_bytes:
                self._memory[key] = data
            while sum(map(len, self._memory.values())) > self.memory_bytes:
                self._memory.popitem(last=False)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a SHA-256 in hexadecimal: {key!r}")
        return self.directory / f"{key}{SUFFIX}"

    def _from_disk(self, key: str) -> Hit | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            entry = codec.decode(data)
        except FileNotFoundError:
            return None
        except codec.FutureVersion as error:
            self._warn(str(path), f"Cannot use the cached prompt {path.name}: {error}.")
            return None
        except codec.Corrupt as error:
            self._set_aside(path, error)
            self._damaged.add(key)
            return None
        except OSError as error:
            self._warn("read", f"Cannot read the prompt cache {path}: {error}.")
            return None
        with suppress(OSError):  # a read-only cache is still a cache; only its order of use is lost
            os.utime(path)
        self._remember(key, data)
        return Hit(entry, "disk")

    def _set_aside(self, path: Path, error: Exception) -> None:
        log.warning("The cached prompt %s is damaged (%s); it is set aside.", path.name, error)
        with suppress(OSError):  # read-only directory: the entry stays and is refused again
            os.replace(path, path.with_suffix(SET_ASIDE))

    def _to_disk(self, key: str, data: bytes) -> str | None:
        path = self._path(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write(path, data)
        except OSError as error:
            reason = (
                f"kept in memory only: cannot write to {self.directory} ({error.strerror or error})"
            )
            self._warn("write", f"Prompts are {reason}. Free space there, or make it writable.")
            return reason
        self._warned.discard("write")
        self._evict(keep=path)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        """Atomically and durably: a reader sees the whole file or none, also after a power cut."""
        handle, name = mkstemp(dir=self.directory, suffix=TEMPORARY)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _evict(self, keep: Path) -> None:
        """Delete least recently used files until the bound holds, and what a crash left behind."""
        files = []
        for entry in _scan(self.directory):
            with suppress(OSError):  # another process evicts too, or holds it open
                stat = entry.stat()
                abandoned = time.time() - stat.st_mtime > ABANDONED_AFTER_SECONDS
                if entry.name.endswith((SUFFIX, SET_ASIDE)):
                    files.append(
                        (entry.name.endswith(SUFFIX), stat.st_mtime, entry.path, stat.st_size)
                    )
                elif entry.name.endswith(TEMPORARY) and abandoned:
                    os.unlink(entry.path)
        total = sum(size for *_, size in files)
        for _, _, path, size in sorted(files):  # damaged ones first, then the oldest
            if total <= self.disk_bytes:
                return
            if path != str(keep):
                with suppress(OSError):
                    os.unlink(path)
                    total -= size

    def _known_parts(self) -> dict[str, dict[str, str]]:
        """Digests of the parts of the newest keys on disk, read once from the headers."""
        if self._parts is None:
            entries = [e for e in _scan(self.directory) if e.name.endswith(SUFFIX)]
            entries.sort(key=_age, reverse=True)
            newest = entries[:EXPLAINED_ENTRIES]
            self._parts = {e.name.removesuffix(SUFFIX): _read_parts(e.path) for e in newest}
        return self._parts

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(message)


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:  # none yet, or not ours to list: reading and writing report that themselves
        return []


def _age(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:  # deleted by another process meanwhile
        return 0.0


def _read_parts(path: str) -> dict[str, str]:
    """The parts noted in a file's header, or none where it cannot be read: they only explain."""
    try:
        with open(path, "rb") as file:
            body = json.loads(codec.read_metadata(file.read(HEADER_GLANCE_BYTES))["entry"])
        return {str(k): str(v) for k, v in body["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
