"""Values that somebody pinned: one file each, named by its content, kept until it is deleted."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import conditioning_codec as codec
from .disk_tier import DiskTier, is_key, parts_of

_NO_BOUND = 1 << 62
MISSING = "is not on this machine: it was deleted, or the workflow comes from another one"
REMEDY = "Unpin its node (right-click, Unpin output) and run again, or bring back the file"


class Unpinnable(ValueError):
    """A value that cannot be kept exactly: the `index` of the output, and why."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


class PinLost(ValueError):
    """A pinned value that cannot be had; the message says why and what to do."""


class Pin(NamedTuple):
    """What is known of a pinned value without loading it; times in seconds since 1970.

    `types` are the types of the outputs that it came from; empty if the file cannot be read.
    """

    content: str
    bytes: int
    types: list[str]
    created: float
    last_used: float


def content_of(values: Sequence[Any]) -> str:
    """The SHA-256 of values, the same for equal ones. Raises Unpinnable.

    Not that of the file: safetensors orders its header anew in every process.
    """
    digest = hashlib.sha256()
    for index, value in enumerate(values):
        tensors: list[torch.Tensor] = []
        try:
            tree = json.dumps(codec.flatten(value, tensors)).encode()
        except codec.Unstorable as why:
            raise Unpinnable(index, str(why)) from why
        digest.update(struct.pack("<Q", len(tree)) + tree)
        for tensor in tensors:  # their sizes are in the tree
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class PinStore:
    """Pinned values in `directory`, which is made when first written. No bound: it is work."""

    def __init__(self, directory: Path) -> None:
        self._files = DiskTier(directory, _NO_BOUND)

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        return self._files.directory

    def put(self, values: Sequence[Any], types: Sequence[str], device: str) -> Pin:
        """Write the outputs of one node. Raises Unpinnable, OSError.

        What is there already is written again, which mends a damaged file.
        """
        content, now = content_of(values), time.time()
        parts = {"content": content, "types": json.dumps(list(types)), "created": str(now)}
        data = codec.encode(codec.Entry(list(values), 0.0, parts, device))
        self._files.write(content, data)
        return Pin(content, len(data), list(types), now, now)

    def get(self, content: str) -> codec.Entry:
        """Fresh copies of the values, as a list in an entry. Raises PinLost."""
        self.check(content)
        try:
            data = self._files.read(content)
            entry = codec.decode(data) if data is not None else None
        except codec.FutureVersion as error:
            raise _lost(content, f"is of a {error}") from error
        except codec.Elsewhere as error:
            raise _lost(content, f"cannot be loaded: {error}") from error
        except (codec.Corrupt, OSError) as error:
            raise _lost(content, f"has a damaged file ({error})") from error
        if entry is None:
            raise _lost(content, MISSING)
        if entry.parts.get("content") != content or type(entry.value) is not list:
            raise _lost(content, "has a file that holds another one")
        self._files.touch(content)
        return entry

    def check(self, content: object) -> None:
        """Raise PinLost if there is no such file; its content is not looked at."""
        if not is_key(content):
            raise PinLost(f"{str(content)[:80]!r} is not the SHA-256 of a pinned value.")
        if not self._files.path(content).exists():
            raise _lost(content, MISSING)

    def listed(self) -> list[Pin]:
        """Every pinned value, the last used first. Raises OSError."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        found = []
        for content in (name.removesuffix(".safetensors") for name in names):
            if is_key(content):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    found.append(self._described(content))
        return sorted(found, key=lambda pin: pin.last_used, reverse=True)

    def _described(self, content: str) -> Pin:
        path = self._files.path(content)
        status = path.stat()
        types, created = [], 0.0
        with suppress(OSError, ValueError, KeyError, TypeError):
            with open(path, "rb") as file:
                start = file.read(8)
                start += file.read(min(codec.header_bytes(start), codec.MAX_HEADER_BYTES))
            parts = parts_of(start)
            types, created = [str(t) for t in json.loads(parts["types"])], float(parts["created"])
        return Pin(content, status.st_size, types, created, status.st_mtime)

    def delete(self, content: str) -> bool:
        """Delete one; False if it was not there. Raises PinLost for what is no name, OSError."""
        if not is_key(content):
            self.check(content)
        try:
            self._files.path(content).unlink()
        except FileNotFoundError:
            return False
        return True


def _lost(content: str, why: str) -> PinLost:
    return PinLost(f"The pinned value {content[:12]} {why}. {REMEDY} pins/{content}.safetensors.")
