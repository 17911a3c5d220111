"""What every format of quantised layers shares: the error, and packed JSON.

The entries of a layer are tensors by name, without the layer's own name: "weight", "weight.absmax".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

from .checkpoint import CheckpointError

SAFETENSORS_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what a weight may be before and after


class QuantizedFileError(CheckpointError):
    """A quantised layer that cannot be used: one sentence that says what is wrong, and a remedy.

    The sentence knows neither the layer nor the file; who knows them puts them before it.
    """


class Entry(Protocol):
    """A tensor, or its row in a file's header: both have these two."""

    dtype: Any
    shape: Any


def dtype_name(entry: Entry) -> str:
    """The dtype as safetensors spells it where the formats differ by it (U8, I8, F8_...)."""
    return str(SAFETENSORS_NAMES.get(entry.dtype, entry.dtype))


def is_float(entry: Entry) -> bool:
    """Whether it holds numbers with a fraction, by tensor or header."""
    if isinstance(entry.dtype, torch.dtype):
        return entry.dtype.is_floating_point
    return str(entry.dtype).startswith(("F", "BF"))


def pack_json(values: Mapping[str, Any]) -> torch.Tensor:
    """JSON as a uint8 tensor (bytes) in RAM: how both layouts keep what is not a tensor.

    Never on the weight's device: ComfyUI asks for the entries when it counts what it will evict,
    and on a full card the smallest tensor is one too many.
    """
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def unpack_json(entry: torch.Tensor, name: str) -> dict[str, Any]:
    """What `pack_json` wrote. Raises QuantizedFileError unless it is a JSON object in bytes."""
    values = None
    if entry.dtype in (torch.uint8, torch.int8):
        with suppress(ValueError, RecursionError):  # then it is no object either
            values = json.loads(bytes(entry.detach().cpu().flatten().view(torch.uint8).tolist()))
    if not isinstance(values, dict):
        raise QuantizedFileError(f"{name} cannot be read; the file is damaged, download it again.")
    return values


E = TypeVar("E", bound=Entry)


def need(entries: Mapping[str, E], name: str) -> E:
    """One entry. Raises QuantizedFileError where it is missing."""
    if name not in entries:
        raise QuantizedFileError(
            f"{name} is missing, and the layer cannot be read without it; download the complete "
            "file, or quantise the original file again."
        )
    return entries[name]


def check_shape(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise QuantizedFileError unless a layer's weight or bias has the shape of the model's."""
    if tuple(found) != tuple(expected):
        has, wants = (" x ".join(map(str, shape)) for shape in (found, expected))
        raise QuantizedFileError(
            f"The file has {has} numbers where the model has {wants}; the file is damaged or of "
            "another model, download it again."
        )


def is_whole(value: object) -> bool:
    """Whether a value of JSON is a whole number; Python counts true among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_finite(name: str, scales: torch.Tensor) -> None:
    """Raise QuantizedFileError for NaN and infinity among a layer's scales, all floats.

    Only for what is being loaded and lies in RAM: it waits for a device.
    """
    if scales.dtype == torch.float8_e4m3fn:  # which torch cannot compare; it has no infinity
        finite = not scales.numel() or int((scales.view(torch.uint8) & 0x7F).max()) != 0x7F
    else:
        finite = not scales.numel() or bool(torch.stack(torch.aminmax(scales)).isfinite().all())
    if not finite:
        raise QuantizedFileError(
            f"{name} holds values that are not numbers (NaN or infinity); the file is damaged, "
            "download it again."
        )


def check_weight(weight: torch.Tensor) -> None:
    """Raise unless a weight can be quantised: 2-D, bf16, fp16 or fp32, and all of it numbers.

    Raises ValueError, or QuantizedFileError for NaN and infinity. Waits for the device once.
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"Only 2-D weights in bf16, fp16 or fp32 can be quantised; this one has the shape "
            f"{tuple(weight.shape)} in {str(weight.dtype).removeprefix('torch.')}."
        )
    if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
        raise QuantizedFileError(
            "The weight holds values that are not numbers (NaN or infinity); the file is damaged, "
            "download it again."
        )
