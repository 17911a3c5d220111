"""Read the tensors of a safetensors file one at a time, into memory of their own.

The usual way maps the whole file: each page that was read then counts as the process's memory for
as long as the map lives, and all of a 40 GB file is in RAM at the end. Here a read ends with the
bytes asked for and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from math import prod

import torch

from .checkpoint import CheckpointError, Header, Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


LEAST_OWN = 1 << 16  # bytes: less is not worth pages of its own


def own_memory(size: int) -> torch.Tensor:
    """So many bytes (uint8) that go back to the system when the tensor dies, where that can be had.

    The C library keeps what it has given away in pieces of up to 32 MB: after a quantised model of
    20 GB, 20 GB stayed with the process. Huge pages save most of the time of first touching it.
    A process may have so many maps and no more (Linux: vm.max_map_count): then torch's memory.
    """
    if size < LEAST_OWN or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(size, dtype=torch.uint8)
    try:
        place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # without memory torch says so in words that ComfyUI knows
        return torch.empty(size, dtype=torch.uint8)
    with contextlib.suppress(AttributeError, OSError):  # a wish that not every system knows
        place.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(place, dtype=torch.uint8)


def trim() -> None:
    """Give back to the system what the C library keeps of freed memory, if it can be asked (glibc).

    Quantising on the CPU works in pieces that glibc keeps when they are freed: 200 MB of int8's,
    750 MB of W4A8's, until somebody in the process has use for them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems' libraries
        ctypes.CDLL(None).malloc_trim(0)


class TensorReader:
    """The tensors of one file, or of all shards of a model; any thread may read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._drops = _crowds_memory(sum(tensor.bytes for tensor in header.tensors.values()))

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in the beginning of `into` (uint8) if given: touching fresh memory takes
        longer than reading. Raises CheckpointError, one sentence, and OSError.
        """
        tensor = self.header.tensors[name]
        file = tensor.path or self.header.path
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and prod(tensor.shape) * dtype.itemsize != tensor.bytes:
            raise CheckpointError(
                f"{os.path.basename(file)} is damaged: {name} has {tensor.bytes:,} bytes, which is "
                f"not {tensor.dtype} of shape {tensor.shape}; download it again."
            )
        if dtype is None:
            raise CheckpointError(
                f"{os.path.basename(file)} holds {name} as {tensor.dtype}, which this version "
                "cannot read; use a file in bf16, fp16 or fp8."
            )
        data = own_memory(tensor.bytes) if into is None else into[: tensor.bytes]
        self._fill(data, file, tensor, name)
        return data.view(dtype).reshape(tensor.shape)

    def _fill(self, data: torch.Tensor, path: str, tensor: Tensor, name: str) -> None:
        target, done = memoryview(data.numpy()), 0
        with open(path, "rb", buffering=0) as file:
            file.seek(tensor.start)
            while done < len(target) and (count := file.readinto(target[done:])):
                done += count
            if self._drops:
                os.posix_fadvise(file.fileno(), tensor.start, done, os.POSIX_FADV_DONTNEED)
        if done < len(target):
            raise CheckpointError(
                f"{os.path.basename(path)} ends within {name}: {done:,} of {len(target):,} bytes "
                "are there; download it again."
            )


def _crowds_memory(size: int) -> bool:
    """Whether to ask the system to forget what was read, where it can be asked.

    A file that fits well stays cached, so that it opens at once the next time.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    return size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
