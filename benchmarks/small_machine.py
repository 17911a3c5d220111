"""Less RAM than there is, and how much of it a process takes: for benchmarks, on Linux.

A limit is a cgroup (version 1 or 2; needs the right to make one) that the server joins: its page
cache counts, so a file that does not fit is read from the disk again, as on a small machine.
Without that right another process takes the RAM instead, which shows the same but costs a while.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from demo.server import Server

from .text_to_image import device_bytes_used

CGROUPS = Path("/sys/fs/cgroup")
NAME = "qwen_vram_benchmark"
POLL_SECONDS = 0.01
KINDS = ("RssAnon", "RssFile", "RssShmem")
EVERYTHING = ("/free", {"unload_models": True, "free_memory": True})
NOISE = 1e6  # bytes
PAUSE, QUIET, MOST_ASKED = 1.0, 2, 20  # seconds; how often nothing may have changed; how often

HOG = """
import ctypes, mmap, sys
size = int(sys.argv[1])
held = mmap.mmap(-1, size)
ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(held)), 1, size)
print("ready", flush=True)
sys.stdin.read()
"""


def available() -> int:
    """Bytes of RAM that the machine can give."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def make_cgroup(size: int) -> Path | None:
    """A cgroup of so many bytes, or None where this process may not make one."""
    for parent, limit in (
        (CGROUPS / "memory", "memory.limit_in_bytes"),
        (CGROUPS, "memory.max"),
    ):
        with contextlib.suppress(OSError):
            if limit == "memory.max":
                (parent / "cgroup.subtree_control").write_text("+memory")
            folder = parent / NAME
            folder.mkdir(exist_ok=True)
            (folder / limit).write_text(str(size))
            with contextlib.suppress(OSError):
                (folder / "memory.swap.max").write_text("0")
            return folder
    return None


@contextlib.contextmanager
def small_ram(gib: float | None) -> Iterator[str]:
    """While this lasts, servers that start have so much RAM. Gives the way: "", cgroup or hog."""
    os.environ.pop("QWEN_VRAM_CGROUP", None)
    if gib is None:
        yield ""
        return
    group = make_cgroup(int(gib * 2**30))
    if group is not None:
        os.environ["QWEN_VRAM_CGROUP"] = str(group)
        try:
            yield "cgroup"
        finally:
            os.environ.pop("QWEN_VRAM_CGROUP", None)
            remove(group)
        return
    command = [sys.executable, "-c", HOG, str(available() - int(gib * 2**30))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hog:
        assert hog.stdin and hog.stdout
        hog.stdout.readline()
        try:
            yield "hog"
        finally:
            hog.stdin.close()


def remove(group: Path) -> None:
    """When the last process of the cgroup has ended."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def forget(*paths: Path) -> None:
    """Drop files from the page cache, as after a reboot."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fetched(pid: int) -> int:
    """Bytes that the process had read from storage so far."""
    rows = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("read_bytes"))


class Gauge(threading.Thread):
    """The peaks of a process: GPU memory of the card, and RAM by kind, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.running = pid, True
        self.peaks: dict[str, int] = {}
        self.start()

    def run(self) -> None:
        """Until stopped."""
        while self.running:
            for name, value in self.now().items():
                self.peaks[name] = max(self.peaks.get(name, 0), value)
            time.sleep(POLL_SECONDS)

    def now(self) -> dict[str, int]:
        """What is taken at this moment; anonymous memory and the file's pages together are RSS."""
        found = {"VRAM": device_bytes_used()}
        with contextlib.suppress(OSError):
            rows = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            sizes = {row.split(":")[0]: row.split()[1] for row in rows if row.startswith("Rss")}
            # A process that has just ended no longer has these rows.
            found |= {kind: int(sizes[kind]) * 1024 for kind in KINDS if kind in sizes}
        group = os.environ.get("QWEN_VRAM_CGROUP")
        if group:
            for name in ("memory.current", "memory.usage_in_bytes"):
                with contextlib.suppress(OSError):
                    found["cgroup"] = int((Path(group) / name).read_text())
        return found

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        found, self.peaks = self.peaks, self.now()
        return found


def let_go(server: Server, gauge: Gauge) -> dict[str, int]:
    """Ask for everything to be let go until nothing changes any more; what is taken then.

    Asked once, ComfyUI (0.33) may not hear it before the next prompt has ended: its worker is only
    woken where it waits, and after a prompt it collects garbage before it waits.
    """
    found: list[dict[str, int]] = []
    for _ in range(MOST_ASKED):
        server.post_json(*EVERYTHING)
        time.sleep(PAUSE)
        found.append(gauge.now())
        if len(found) > QUIET and alike(found[-QUIET - 1 :]):
            break
    else:
        print(f"memory did not come to rest in {MOST_ASKED * PAUSE:.0f} s", flush=True)
    return found[-1]


def alike(rows: list[dict[str, int]]) -> bool:
    """Whether they differ by less than NOISE."""
    kinds = set.intersection(*map(set, rows))
    return all(max(r[k] for r in rows) - min(r[k] for r in rows) < NOISE for k in kinds)
