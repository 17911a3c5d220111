"""Where a picture's memory comes from: RAM, or a file in ComfyUI's folder for temporary ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import folder_paths
import torch
from comfy import model_management
from torch import Tensor

from ..core import disk_backed

SHARE = 4  # a picture may take one of so many parts of the free RAM


def new_picture(shape: Sequence[int]) -> Tensor:
    """Zeros, float32: in RAM if a quarter of what is free is enough, else on the disk.

    Raises DiskFullError.
    """
    size = disk_backed.BYTES * prod(shape)
    if size <= model_management.get_free_memory(torch.device("cpu")) // SHARE:
        return torch.zeros(tuple(shape))
    try:
        return disk_backed.empty(shape, Path(folder_paths.get_temp_directory()))
    except disk_backed.DiskFullError as error:
        raise disk_backed.DiskFullError(
            f"{error} Free some of it, or start ComfyUI with --temp-directory and a folder on a "
            "larger disk."
        ) from error
