"""Operations for models held in plain fp8: the host's, but LoRAs are added while they compute.

Stock merges a LoRA into each weight that it moves into VRAM, and rounds the sum to fp8 again, by
chance (comfy.float.stochastic_rounding); into one that it streams it merges at every use. Here the
weight stays as the file has it: nothing is rounded, and it is the same however much is resident.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.supported_models_base import BASE
from torch import Tensor

from .unmerged_linear import UnmergedLinear

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Linear(UnmergedLinear):
    """What `operations` adds to the host's Linear; goes before it in the order of its classes."""

    host_merges = True

    @property
    def held_in(self) -> torch.dtype:
        """What its weight has in VRAM: with dynamic VRAM the parameter is what the file has."""
        return getattr(self, "weight_comfy_model_dtype", None) or self.weight.dtype

    @property
    def takes_patches(self) -> bool:
        """Whether its weight is held in fp8."""
        return getattr(self, "weight", None) is not None and self.held_in in FP8

    def dense_weight(self, device: torch.device | None = None) -> Tensor:
        """(out, in) of the file without patches, in fp32."""
        return self.weight.to(device=device).float()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out)."""
        out = super().forward(input, *args, **kwargs)
        return self.with_loras(out, input) if self.takes_patches else out


def operations(config: BASE) -> type:
    """The host's choice of operations for a configuration whose dtype is fp8, with `Fp8Linear`.

    Chosen as comfy.model_base.BaseModel does (ComfyUI 0.33).
    """
    base = comfy.ops.pick_operations(
        config.unet_config["dtype"],
        config.manual_cast_dtype,
        fp8_optimizations=config.optimizations.get("fp8", False),
        model_config=config,
    )

    class Operations(base):
        """The host's operations, with this pack's Linear."""

        class Linear(Fp8Linear, base.Linear):
            """The host's Linear, whose LoRAs stay apart."""

    return Operations
