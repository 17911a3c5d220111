"""What torch's own allocator has in free blocks, from a snapshot of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SMALL_BYTES = 64_000_000


class Fragments(NamedTuple):
    """Bytes in free blocks of one device.

    `stuck_bytes` lie between live blocks, so that emptying the cache cannot give them back;
    `small_bytes` of them in `small_count` blocks under SMALL_BYTES, where no large tensor fits.
    """

    free_bytes: int
    largest_bytes: int
    stuck_bytes: int
    small_bytes: int
    small_count: int


def fragments(snapshot: Iterable[Mapping[str, Any]], device: int) -> Fragments:
    """Read `torch.cuda.memory_snapshot()` for the device of this number.

    A segment is what the driver gave in one piece. It goes back only when it is free as a whole.
    """
    free, stuck = [], []
    for segment in snapshot:
        if segment["device"] != device:
            continue
        blocks = segment["blocks"]
        sizes = [block["size"] for block in blocks if block["state"] == "inactive"]
        free += sizes
        if len(sizes) < len(blocks):
            stuck += sizes
    small = [size for size in stuck if size < SMALL_BYTES]
    return Fragments(sum(free), max(free, default=0), sum(stuck), sum(small), len(small))
