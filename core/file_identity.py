"""Which file it is: real path, size, modification time; a replaced file is another file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .shards import shards_of

MAX_FILES_IN_DIRECTORY = 2000


@dataclass(frozen=True, order=True)
class FileIdentity:
    """One version of one file. Two links to the same file are equal."""

    path: str
    size: int
    mtime_ns: int
    changed_ns: int = field(default=0, compare=False)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Identify the file behind `path`, links resolved. Raises OSError when there is none.

        `changed_ns` is when the file was last written, renamed or replaced, or a link on the way
        to it was, as far as the system tells (on Windows it knows less).
        """
        real = os.path.realpath(path)
        stat = os.stat(real)
        times = [stat.st_mtime_ns, stat.st_ctime_ns, *_link_times(Path(path))]
        return cls(real, stat.st_size, stat.st_mtime_ns, max(times))


def _link_times(path: Path) -> list[int]:
    """When each symbolic link among a path and its parent folders was made."""
    return [p.lstat().st_ctime_ns for p in (path, *path.absolute().parents) if p.is_symlink()]


def identify(path: str | os.PathLike[str]) -> list[FileIdentity]:
    """Identify a file, or every file below a directory. Raises OSError, ValueError if too many."""
    if not os.path.isdir(path):
        return [FileIdentity.of(path), *_companions(Path(path))]
    found: list[FileIdentity] = []
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders.sort()
        found += [FileIdentity.of(os.path.join(folder, name)) for name in sorted(names)]
        if len(found) > MAX_FILES_IN_DIRECTORY:
            raise ValueError(f"{path} holds more than {MAX_FILES_IN_DIRECTORY} files")
    return found


def _companions(path: Path) -> list[FileIdentity]:
    """Files that a loader opens beside the named one: shards; GGUF encoders come with an mmproj."""
    shards = [Path(p) for p in shards_of(str(path)) if Path(p) != path and os.path.isfile(p)]
    if shards:
        return [FileIdentity.of(p) for p in shards]
    if path.suffix.lower() != ".gguf":
        return []
    beside = sorted(path.parent.glob("*.gguf"))
    return [FileIdentity.of(p) for p in beside if "mmproj" in p.name.lower() and p != path]
