"""The files of a model that was saved in several, as diffusers and transformers do it."""

from __future__ import annotations

import os
import re

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<ending>\.[^.]+)")


def shards_of(path: str) -> list[str]:
    """Every shard of the model that the file at `path` is one of, in order; else `path` alone.

    By the name alone: whether they are there is for the reader to see.
    """
    folder, name = os.path.split(path)
    match = _SHARD.fullmatch(name)
    total = int(match["total"]) if match else 0
    if match is None or not 1 <= int(match["number"]) <= total:
        return [path]
    names = (f"{match['stem']}-{i:05}-of-{total:05}{match['ending']}" for i in range(1, total + 1))
    return [os.path.join(folder, n) for n in names]
