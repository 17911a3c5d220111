"""The codec of quantised layers: a weight into the entries of a state dict, and back.

One layout serves the disk, the state dict and what is quantised at load: for `bnb_*` the one that
bitsandbytes writes, for `int8`, `w4a8` and `w4a4` ComfyUI's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch

from . import bitsandbytes_formats as bitsandbytes
from . import bitsandbytes_int8 as int8
from . import checkpoint, host_formats
from .quantization import BITSANDBYTES, FORMATS
from .quantized_entries import Entry, QuantizedFileError, dtype_name, need, unpack_json

__all__ = [
    "QuantizedFileError",
    "decode",
    "encode",
    "format_of",
    "layers_of",
    "missing_package",
    "shape_of",
    "split_name",
]

INT8 = "bnb_int8"  # the one format of bitsandbytes that is plain torch here
SUFFIXES = (
    *("weight", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input"),
    *("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction"),
    *("pre_quant_scale", host_formats.CONFIGURATION, "SCB", "weight_format"),
)
WITHIN = "weight."  # how every further entry of a 4-bit layer of bitsandbytes begins
FOUR_BIT = tuple(WITHIN + name for name in ("absmax", "quant_map", "quant_state.", "nested_"))


def missing_package(format: str) -> str:
    """Say what this machine lacks for a format of FORMATS, and how to get it; "" if nothing.

    bnb_int8 lacks nothing anywhere: its numbers are bitsandbytes', its arithmetic is torch's.
    """
    if format == INT8:
        return ""
    ours = FORMATS[format].package == BITSANDBYTES
    problem = bitsandbytes.problem() if ours else host_formats.problem()
    return f"{format} cannot be used: {problem}" if problem else ""


def encode(weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    """Quantise a weight (out, in) to the entries of its layer, on the weight's device.

    bf16, fp16 or fp32. Raises ValueError for other weights, QuantizedFileError for NaN or infinity.
    """
    if FORMATS[format].package != BITSANDBYTES:
        return host_formats.encode(weight, format)
    if format == INT8:
        return int8.entries_int8(*int8.quantize_int8(weight))
    quantized = bitsandbytes.quantize_4bit(weight, format.removeprefix("bnb_"))
    return bitsandbytes.entries_4bit(quantized, weight.dtype)


def decode(entries: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a quantised layer, on the device of its entries.

    Raises QuantizedFileError where entries are missing or do not fit together.
    """
    format = _require_format(entries)
    if format == INT8:
        return int8.dequantize_int8(*int8.weight_int8(entries), dtype)
    if format.startswith("bnb_"):
        return bitsandbytes.dequantize_4bit(bitsandbytes.weight_4bit(entries), dtype)
    return host_formats.decode(entries, format, dtype)


def shape_of(entries: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """(out, in) of the weight as it was. Raises QuantizedFileError as `decode`."""
    format = _require_format(entries)
    if format == INT8:
        outputs, inputs = int8.weight_int8(entries)[0].shape
        return outputs, inputs
    if format.startswith("bnb_"):
        return bitsandbytes.weight_4bit(entries).shape
    return host_formats.shape_of(entries, format)


def _require_format(entries: Mapping[str, torch.Tensor]) -> str:
    format = format_of(entries)
    if format is None:
        raise QuantizedFileError("The layer is not quantised; take its weight as it is.")
    return format


# ----------------------------------------------------------------------------- what a layer is
def format_of(entries: Mapping[str, Entry]) -> str | None:
    """The format of one layer: a name of FORMATS, another of ComfyUI's, or None: not quantised.

    `entries` are tensors, or rows of a file's header: then names, dtypes and shapes decide.
    Raises QuantizedFileError where an entry is missing that the others need.
    """
    if any(name.startswith(FOUR_BIT) for name in entries):
        return _four_bit_format(entries)
    weight = entries.get("weight")
    if "SCB" in entries or "weight_format" in entries:
        need(entries, "weight")
        need(entries, "SCB")
        return INT8
    configuration = entries.get(host_formats.CONFIGURATION)
    if weight is None:
        if configuration is not None:
            need(entries, "weight")
        return None
    if isinstance(configuration, torch.Tensor):
        name = unpack_json(configuration, host_formats.CONFIGURATION).get("format")
        if not isinstance(name, str):
            raise QuantizedFileError(
                f"comfy_quant says the format {name}, which is no name; the file is damaged, "
                "download it again."
            )
        return host_formats.OUR_NAMES.get(name, name)
    return _host_format(entries, weight)


def _four_bit_format(entries: Mapping[str, Entry]) -> str:
    """bnb_nf4 or bnb_fp4, after a look at whether everything is there that bitsandbytes writes."""
    state = next((n for n in entries if n.startswith(bitsandbytes.STATE)), f"{bitsandbytes.STATE}*")
    for name in ("weight", "weight.absmax", "weight.quant_map", state):
        need(entries, name)
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    if dtype_name(entries["weight.absmax"]) == "U8" or any(name in entries for name in nested):
        for name in nested:
            need(entries, name)
    return f"bnb_{state.removeprefix(bitsandbytes.STATE)}"


def _host_format(entries: Mapping[str, Entry], weight: Entry) -> str | None:
    """ComfyUI's formats by dtypes and shapes: a header does not show what `comfy_quant` says."""
    scale = entries.get("weight_scale", entries.get("scale_weight"))
    dtype = dtype_name(weight)
    if dtype == "I8" and "weight_s_rel" in entries:
        return "w4a8"
    if dtype == "I8" and scale is None:
        raise QuantizedFileError(
            "The weight is int8 and has no scale (SCB or weight_scale); download the complete "
            "file, or quantise the original file again."
        )
    if scale is None:
        return None
    if dtype == "I8":  # W4A4 has one scale for each row, int8 a column of them, or a single one
        return "w4a4" if tuple(scale.shape) == (weight.shape[0],) else "int8"
    if dtype == "U8":
        return "nvfp4"
    if dtype == "F8_E5M2":
        return "float8_e5m2"
    if dtype == "F8_E4M3":
        exponents = dtype_name(scale) in ("U8", "F8_E8M0")
        return "mxfp8" if len(scale.shape) == 2 and exponents else "float8_e4m3fn"
    return None


def split_name(name: str) -> tuple[str, str] | None:
    """(layer, entry) of a tensor's name in a file, or None if it is no linear layer's weight."""
    head, _, rest = name.rpartition(f".{WITHIN}")
    if head:
        return head, WITHIN + rest
    head, _, rest = name.rpartition(".")
    return (head, rest) if head and rest in SUFFIXES else None


def layers_of(header: checkpoint.Header) -> dict[str, str]:
    """The quantised layers of a file: full name -> format as `format_of` gives it.

    Raises QuantizedFileError, with the names of file and layer, where an entry is missing.
    """
    layers: dict[str, dict[str, Entry]] = {}
    for name, tensor in header.tensors.items():
        parts = split_name(name)
        if parts is not None:
            layers.setdefault(parts[0], {})[parts[1]] = tensor
    told = _told_by_metadata(header)
    found = {name: told.get(name) or _format_in(header, name, e) for name, e in layers.items()}
    _require_codebooks(header, {n: layers[n] for n, format in found.items() if format == "w4a8"})
    return {name: format for name, format in found.items() if format is not None}


def _require_codebooks(
    header: checkpoint.Header, layers: Mapping[str, Mapping[str, Entry]]
) -> None:
    """A layer in W4A8 can do without one, but not where the file's others have one."""
    lacking = [name for name, entries in layers.items() if "weight_codebook" not in entries]
    if len(lacking) not in (0, len(layers)):
        file = os.path.basename(header.path)
        raise QuantizedFileError(
            f"{file}, layer {lacking[0]}: weight_codebook is missing, and other layers have it; "
            "download the complete file, or quantise the original file again."
        )


def _format_in(header: checkpoint.Header, layer: str, entries: Mapping[str, Entry]) -> str | None:
    try:
        format = format_of(entries)
        if format in host_formats.LAYOUTS:
            host_formats.check(entries, format)
        return format
    except QuantizedFileError as error:
        file = os.path.basename(header.path)
        raise QuantizedFileError(f"{file}, layer {layer}: {error}") from None


def _told_by_metadata(header: checkpoint.Header) -> dict[str, str]:
    """Formats by layer where ComfyUI's own entry of the metadata says them."""
    try:
        layers = json.loads(header.metadata["_quantization_metadata"])["layers"]
        names = {layer: str(settings["format"]) for layer, settings in layers.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # absent, or not ComfyUI's: it stops at what it cannot read itself
    return {layer: host_formats.OUR_NAMES.get(name, name) for layer, name in names.items()}
