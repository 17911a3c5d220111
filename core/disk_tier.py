"""A directory of entries, one file each, that several processes and machines share.

No process waits for another. Files appear by an atomic rename, so a reader sees a whole file or
none; whoever finds the directory too full deletes the least recently used files, and finding one
already gone is as good as deleting it.

The bound holds for the directory as a whole: before a process writes, it lists the directory and
makes room. Between two listings it may write BLIND_SHARE of the bound without looking, and it
makes room down to the bound less RESERVED_SHARE: so up to 8 processes stay within the bound, plus
the one entry that each of them may be writing, while the cost of listing stays small.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO, NamedTuple

from . import conditioning_codec as codec
from .statistics import Size

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted: that is lock enough
    fcntl = None

SUFFIX = ".safetensors"
SET_ASIDE = ".unreadable"
TEMPORARY = ".writing"
ABANDONED_AFTER_SECONDS = 3600  # for temporary files where locks tell nothing
YOUNG_SECONDS = 10  # a temporary file is made and locked in two steps
SKEW_SECONDS = 86400  # clocks of machines differ; a last use still later than this is wrong
RESERVED_SHARE = 8
BLIND_SHARE = 64
REPLACE_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2)  # seconds; Windows refuses while someone reads
HEADER_GLANCE_BYTES = 1 << 16
_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_STEM = re.compile(r"(tmp|[0-9a-f]{16}-)[a-z0-9_]+")


def is_key(text: object) -> bool:
    """Whether this can be the name of an entry: a SHA-256 in hexadecimal."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


class _File(NamedTuple):
    """A file of ours as a listing shows it. `used` is in seconds since the epoch."""

    used: float
    path: str
    size: int

    @property
    def key(self) -> str | None:
        """The key of an entry; None for damaged and temporary files."""
        name = os.path.basename(self.path)
        return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else None


class DiskTier:
    """Bytes by key in `directory`, which is made when first written; `max_bytes` bounds it all.

    Safe from several threads and processes; the bound holds if one thread of each writes.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._blind_bytes: int | None = None  # written since the last listing; None: never listed

    def path(self, key: str) -> Path:
        """The file of `key`. Raises ValueError for what is no key: it must never become a path."""
        if not is_key(key):
            raise ValueError(f"not a SHA-256 in hexadecimal: {key!r}")
        return self.directory / f"{key}{SUFFIX}"

    def read(self, key: str) -> bytes | None:
        """The bytes under `key`, or None. Raises OSError, codec.Corrupt.

        Never reads more than the bound, nor more than a plausible header of a file whose size is
        not what that header says.
        """
        try:
            with open(self.path(key), "rb", opener=_open_at_once) as file:
                return self._read_checked(file)
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise codec.Corrupt("it is a folder") from error

    def _read_checked(self, file: BinaryIO) -> bytes:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise codec.Corrupt("it is not a file")
        if status.st_size > self.max_bytes:
            raise codec.Corrupt(f"its {status.st_size} bytes are more than the cache may hold")
        start = file.read(8)
        start += file.read(min(codec.header_bytes(start), codec.MAX_HEADER_BYTES))
        declared = codec.declared_bytes(start)
        if declared != status.st_size:
            raise codec.Corrupt(f"it has {status.st_size} bytes and claims to have {declared}")
        return start + file.read(declared - len(start))

    def set_aside(self, key: str) -> None:
        """Rename a damaged file, so that it is written anew and can be looked at. Raises OSError"""
        path = self.path(key)
        os.replace(path, path.with_suffix(SET_ASIDE))

    def prepare(self) -> None:
        """Make the directory if there is none. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, data: bytes) -> None:
        """Make room, then write atomically and durably. Raises OSError."""
        path = self.path(key)
        self.prepare()
        self._make_room(len(data), path)
        try:
            self._write(path, data)
        except FileNotFoundError:  # the directory was deleted meanwhile, or it was tidied up
            self.prepare()
            self._write(path, data)
        self._blind_bytes = (self._blind_bytes or 0) + len(data)

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = mkstemp(dir=self.directory, prefix=f"{path.stem[:16]}-", suffix=TEMPORARY)
        try:
            with open(handle, "wb") as file:
                _lock(file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if fcntl:  # still locked: nobody takes it for abandoned
                    _replace(name, path)
            if not fcntl:
                _replace(name, path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync_directory(self.directory)

    def discard(self, key: str) -> None:
        """Delete the file of `key`, if there is one. Raises OSError."""
        self.path(key).unlink(missing_ok=True)

    def touch(self, key: str) -> bool:
        """Note that `key` was used now; False if it is not there."""
        try:
            os.utime(self.path(key))  # by the clock of the file server, if it has one
        except FileNotFoundError:
            return False
        except OSError:  # a read-only cache is still a cache; only its order of use is lost
            pass
        return True

    def trim(self) -> None:
        """Delete what the bound does not allow, as after it was lowered. Raises OSError."""
        self._blind_bytes = None
        self._make_room(0, None)

    def _make_room(self, size: int, keep: Path | None) -> None:
        known = self._blind_bytes
        if known is not None and known + size <= self.max_bytes // BLIND_SHARE:
            return
        files = [file for file in self._files() if not _sweep(file)]
        total = sum(file.size for file in files) + size
        goal = self.max_bytes - self.max_bytes // RESERVED_SHARE
        for file in sorted(files, key=self._order):
            if total <= goal:
                break
            if file.path != str(keep) and not file.path.endswith(TEMPORARY) and not _delete(file):
                total -= file.size
        self._blind_bytes = 0
        if total > self.max_bytes and size:
            raise OSError(errno.ENOSPC, "its bound is reached, and its files cannot be deleted")

    def _order(self, file: _File) -> tuple[bool, float]:
        """Damaged files and those that nobody may read go first, then the least recently used."""
        return file.key is not None and file.size <= self.max_bytes, file.used

    def _files(self) -> list[_File]:
        """All files of ours. Raises OSError, unless there is no directory yet."""
        try:
            with os.scandir(self.directory) as entries:
                ours = [entry for entry in entries if _is_ours(entry.name)]
        except FileNotFoundError:
            return []
        files, latest = [], time.time() + SKEW_SECONDS
        for entry in ours:
            with suppress(OSError):  # another process deleted it meanwhile
                status = entry.stat(follow_symlinks=False)
                used = status.st_mtime
                if used > latest:  # it would never be the oldest: from here on it ages like others
                    os.utime(entry.path)
                files.append(_File(used, entry.path, status.st_size))
        return files

    def newest_parts(self, count: int) -> dict[str, dict[str, str]]:
        """What the headers of the `count` most recently used entries say they were made from."""
        try:
            newest = heapq.nlargest(count, (file for file in self._files() if file.key))
        except OSError:  # it only serves to explain; reading and writing report it themselves
            return {}
        return {file.key: parts for file in newest if file.key and (parts := _parts_of(file.path))}

    def usage(self) -> Size | None:
        """All files of ours, damaged and temporary ones too; None if they cannot be listed."""
        try:
            files = self._files()
        except OSError:
            return None
        return Size(len(files), sum(file.size for file in files))

    def clear(self, unused_seconds: float, used: Mapping[str, float]) -> tuple[Size, list[str]]:
        """Delete entries unused for so long, or all; `used` tells later uses (epoch seconds).

        Damaged and temporary files go with everything, or when they are as old. Returns what was
        deleted, and the files that could not be, with the reason.
        """
        try:
            files = self._files()
        except OSError as error:
            return Size(), [f"{self.directory}: {error.strerror or error}"]
        latest = time.time() - unused_seconds
        count = total = 0
        failed = []
        for file in files:
            if unused_seconds > 0 and max(file.used, used.get(file.key or "", 0.0)) > latest:
                continue
            if error := _delete(file):
                failed.append(f"{file.path}: {error.strerror or error}")
            else:
                count, total = count + 1, total + file.size
        self._blind_bytes = None
        return Size(count, total), failed


def _is_ours(name: str) -> bool:
    """Whether we made a file of that name; others are never counted and never deleted."""
    stem, suffix = os.path.splitext(name)
    if suffix in (SUFFIX, SET_ASIDE):
        return is_key(stem)
    return suffix == TEMPORARY and _TEMPORARY_STEM.fullmatch(stem) is not None


def _delete(file: _File) -> OSError | None:
    """Delete a file; the error if it is still there."""
    try:
        os.unlink(file.path)
    except FileNotFoundError:  # another process was faster
        return None
    except OSError as error:  # Windows: someone reads it; or the directory is read-only
        return error
    return None


def _sweep(file: _File) -> bool:
    """Delete a temporary file that a crash left behind; whether it did."""
    age = time.time() - file.used
    if not file.path.endswith(TEMPORARY) or age < YOUNG_SECONDS:
        return False
    if age < ABANDONED_AFTER_SECONDS and _is_locked(file.path):
        return False
    return _delete(file) is None


def _open_at_once(path: str, flags: int) -> int:
    """As open() does; but a pipe of that name must not make the caller wait for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _lock(handle: int) -> None:
    """Mark an open file as being written, until it is closed or its process dies."""
    if fcntl:
        with suppress(OSError):  # some network shares have no locks: then age decides
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: str) -> bool:
    """Whether a process is writing the file, as far as can be told. Never waits."""
    if not fcntl:
        return False
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _replace(source: str, target: Path) -> None:
    for pause in REPLACE_PAUSES:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, where directories can be opened."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _parts_of(path: str) -> dict[str, str]:
    """The parts noted in a file's header, or none where it cannot be read: they only explain."""
    try:
        with open(path, "rb") as file:
            return parts_of(file.read(HEADER_GLANCE_BYTES))
    except OSError:
        return {}


def parts_of(data: bytes) -> dict[str, str]:
    """The parts noted in an entry's header, or none where it cannot be read."""
    try:
        body = json.loads(codec.read_metadata(data)["entry"])
        return {str(name): str(digest) for name, digest in body["parts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
