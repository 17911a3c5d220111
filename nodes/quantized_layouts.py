"""bitsandbytes' formats as layouts of the host's QuantizedTensor.

So the host moves, streams, pins, evicts and counts these weights as it does those of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import (
    QUANT_ALGOS,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
    register_layout_op,
)
from comfy_kitchen.tensor import BaseLayoutParams

from ..core import bitsandbytes_formats as formats
from ..core import bitsandbytes_int8 as int8
from ..core import host_formats
from ..core.quantization import BLOCK, NESTED_BLOCK
from ..core.quantized_entries import pack_json
from ..core.quantized_layers import INT8, QuantizedFileError, format_of

FOUR_BIT_LAYOUT = "QwenVRAMBitsandbytes4Bit"
INT8_LAYOUT = "QwenVRAMBitsandbytesInt8"
Handler = Callable[..., torch.Tensor]


def _physical(params: Any) -> tuple[int, int]:
    """(out, in) of what is stored, also of a weight that was transposed in name only."""
    first, second = params.orig_shape
    return (second, first) if params.transposed else (first, second)


class FourBitLayout(QuantizedLayout):
    """NF4 and FP4. Stored: uint8 (bytes, 1), two weights a byte."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale`: one for each block; the rest as in core's FourBitWeight."""

        nested_scale: torch.Tensor | None = None
        nested_map: torch.Tensor | None = None
        nested_block: int = NESTED_BLOCK
        offset: float = 0.0
        block: int = BLOCK
        quant_type: str = "nf4"
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            nested = ["nested_scale", "nested_map"] if self.nested_scale is not None else []
            return ["scale", *nested]

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        quant_type: str = "nf4",
        block: int = BLOCK,
        nested: bool = True,
        **kwargs: object,
    ) -> tuple[torch.Tensor, Params]:
        """Quantise (out, in). The host's further wishes (scale, stochastic rounding) have no
        counterpart in bitsandbytes, which finds its scales itself and rounds to the nearest.
        """
        weight = formats.quantize_4bit(tensor, quant_type, block, nested)
        return weight.packed, _params(weight, tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """(out, in) in `params.orig_dtype`."""
        return formats.dequantize_4bit(_four_bit(qdata, params), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """What is stored, and its scales."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """bitsandbytes' entries by what follows the name of the weight."""
        entries = formats.entries_4bit(_four_bit(qdata, params), params.orig_dtype)
        return {name.removeprefix("weight"): entry for name, entry in entries.items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """What `quantize` needs to make the same layout again."""
        params = qtensor._params
        nested = params.nested_scale is not None
        return {"quant_type": params.quant_type, "block": params.block, "nested": nested}


class Int8Layout(QuantizedLayout):
    """Row-wise int8. Stored: int8 (out, in); `scale`: the largest magnitude of each row, fp32."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` as in the entry SCB."""

        transposed: bool = False

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, Params]:
        """Quantise (out, in), to the nearest; the host's further wishes have no counterpart."""
        codes, largest = int8.quantize_int8(tensor)
        shape = tuple(tensor.shape)
        return codes, cls.Params(scale=largest, orig_dtype=tensor.dtype, orig_shape=shape)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """(out, in) in `params.orig_dtype`."""
        return int8.dequantize_int8(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """What is stored, and its scales."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Entries by what follows the name of the weight; bitsandbytes calls "_scale" "SCB"."""
        return {"": qdata, "_scale": params.scale}


def _four_bit(qdata: torch.Tensor, params: Any) -> formats.FourBitWeight:
    return formats.FourBitWeight(
        qdata,
        params.scale,
        params.quant_type,
        _physical(params),
        params.block,
        params.nested_scale,
        params.nested_map,
        params.nested_block,
        params.offset,
    )


def _params(weight: formats.FourBitWeight, dtype: torch.dtype) -> FourBitLayout.Params:
    return FourBitLayout.Params(
        scale=weight.scale,
        orig_dtype=dtype,
        orig_shape=weight.shape,
        nested_scale=weight.nested_scale,
        nested_map=weight.nested_map,
        nested_block=weight.nested_block,
        offset=weight.offset,
        block=weight.block,
        quant_type=weight.quant_type,
    )


# ------------------------------------------------------------------------- entries and products
def tensor_from(entries: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a layer in bitsandbytes' entries, computing in `dtype`; nothing is copied.

    Raises QuantizedFileError where entries are missing or do not fit together, and for other
    formats: the host reads its own.
    """
    format = format_of(entries)
    if format == INT8:
        codes, largest = int8.weight_int8(entries)
        params = Int8Layout.Params(largest, dtype, tuple(codes.shape))
        return QuantizedTensor(codes, INT8_LAYOUT, params)
    if format is None or not format.startswith("bnb_"):
        raise QuantizedFileError(f"The layer is in the format {format}, not in bitsandbytes'.")
    weight = formats.weight_4bit(entries)
    return QuantizedTensor(weight.packed, FOUR_BIT_LAYOUT, _params(weight, dtype))


def entries_of(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The entries of a quantised weight: bitsandbytes' for its formats, ComfyUI's for its own."""
    layout, params = weight._layout_cls, weight._params
    if layout == INT8_LAYOUT:
        return int8.entries_int8(weight._qdata, params.scale)
    entries = weight.state_dict("weight")
    if layout == FOUR_BIT_LAYOUT:
        return entries
    names = [name for name, how in QUANT_ALGOS.items() if how["comfy_tensor_layout"] == layout]
    if not names:
        raise QuantizedFileError(f"Weights in the layout {layout} have no entries in a file.")
    settings = host_formats.settings_of(names[0], params)
    return entries | {host_formats.CONFIGURATION: pack_json(settings)}


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) -> (..., out) by a weight in one of bitsandbytes' formats, in x's dtype.

    bnb_int8 holds weights only: activations are not quantised. LLM.int8's own product measured
    x0.45 to x0.61 of bf16's speed and is less exact.
    """
    params = weight._params
    if params.transposed or weight._layout_cls not in (FOUR_BIT_LAYOUT, INT8_LAYOUT):
        return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)
    if weight._layout_cls == FOUR_BIT_LAYOUT:
        return formats.linear_4bit(x, _four_bit(weight._qdata, params), bias)
    return int8.linear_int8(x, weight._qdata, params.scale, bias)


# ------------------------------------------------------ products of code that knows no layouts
def _t(qt: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The transpose, in name only."""
    weight = args[0]
    shape = (weight._params.orig_shape[1], weight._params.orig_shape[0])
    flipped = not weight._params.transposed
    params = dataclasses.replace(weight._params, orig_shape=shape, transposed=flipped)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _linear(qt: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, bias = (*args, None)[:3]
    if not isinstance(weight, QuantizedTensor):
        return torch.nn.functional.linear(_plain(x), weight, _plain(bias))
    return linear(_plain(x), weight, _plain(bias))


def _mm(qt: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight = args[:2]
    if isinstance(weight, QuantizedTensor) and weight._params.transposed:
        return linear(_plain(x), weight.t(), None)
    return torch.mm(_plain(x), _plain(weight))


def _addmm(qt: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    bias, x, weight = args[:3]
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    transposed = isinstance(weight, QuantizedTensor) and weight._params.transposed
    if not transposed or scaled or bias.dim() != 1:
        return torch.addmm(*map(_plain, args[:3]), **kwargs)
    return linear(_plain(x), weight.t(), bias)


HANDLERS: dict[Any, Handler] = {
    torch.ops.aten.t.default: _t,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
}
for _name, _layout in ((FOUR_BIT_LAYOUT, FourBitLayout), (INT8_LAYOUT, Int8Layout)):
    register_layout_class(_name, _layout)
    for _operator, _handler in HANDLERS.items():
        register_layout_op(_operator, _layout)(_handler)
