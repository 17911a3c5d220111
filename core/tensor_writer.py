"""Write a safetensors file tensor by tensor, without ever holding all of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import torch

from .units import size_text

Entry = tuple[torch.dtype, Sequence[int]]

ALIGNMENT = 8  # of the data, in bytes: that of safetensors itself
PART = re.compile(r"\.safetensors\.[0-9a-f]{8}\.writing$")  # how the file ends while it is written
OLD_PART = 24 * 3600  # seconds since anything was written to it
DTYPES = {  # as safetensors spells them, in the order in which it writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorWriter:
    """One safetensors file of known `entries`, which come in any order, each once.

    It appears under its own name when all of it is written (`commit`, or the end of a `with` block
    without an error); else nothing of it is left.
    """

    def __init__(
        self, path: str | Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]
    ) -> None:
        """`entries`: dtype and shape by name. Raises ValueError (no space), OSError."""
        self.path = Path(path)
        self._header, self._offsets = _layout(entries, metadata)
        self._left = {n: (dtype, tuple(shape)) for n, (dtype, shape) in entries.items()}
        self.header_bytes = len(self._header)
        self.bytes = self.header_bytes + sum(_bytes(entry) for entry in entries.values())
        self._refuse_to_overwrite()
        self._remove_old_parts()
        self._require_space()
        self._part = self.path.with_name(f"{self.path.name}.{uuid4().hex[:8]}.writing")
        self._file = open(self._part, "xb", buffering=0)  # noqa: SIM115 - see commit and discard

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one entry, from any device. Raises ValueError: not as announced, or a full disk."""
        if name not in self._left:
            raise ValueError(f"{name} is no entry of {self.path.name}, or was written before.")
        if (tensor.dtype, tuple(tensor.shape)) != self._left[name]:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and {self.path.name} was to hold "
                f"{self._left[name][0]} {self._left[name][1]}."
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._put(self._offsets[name], memoryview(data))
        del self._left[name]

    def commit(self) -> None:
        """Give the file its name. Raises ValueError if an entry is missing, OSError."""
        if self._left:
            raise ValueError(f"{self.path.name} lacks {next(iter(self._left))}.")
        self._put(0, memoryview(self._header))
        self._file.close()
        self._refuse_to_overwrite()
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Remove what was written; without effect after `commit`."""
        with suppress(OSError):  # closing writes what is left: the disk may be full
            self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._part)

    def __enter__(self) -> TensorWriter:
        """Use it as `with TensorWriter(...) as writer`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit, or after an error or an interrupt discard."""
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()

    def _put(self, offset: int, data: memoryview) -> None:
        try:
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise ValueError(
                f"{self.path.name} could not be written ({error.strerror}); nothing of it is left."
            ) from error

    def _refuse_to_overwrite(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path} exists and is not overwritten; choose another name.")

    def _remove_old_parts(self) -> None:
        """Remove what earlier writers, killed a day ago or more, left in this folder."""
        for part in self.path.parent.glob("*.writing"):
            with suppress(OSError):  # gone already, or another program holds it: tried again later
                if PART.search(part.name) and time.time() - part.stat().st_mtime > OLD_PART:
                    part.unlink()

    def _require_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.bytes:
            raise ValueError(
                f"{self.path.name} needs {size_text(self.bytes)}, and the disk of "
                f"{self.path.parent} has {size_text(free)} free; make space there, "
                "or write to another disk."
            )


def _bytes(entry: Entry) -> int:
    dtype, shape = entry
    return dtype.itemsize * prod(shape)


def _layout(
    entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each entry's bytes begin in the file, ordered as safetensors does it.

    The widest dtypes come first, so that all of them lie at multiples of their own size.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    for name, (dtype, _) in entries.items():
        if dtype not in ranks:
            raise ValueError(f"{name} is {dtype}, which a safetensors file cannot hold.")
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in sorted(entries, key=lambda n: (ranks[entries[n][0]], n)):
        starts[name], end = end, end + _bytes(entries[name])
        dtype, shape = entries[name]
        offsets = [starts[name], end]
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}
