"""Where the reference cache keeps what it recorded: how much it will be, and where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..core.reference_store import KVStore

PLACE_CHOICES = ("auto", "gpu", "ram")
Conds = dict[str, list[dict[str, Any]]]


def new_store(format: str, place: str, device: torch.device) -> KVStore:
    """A store that the memory report knows of, with pinned memory as ComfyUI accounts for it."""
    raise NotImplementedError


def expected_bytes(
    model: ModelPatcher, conds: Conds, noise_shape: Sequence[int], format: str
) -> int:
    """Bytes of all stores of one run, before it starts. `conds` as PREPARE_SAMPLING gives them."""
    raise NotImplementedError


def place_for(wanted: str, need: int, device: torch.device, model: ModelPatcher) -> tuple[str, str]:
    """("gpu", "ram" or "" where neither has room; a sentence why, or "")."""
    raise NotImplementedError


def for_the_load(model: ModelPatcher, noise_shape: Sequence[int], need: int) -> list[float]:
    """For PREPARE_SAMPLING: the shape to plan the load with, so that `need` bytes stay free."""
    raise NotImplementedError


class Holding:
    """For transformer_options[HOLDINGS]: what the stores of a run hold on the GPU."""

    def bytes_held(self) -> int:
        """On the GPU, and that `release` would give back."""
        raise NotImplementedError

    def release(self) -> None:
        """Give it back; what was recorded is lost, and is recorded again."""
