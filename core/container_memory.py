"""The memory limit of the container that a process runs in, by the files of Linux's cgroups."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PROCESS = Path("/proc/self/cgroup")
TREE = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 for "no limit"


class Limit(NamedTuple):
    """Bytes: what the container may take, and what all of its processes hold."""

    most: int
    held: int  # without file pages, which the kernel drops when it needs room


def limit(process: Path = PROCESS, tree: Path = TREE) -> Limit | None:
    """The tightest limit of this process's own group and those around it; None without one."""
    found = [one for folder, file in _groups(process, tree) if (one := _read(folder / file))]
    return min(found, key=lambda one: one.most - one.held, default=None)


def _groups(process: Path, tree: Path) -> list[tuple[Path, str]]:
    """The folders of this process's groups, innermost first, with the file of the limit.

    Version 1 has a tree for each controller, version 2 a single one (man cgroups). A container
    often sees its own group as the root of the tree.
    """
    try:
        lines = [row.split(":", 2) for row in process.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found: list[tuple[Path, str]] = []
    for _, controllers, path in (row for row in lines if len(row) == 3):
        if controllers in ("", "memory"):
            root = tree / "memory" if controllers else tree
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            inside = Path(path.lstrip("/"))
            found += [(root / part, file) for part in (inside, *inside.parents)]
    return found


def _read(file: Path) -> Limit | None:
    """One group's figures; None where there is no such group, or no limit."""
    try:
        said = file.read_text().strip()
        rows = [row.split() for row in file.with_name("memory.stat").read_text().splitlines()]
    except OSError:
        return None
    if not said.isdigit() or int(said) >= UNLIMITED:
        return None
    counts = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    kinds = ("anon", "shmem") if file.name == "memory.max" else ("rss", "shmem")
    # Version 1 counts the groups inside beside its own, version 2 always does.
    return Limit(int(said), sum(counts.get(f"total_{k}", counts.get(k, 0)) for k in kinds))
