"""Which pins a model gives up when ComfyUI may pin no more: those that no step needs, first.

ComfyUI (0.33) pins at most 40 % of the RAM on Windows, on Linux about RAM and swap less 16 GiB.
Beyond that it asks a model to unregister pins, of the model that runs those of its streamed weights
first and those of weights that lie in VRAM last. A streamed weight is then pinned again at its next
use, which takes away the pins of others: of the fp8 file (20.4 GB), with 12 GB of VRAM and 32 GB of
RAM, 7.6 GB in every pass, although the 9.8 GB that stream would fit. (See free_registrations in
comfy.model_management; the figures are computed with ComfyUI's own functions, in test_pinning.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_management import LOADED_PIN_SUBSETS, PIN_SUBSETS
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic


class StreamedStayPinned:
    """Goes before the host's patcher with dynamic VRAM."""

    def unregister_inactive_pins(
        self, ram_to_unload: int, subsets: Sequence[str] = (*LOADED_PIN_SUBSETS, *PIN_SUBSETS)
    ) -> int:
        """As the host's, the bytes that were unregistered; of what lies in VRAM first."""
        order = sorted(subsets, key=lambda name: name not in LOADED_PIN_SUBSETS)
        return super().unregister_inactive_pins(ram_to_unload, order)


class StreamingPatcher(StreamedStayPinned, ModelPatcherDynamic):
    """The host's patcher with dynamic VRAM; on a CPU, as in the host, a plain one."""


def has_dynamic_vram(disable_dynamic: bool) -> bool:
    """Whether models get a patcher with dynamic VRAM, unless that is disabled for one."""
    kind = comfy.model_patcher.CoreModelPatcher
    return not disable_dynamic and issubclass(kind, ModelPatcherDynamic)


def plain_patcher(
    model: Any,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a model whose patches the host merges."""
    kind = StreamingPatcher if has_dynamic_vram(disable_dynamic) else ModelPatcher
    return kind(model, load_device=load_device, offload_device=offload_device)
