"""Pinned RAM within ComfyUI's limit: what lies there is copied to a GPU faster, and beside work."""

from __future__ import annotations

import threading

import comfy.model_management as mm
import torch

_lock = threading.Lock()


def pin(tensor: torch.Tensor) -> bool:
    """Pin a tensor's memory; False where ComfyUI pins nothing, or its limit is reached.

    Beyond the limit ComfyUI would take the pins of weights instead. `mm.unpin_memory` undoes it,
    which has to come before the memory is freed.
    """
    if not mm.is_device_cpu(tensor.device):
        return False
    with _lock:
        if mm.TOTAL_PINNED_MEMORY + tensor.nbytes > mm.MAX_PINNED_MEMORY:
            return False
        return mm.pin_memory(tensor)
