"""Operations for models with quantised layers: a Linear that computes with the packed weight.

A subclass of the host's own class for quantised files, so that its memory manager moves, streams
and counts these weights as it does its own. LoRAs are added to the product: unmerged_linear.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management as mm
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear

from ..core import host_formats
from ..core.quantized_entries import check_shape, need
from ..core.quantized_layers import QuantizedFileError, format_of
from . import quantized_layouts
from .quantized_loading import check_host_layer
from .unmerged_linear import UnmergedLinear

OWN = "QwenVRAM"  # what the names of this pack's layouts start with
NAMES = {layout: name for name, layout in host_formats.LAYOUTS.items()}  # of the host's integers


class QuantizedLinear(UnmergedLinear):
    """What `operations` adds to the host's Linear; goes before it in the order of its classes."""

    @property
    def takes_patches(self) -> bool:
        """Whether its weight is in integers, or in one of bitsandbytes' formats.

        The host's fp8, mxfp8 and nvfp4 are not: it patches and quantises those again itself.
        """
        weight = getattr(self, "weight", None)
        if not isinstance(weight, QuantizedTensor):
            return False
        return weight._layout_cls in NAMES or weight._layout_cls.startswith(OWN)

    def dense_weight(self, device: torch.device | None = None) -> Tensor:
        """(out, in) dequantised, without patches."""
        weight = self.weight if device is None else self.weight.to(device)
        with kernels_for(weight):
            return weight.dequantize()

    # ------------------------------------------------------------------------------- forward
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.takes_patches:
            return super().forward(input, *args, **kwargs)
        with kernels_for(self.weight):
            out = self._cast_product(input)
        return self.with_loras(out, input)

    def _cast_product(self, input: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        dense = bool(self.weight_function)  # the host dequantises for functions of a weight
        with comfy.ops.CastBiasWeightContext(
            self,
            input=None,
            dtype=input.dtype if dense else self.weight.dtype,
            device=input.device,
            bias_dtype=input.dtype,
            offloadable=True,
            compute_dtype=input.dtype,
        ) as (weight, bias):
            return self._product(input, weight, bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(weight, QuantizedTensor):
            return linear(x, weight.to(x.dtype), bias)
        if weight.dtype != x.dtype:
            weight = weight.to(dtype=x.dtype)
        if weight._layout_cls.startswith(OWN):
            return quantized_layouts.linear(x, weight, bias)
        if self._full_precision_mm or getattr(self, "comfy_force_cast_weights", False):
            return linear(x, weight.dequantize(), bias)
        return linear(x, weight, bias)

    # ------------------------------------------------------------------------------- entries
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As the host's, and bitsandbytes' entries too. Raises QuantizedFileError."""
        names = [k for k in state_dict if k.startswith(prefix) and k != f"{prefix}bias"]
        entries = {k.removeprefix(prefix): state_dict[k] for k in names}
        device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
        try:
            found = self._checked_format(entries, state_dict.get(f"{prefix}bias"))
            if found is None or not found.startswith("bnb_"):
                return self._load_as_the_host(found, state_dict, prefix, *args)
            weight = quantized_layouts.tensor_from(entries, dtype)
            check_shape(weight.shape, self._orig_shape)
        except QuantizedFileError as error:
            raise QuantizedFileError(f"Layer {prefix.rstrip('.')}: {error}") from None
        for name in names:
            del state_dict[name]
        weight = weight if device is None else weight.to(device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_format, self.layout_type = found, weight._layout_cls
        _, _, missing, *_ = args
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        if f"{prefix}weight" in missing:
            missing.remove(f"{prefix}weight")

    def _checked_format(self, entries: dict[str, Tensor], bias: Tensor | None) -> str | None:
        """The format of a layer, after a look at all that the host takes as it comes."""
        found = format_of(entries)
        if found is None and host_formats.CONFIGURATION not in entries:
            if entries or bias is not None:
                weight = need(entries, "weight")
                check_shape(weight.shape, self._orig_shape)
                if not weight.is_floating_point():
                    need(entries, host_formats.CONFIGURATION)
            return None
        check_host_layer(entries, self._orig_shape)
        if self.bias is not None:
            found_bias = need({} if bias is None else {"bias": bias}, "bias")
            check_shape(found_bias.shape, self.bias.shape)
        return found

    def _load_as_the_host(self, found: str | None, *args: Any) -> None:
        try:
            super()._load_from_state_dict(*args)
        except (ValueError, TypeError) as error:  # what its layouts say of their parameters
            if found not in host_formats.LAYOUTS:
                raise
            raise QuantizedFileError(
                f"The scales do not fit the weight ({error}); the file is damaged, download it "
                "again."
            ) from None

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """The entries that it was loaded from."""
        weight = getattr(self, "weight", None)
        if not isinstance(weight, QuantizedTensor) or not weight._layout_cls.startswith(OWN):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        sd = destination if destination is not None else {}
        if self.bias is not None:
            sd[f"{prefix}bias"] = self.bias
        entries = quantized_layouts.entries_of(weight)
        sd.update({f"{prefix}{name}": tensor for name, tensor in entries.items()})
        return sd

    def _apply(self, fn: Any, recurse: bool = True) -> torch.nn.Module:
        """As the host's, which fails on weights of a node's run (inference tensors) after it."""
        ours = self.takes_patches and self.weight._qdata.is_inference()
        with torch.inference_mode(ours or torch.is_inference_mode_enabled()):
            return super()._apply(fn, recurse)

    # Of what the host loads "by force" (modules up to 16 KB) it dequantises and quantises the
    # weights, with other rounding. No patch of ours is among them: packed they stay as they are.
    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The weight for the host's patches: packed as it is."""
        return weight if self.takes_patches else super().convert_weight(weight, inplace, **kwargs)

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Take a weight of the host's; one that is packed is taken as it is."""
        if not self.takes_patches or not isinstance(weight, QuantizedTensor):
            return super().set_weight(weight, *args, **kwargs)
        if kwargs.get("return_weight"):
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None


def kernels_for(weight: QuantizedTensor) -> AbstractContextManager[object]:
    """Around what multiplies by a weight, or dequantises it: see core.host_formats.kernels_for."""
    params = weight._params
    rotated = getattr(params, "convrot", True)  # int8 alone can do without
    rotation = getattr(params, "convrot_groupsize", None) if rotated else None
    return host_formats.kernels_for(NAMES.get(weight._layout_cls, ""), rotation)


def operations(
    compute_dtype: torch.dtype, full_precision: bool, device: torch.device | None = None
) -> type:
    """An operations class for model_config.custom_operations or model_options of a CLIP.

    `compute_dtype`: of weights that are not quantised. `full_precision`: multiply dequantised
    weights instead of quantising the input, as the host does for its text encoders. `device`: what
    computes, the host's choice if None.
    """
    disabled = _slow_formats(device)
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, full_precision, disabled)

    class Operations(base):
        """The host's operations for quantised files, with this pack's Linear."""

        class Linear(QuantizedLinear, base.Linear):
            """The host's Linear for quantised files, and more formats."""

    return Operations


def _slow_formats(device: torch.device | None) -> set[str]:
    """Formats that the device cannot multiply: as comfy.ops.pick_operations (ComfyUI 0.33)."""
    device = mm.get_torch_device() if device is None else device
    can = {
        "nvfp4": mm.supports_nvfp4_compute(device),
        "mxfp8": mm.supports_mxfp8_compute(device),
        "float8_e4m3fn": mm.supports_fp8_compute(device),
        "float8_e5m2": mm.supports_fp8_compute(device),
    }
    return {name for name, able in can.items() if not able}
