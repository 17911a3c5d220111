"""Pictures that are too large for the RAM: tensors whose memory is a file, and how to reduce one.

The operating system keeps in RAM what is in use and writes the rest back, so that blending tiles
from and to such tensors needs RAM for a few tiles only.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .units import size_text

PREFIX = "qwen_vram_picture_"
BYTES = 4  # of a float32
CHUNK = 1 << 22  # bytes of zeros that are written at once
WINDOWS = os.name == "nt"
CANNOT = (errno.EOPNOTSUPP, errno.EINVAL)  # reserve: the file system does not know how
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """A picture does not fit on the disk: a sentence with the bytes needed and free, and where."""


def empty(shape: Sequence[int], folder: Path) -> Tensor:
    """A float32 tensor of zeros in a file that nobody else sees, gone with its last view.

    On Linux and macOS the file has no name from the start; Windows removes it when the mapping is
    closed. Raises DiskFullError.
    """
    size = BYTES * prod(shape)
    if size < BYTES:
        raise ValueError(f"There is no picture of {tuple(shape)}.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=PREFIX) as file:
        _reserve(file.fileno(), size, folder)
        mapped = mmap.mmap(file.fileno(), size)  # holds the file by a handle of its own
    return torch.frombuffer(mapped, dtype=torch.float32).reshape(tuple(shape))


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Take the room now: a page that cannot be written back later ends the process."""
    free = shutil.disk_usage(folder).free
    full = DiskFullError(
        f"A picture needs {size_text(size)} on the disk, but in {folder} only {size_text(free)} "
        "are free."
    )
    if free < size:
        raise full
    try:
        _allocate(descriptor, size)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise full from error
        raise


def _allocate(descriptor: int, size: int) -> None:
    """Make the file that long, with its room on the disk. Raises OSError.

    Windows reserves what a file is extended by. Elsewhere that leaves a hole, which has no room.
    """
    if WINDOWS:
        os.ftruncate(descriptor, size)
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in CANNOT:
                raise
    zeros = memoryview(bytes(min(CHUNK, size)))
    written = 0
    while written < size:
        written += os.write(descriptor, zeros[: size - written])


def reduced(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture (B, H, W, C) as (B, height, width, C), float32: the mean of what each pixel covers.

    As PyTorch's `interpolate(mode="area")`, but row by row of the result: beside it, there is never
    more in memory than the rows that one of them is made of.
    """
    batch, rows, _, channels = picture.shape
    result = torch.empty(batch, height, width, channels)
    for row in range(height):
        first, end = row * rows // height, -(-(row + 1) * rows // height)
        line = picture[:, first:end].float().mean(dim=1).movedim(-1, 1)
        result[:, row] = F.adaptive_avg_pool1d(line, width).movedim(1, -1)
    return result
