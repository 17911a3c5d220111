"""Ways to quantise one linear layer, by the packages that do it, for the error tables.

More of them than the loaders offer: ConvRot on and off, group sizes, simpler scales. `WEIGHTS` only
round the weights; `COMPUTED` also round the activations, as ComfyUI's kernels do on a card.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATIONS = (256, 64, 16)
Linear = Callable[[Tensor], Tensor]  # (..., in) -> (..., out), without the bias


def rotation(inputs: int) -> int:
    """The largest ConvRot matrix that fits, or 0."""
    return next((size for size in ROTATIONS if inputs % size == 0), 0)


# ------------------------------------------------------------------------------------ the host's
def kitchen(weight: Tensor, layout: str, **options: Any) -> Any:
    """ComfyUI's QuantizedTensor of a weight (out, in)."""
    from comfy.quant_ops import QuantizedTensor

    return QuantizedTensor.from_float(weight.contiguous(), layout, **options)


def int8(weight: Tensor, rotated: bool = True) -> Any:
    """int8_tensorwise with a scale for each row."""
    size = rotation(weight.shape[1]) if rotated else 0
    turned = {"convrot": True, "convrot_groupsize": size} if size else {}
    return kitchen(weight, "TensorWiseINT8Layout", per_channel=True, **turned)


def int8_one_scale(weight: Tensor) -> Any:
    """int8_tensorwise as its name says."""
    return kitchen(weight, "TensorWiseINT8Layout")


def w4a8(weight: Tensor, group: int = 16) -> Any:
    """asym_w4a8_int8."""
    size = rotation(weight.shape[1])
    return kitchen(weight, "AsymW4A8Int8Layout", group_size=group, convrot_groupsize=size)


def w4a4(weight: Tensor) -> Any:
    """convrot_w4a4."""
    size = rotation(weight.shape[1])
    return kitchen(weight, "TensorCoreConvRotW4A4Layout", convrot_groupsize=size)


# --------------------------------------------------------------------------------- bitsandbytes
def four_bit(weight: Tensor, kind: str, nested: bool = True) -> Tensor:
    """bitsandbytes' nf4 or fp4, blocks of 64, decoded again."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    return functional.dequantize_4bit(codes, state).to(weight.dtype)


def eight_bit(weight: Tensor) -> Tensor:
    """bitsandbytes' int8 by rows (LLM.int8, without its outliers), decoded again."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return (codes.float() * (scales.float() / 127)[:, None]).to(weight.dtype)


def llm_int8(weight: Tensor) -> Linear:
    """The same with activations in int8 by rows: bitsandbytes' own product, with threshold 0."""
    decoded = eight_bit(weight)

    def linear(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return F.linear((x / scale).round() * scale, decoded)

    return linear


# ------------------------------------------------------------------------------------- the tables
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bnb_int8": eight_bit,
    "LLM.int8": eight_bit,
    "int8": lambda w: int8(w).dequantize(),
    "int8, not rotated": lambda w: int8(w, rotated=False).dequantize(),
    "int8, one scale": lambda w: int8_one_scale(w).dequantize(),
    "bnb_nf4": functools.partial(four_bit, kind="nf4"),
    "bnb_nf4, scales not nested": functools.partial(four_bit, kind="nf4", nested=False),
    "bnb_fp4": functools.partial(four_bit, kind="fp4"),
    "w4a8": lambda w: w4a8(w).dequantize(),
    "w4a8, groups of 32": lambda w: w4a8(w, 32).dequantize(),
    "w4a8, groups of 64": lambda w: w4a8(w, 64).dequantize(),
    "w4a4": lambda w: w4a4(w).dequantize(),
}


def product(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Linear]:
    """ComfyUI's own product with a quantised weight."""

    def layer(weight: Tensor) -> Linear:
        quantised = make(weight)
        return lambda x: F.linear(x, quantised)

    return layer


COMPUTED: dict[str, Callable[[Tensor], Linear]] = {
    "LLM.int8": llm_int8,
    "int8": product(int8),
    "int8, not rotated": product(functools.partial(int8, rotated=False)),
    "w4a8": product(w4a8),
    "w4a8, groups of 32": product(functools.partial(w4a8, group=32)),
    "w4a4": product(w4a4),
}


def linear_of(variant: str, weight: Tensor, *, weights_only: bool = False) -> Linear:
    """A layer without its bias; formats that round no activations are the same both ways."""
    if variant in COMPUTED and not weights_only:
        return COMPUTED[variant](weight)
    decoded = WEIGHTS[variant](weight)
    return lambda x: F.linear(x, decoded.to(x.dtype))
