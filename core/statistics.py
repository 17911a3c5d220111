"""What the tiers of the store hold, and what was removed from them."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """How many entries (on disk: files), and how many bytes they take."""

    entries: int = 0
    bytes: int = 0


class Usage(NamedTuple):
    """What each tier holds; None where it cannot be measured, or where there is no such tier."""

    memory: Size
    disk: Size | None
    redis: Size | None


class Removed(NamedTuple):
    """What was removed from each tier, and what could not be.

    `redis` is None without a Redis that answers. `failed` names the files that are still there,
    each with the reason.
    """

    memory: Size
    disk: Size
    redis: Size | None
    failed: tuple[str, ...] = ()
