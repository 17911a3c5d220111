"""NVIDIA's management library by the optional module pynvml (`pip install nvidia-ml-py`)."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any, NamedTuple

import torch

MISSING = "it needs NVIDIA's NVML; `pip install nvidia-ml-py` gives it."
UNKNOWN_PID = (
    "NVML numbers the processes as the host does; from inside this container it cannot be told "
    "which one is ours."
)
NO_FIGURE = "the driver tells no figure of one process (Windows does so for most cards)."
NOT_LISTED = "NVML does not list this process; it may be hidden by a container."


class Unknown(Exception):
    """Why NVML cannot tell a figure: a sentence for users, from "it" or "NVML" on."""


class Memory(NamedTuple):
    """Bytes of a card, without what the driver keeps for itself."""

    used: int
    free: int


@functools.cache
def _module() -> Any:
    """The module pynvml, started once. Raises ImportError, or NVML's own error."""
    module = importlib.import_module("pynvml")
    module.nvmlInit()
    return module


def _started() -> Any:
    """The module, or Unknown. What fails is asked again next time: a driver may come back."""
    try:
        return _module()
    except ImportError:
        raise Unknown(MISSING) from None
    except Exception as error:  # pynvml makes one class for each of the library's errors
        raise Unknown(f"NVML does not start ({error}).") from error


def handle(device: torch.device, total: int) -> Any:
    """NVML's handle of a card. Raises Unknown, also when NVML means another memory than CUDA does.

    By the UUID, since CUDA_VISIBLE_DEVICES changes the numbers. Without permission for its slice,
    NVML shows the whole card to a MIG instance of `total` bytes.
    """
    pynvml = _started()
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("MIG", "GPU"):
        try:
            found = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}".encode())
            seen = memory(found)
        except (pynvml.NVMLError, Unknown):
            continue
        if abs(seen.used + seen.free - total) <= 0.05 * total:
            return found
    raise Unknown(f"NVML does not show {device} as CUDA does (a MIG slice, or no permission).")


def memory(handle: Any) -> Memory:
    """What all processes take of a card, and what is free. Raises Unknown."""
    pynvml = _started()
    try:
        told = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError, AttributeError, TypeError) as error:
        raise Unknown(f"NVML tells no memory of the card ({error}).") from error
    return Memory(int(told.used), int(told.free))


def own(handle: Any, least: int) -> int:
    """What this process takes of a card, which is at least `least`. Raises Unknown.

    In a container our number may not be in the list. A list of one process that holds enough is
    ours all the same: CUDA runs here, so NVML knows of us.
    """
    pynvml = _started()
    try:
        listed = [
            *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ]
    except pynvml.NVMLError as error:
        raise Unknown(f"NVML tells no processes ({error}).") from error
    figures = {process.pid: process.usedGpuMemory for process in listed}
    if os.getpid() in figures:
        figure = figures[os.getpid()]
    elif len(figures) == 1:
        figure = next(iter(figures.values()))
        if figure is not None and figure < least:
            raise Unknown(UNKNOWN_PID)
    else:
        raise Unknown(UNKNOWN_PID if figures else NOT_LISTED)
    if figure is None:
        raise Unknown(NO_FIGURE)
    return int(figure)
