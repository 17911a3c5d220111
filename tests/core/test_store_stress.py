"""Four processes in one directory, two of them killed again and again.

By default with a few keys; QWEN_VRAM_STRESS=full runs 10,000 keys in 50 MB.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the processes of the test, which have no conftest
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401

import torch  # noqa: E402
from pack.core import conditioning_codec as codec  # noqa: E402
from pack.core.conditioning_store import ConditioningStore  # noqa: E402

PROCESSES, KILLED = 4, 2
FIELDS = ("operations", "hits", "wrong", "slowest_us", "unwritten", "from_disk")


class Scale(NamedTuple):
    """How large a run is: keys, bound in bytes, operations of all processes, largest tensor."""

    keys: int
    bound: int
    operations: int
    floats: int


MODEST = Scale(keys=500, bound=1_000_000, operations=4_000, floats=4000)
FULL = Scale(keys=10_000, bound=50_000_000, operations=100_000, floats=8000)


def key(number: int) -> str:
    """The key of a number."""
    return hashlib.sha256(b"%d" % number).hexdigest()


def value(number: int, scale: Scale) -> list:
    """What belongs to a key, of a size that depends on it too."""
    floats = 1 + random.Random(number).randrange(scale.floats)
    return [[torch.full((floats,), float(number)), {"n": number}]]


def work(directory: Path, scale: Scale, slot: int, shared: mmap.mmap, seed: int) -> None:
    """Look keys up and put what is missing until the operations of all processes are done."""
    counters = memoryview(shared).cast("q")[slot * len(FIELDS) : (slot + 1) * len(FIELDS)]
    everything = memoryview(shared).cast("q")
    store = ConditioningStore(directory, scale.bound // 100, scale.bound)
    chance = random.Random(seed)
    while sum(everything[:: len(FIELDS)]) < scale.operations:
        number = chance.randrange(scale.keys)
        start = time.perf_counter()
        hit = store.lookup(key(number))
        if hit is None:
            entry = codec.Entry(value(number, scale), 1.0, {"text": str(number)}, "cpu")
            counters[4] += store.put(key(number), entry) is not None
        slowest = int(1e6 * (time.perf_counter() - start))
        if hit is not None:
            counters[1] += 1
            counters[5] += hit.tier == "disk"
            right = value(number, scale)[0]
            found = hit.entry.value[0]
            counters[2] += not (torch.equal(found[0], right[0]) and found[1] == right[1])
        counters[3] = max(counters[3], slowest)
        counters[0] += 1
    counters[4] += not store.flush(20)


def nursery(directory: Path, scale: Scale, seed: int) -> None:
    """Keep the processes alive, kill some of them at random instants, print what came out.

    Forked from a process that has imported torch and started no thread, or a restart would cost
    seconds.
    """
    shared = mmap.mmap(-1, PROCESSES * len(FIELDS) * 8)
    counters = memoryview(shared).cast("q")
    chance = random.Random(seed)

    def start(slot: int) -> int:
        number = chance.randrange(1 << 30)
        child = os.fork()
        if child:
            return child
        work(directory, scale, slot, shared, number)
        os._exit(0)

    children = [start(slot) for slot in range(PROCESSES)]
    kills = largest = most_files = 0
    while sum(counters[:: len(FIELDS)]) < scale.operations:
        time.sleep(chance.uniform(0.005, 0.1))
        victim = PROCESSES - 1 - kills % KILLED
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
        kills += 1
        children[victim] = start(victim)
        size, files = measure(directory)
        largest, most_files = max(largest, size), max(most_files, files)
    codes = [os.waitpid(child, 0)[1] for child in children]
    by_field = {name: list(counters[i :: len(FIELDS)]) for i, name in enumerate(FIELDS)}
    facts = {"kills": kills, "codes": codes, "largest": largest, "most_files": most_files}
    print(json.dumps({**by_field, **facts}))  # noqa: T201


def measure(directory: Path) -> tuple[int, int]:
    """Bytes and files in the directory, now."""
    size = files = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                size += entry.stat().st_size
                files += 1
            except FileNotFoundError:
                continue
    return size, files


def check_files(directory: Path, scale: Scale) -> int:
    """Every file that is left holds what belongs to its name; returns how many there are."""
    number_of = {key(number): number for number in range(scale.keys)}
    files = list(directory.glob("*.safetensors"))
    for path in files:
        number = number_of[path.stem]
        assert codec.decode(path.read_bytes()).value[0][1] == {"n": number}
    return len(files)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_processes_that_share_a_directory_and_are_killed_leave_it_whole(tmp_path: Path) -> None:
    scale = FULL if os.environ.get("QWEN_VRAM_STRESS") == "full" else MODEST
    directory = tmp_path / "store"
    directory.mkdir()
    command = [sys.executable, __file__, str(directory), json.dumps(scale)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + scale.keys / 10)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    one = len(codec.encode(codec.Entry([[torch.zeros(scale.floats), {"n": 0}]], 1.0, {}, "cpu")))
    left = check_files(directory, scale)
    facts.update(seconds=round(time.monotonic() - start, 1), left=left, stderr=done.stderr)
    facts.update(left_bytes=measure(directory)[0], limit=scale.bound + PROCESSES * (one + 200))
    print(json.dumps(facts, indent=1))  # noqa: T201
    assert sum(facts["wrong"]) == 0 and facts["codes"] == [0] * PROCESSES
    assert facts["kills"] >= 10 and sum(facts["from_disk"]) > 100 and left > 20
    assert max(facts["largest"], facts["left_bytes"]) <= facts["limit"]
    assert max(facts["slowest_us"]) < 5e6
    assert not list(directory.glob("*.unreadable")) and "damaged" not in done.stderr


if __name__ == "__main__":
    nursery(Path(sys.argv[1]), Scale(*json.loads(sys.argv[2])), struct.unpack("<I", b"seed")[0])
