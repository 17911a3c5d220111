"""ComfyUI's own formats: int8 by rows, W4A8 and W4A4, all with ConvRot, by comfy-kitchen.

Entries are laid out as ComfyUI's quantised layers write them, so that stock ComfyUI opens them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch

from .quantization import FORMATS, GROUP, ROTATIONS, WIDTHS, fits, rotation_of
from .quantized_entries import (
    Entry,
    QuantizedFileError,
    check_finite,
    check_shape,
    check_weight,
    dtype_name,
    is_float,
    is_whole,
    need,
    pack_json,
    unpack_json,
)

CONFIGURATION = "comfy_quant"
HOST_NAMES = {"int8": "int8_tensorwise", "w4a8": "asym_w4a8_int8", "w4a4": "convrot_w4a4"}
OUR_NAMES = {theirs: ours for ours, theirs in HOST_NAMES.items()}
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
DEFAULT_ROTATION = 256  # where a file says none
PIECE = 1 << 22  # weights quantised at once, which takes comfy-kitchen up to ten bytes of each
LAYOUTS = {
    "int8": "TensorWiseINT8Layout",
    "w4a8": "AsymW4A8Int8Layout",
    "w4a4": "TensorCoreConvRotW4A4Layout",
}


def problem() -> str:
    """Why comfy-kitchen cannot be used here, with the remedy; "" if it can."""
    remedy = "; run `python -m pip install -r requirements.txt` in ComfyUI's folder and restart it."
    try:
        import comfy_kitchen.tensor as kitchen
    except ImportError as error:
        return f"ComfyUI's package comfy-kitchen cannot be imported ({error}){remedy}"
    lacking = [name for name, layout in LAYOUTS.items() if not hasattr(kitchen, layout)]
    if lacking:
        return f"The installed comfy-kitchen is too old for {', '.join(lacking)}{remedy}"
    return ""


def _layout(format: str) -> Any:
    import comfy_kitchen.tensor as kitchen

    return getattr(kitchen, LAYOUTS[format])


def encode(weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    """Quantise a weight (out, in) to the entries of its layer.

    Raises as `check_weight`, and ValueError where the format does not fit the shape.
    """
    check_weight(weight)
    rotation = rotation_of(format, weight.shape[1])
    if not fits(format, weight.shape):
        raise ValueError(
            f"A weight of {weight.shape[1]:,} inputs cannot be stored in {format}, which takes "
            f"multiples of {WIDTHS[format]}; choose {FORMATS[format].eight_bit} for this layer."
        )
    options: dict[str, Any] = {} if rotation is None else {"convrot_groupsize": rotation}
    if format == "int8":
        options |= {"per_channel": True, "convrot": rotation is not None}
    if format == "w4a8":
        options |= {"group_size": GROUP}
    # Rows are independent, but for W4A8's code book; W4A8 is cut into pieces by comfy-kitchen.
    rows = max(1, PIECE // weight.shape[1]) if format != "w4a8" else weight.shape[0]
    made = [_quantize(piece, format, options) for piece in weight.contiguous().split(rows)]
    entries, params = made[0]
    if len(made) > 1:
        entries = {name: torch.cat([piece[name] for piece, _ in made]) for name in entries}
    settings = settings_of(HOST_NAMES[format], params)
    return entries | {CONFIGURATION: pack_json(settings)}


def kernels_for(format: str, rotation: int | None) -> AbstractContextManager[object]:
    """Around what multiplies by a layer, or dequantises it: comfy-kitchen's kernels or its torch.

    Torch is for ConvRot matrices that some device's kernels do not know (`has_kernels`); files of
    others can have them.
    """
    if has_kernels(format, rotation):
        return nullcontext()
    import comfy_kitchen

    return comfy_kitchen.use_backend("eager")


def has_kernels(format: str, rotation: int | None) -> bool:
    """Whether comfy-kitchen's kernels know a layer's ConvRot matrix on every device; None: no."""
    return rotation is None or format not in ROTATIONS or rotation in ROTATIONS[format]


def rotation_in(settings: Mapping[str, Any], format: str) -> Any:
    """The size of a layer's ConvRot matrix by its settings, unchecked; None if it is not turned."""
    rotated = format in ROTATIONS and (format != "int8" or settings.get("convrot", False))
    return settings.get("convrot_groupsize", DEFAULT_ROTATION) if rotated else None


def _quantize(
    weight: torch.Tensor, format: str, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], Any]:
    layout = _layout(format)
    codes, params = layout.quantize(weight, **options)
    tensors = layout.state_dict_tensors(codes, params)
    return {f"weight{suffix}": tensor for suffix, tensor in tensors.items()}, params


def settings_of(host_name: str, params: Any) -> dict[str, Any]:
    """What the entry `comfy_quant` says of a weight whose layout has these `params`."""
    settings: dict[str, Any] = {"format": host_name}
    if host_name == "int8_tensorwise" and params.convrot:
        settings |= {"convrot": True, "convrot_groupsize": params.convrot_groupsize}
    if host_name == "convrot_w4a4":
        settings["convrot_groupsize"] = params.convrot_groupsize
        if params.linear_dtype != "int4":
            settings["linear_dtype"] = params.linear_dtype
    if host_name == "asym_w4a8_int8":
        settings |= {
            "group_size": params.group_size,
            "convrot_groupsize": params.convrot_groupsize,
        }
    return settings


def settings_in(entries: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the entry `comfy_quant` says; older files keep the details under "params"."""
    settings = unpack_json(need(entries, CONFIGURATION), CONFIGURATION)
    details = settings.pop("params", {})
    return (details if isinstance(details, dict) else {}) | settings


def check(entries: Mapping[str, Entry], format: str, shape: tuple[int, int] | None = None) -> None:
    """Raise QuantizedFileError unless all entries of a layer in one of LAYOUTS are there and fit.

    Tensors or rows of a header. `shape`: (out, in) of the model's layer, where it is known.
    """
    configuration = need(entries, CONFIGURATION)
    weight = need(entries, "weight")
    if dtype_name(weight) != "I8" or len(weight.shape) != 2:
        raise QuantizedFileError(
            f"The weight is {dtype_name(weight)} of the shape {tuple(weight.shape)}, and a layer "
            f"in {format} has int8 in two dimensions; the file is damaged, download it again."
        )
    rows, columns = shape_of(entries, format)
    if shape is not None:
        check_shape((rows, columns), shape)
    for name, lengths in _lengths(format, rows).items():
        if name in entries or name != "weight_codebook":
            _check_scales(name, need(entries, name), lengths)
    if format == "w4a8":
        groups = need(entries, "weight_s_rel").shape
        if len(groups) != 2 or groups[0] != rows or columns % max(groups[1], 1):
            raise QuantizedFileError(
                f"weight_s_rel has the shape {tuple(groups)}, which does not divide a weight of "
                f"{rows} x {columns}; the file is damaged, download it again."
            )
    if isinstance(configuration, torch.Tensor):
        _check_values({n: e for n, e in entries.items() if isinstance(e, torch.Tensor)}, format)


def _check_values(entries: Mapping[str, torch.Tensor], format: str) -> None:
    """What a header does not show: the settings, and that scales are numbers."""
    _check_settings(settings_in(entries), entries, format)
    for name in ("weight_scale", "weight_s_rel", "weight_s_channel", "weight_codebook"):
        if name in entries and entries[name].is_floating_point():
            check_finite(name, entries[name])


def _check_settings(
    settings: Mapping[str, Any], entries: Mapping[str, torch.Tensor], format: str
) -> None:
    """The sizes of groups that `comfy_quant` says, on which the products fail only later."""
    columns = shape_of(entries, format)[1]
    size = rotation_in(settings, format)
    rotated = format != "int8" or settings.get("convrot", False)
    if rotated and not (_is_power_of_4(size) and columns % size == 0):
        _refuse("convrot_groupsize", size, f"a power of 4 that divides {columns:,} inputs")
    if format == "w4a8":
        groups, size = need(entries, "weight_s_rel").shape[1], settings.get("group_size", GROUP)
        if not is_whole(size) or size * groups != columns:
            _refuse("group_size", size, f"{columns:,} inputs in {groups:,} groups")
    if format == "w4a4" and settings.get("linear_dtype", "int4") not in ("int4", "int8"):
        _refuse("linear_dtype", settings["linear_dtype"], "int4 or int8")


def _is_power_of_4(size: object) -> bool:
    """Whether ConvRot has a matrix of this size."""
    return isinstance(size, int) and size in (4**n for n in range(1, 16))


def _refuse(setting: str, value: object, expected: str) -> None:
    raise QuantizedFileError(
        f"comfy_quant says {setting} {value!r}, and the layer needs {expected}; the file is "
        "damaged, download it again."
    )


def _lengths(format: str, rows: int) -> dict[str, tuple[int, ...]]:
    """How many numbers each entry of floats may have."""
    if format == "w4a8":
        return {"weight_s_channel": (rows,), "weight_codebook": (16,)}
    return {"weight_scale": (rows,) if format == "w4a4" else (1, rows)}


def _check_scales(name: str, entry: Entry, lengths: tuple[int, ...]) -> None:
    if prod(entry.shape) not in lengths or not is_float(entry):
        raise QuantizedFileError(
            f"{name} has {prod(entry.shape):,} numbers in {dtype_name(entry)}, expected "
            f"{' or '.join(f'{n:,}' for n in lengths)} floats; the file is damaged, download it "
            "again."
        )


def shape_of(entries: Mapping[str, Entry], format: str) -> tuple[int, int]:
    """(out, in) of a weight; two of W4's share a byte."""
    outputs, columns = need(entries, "weight").shape
    return outputs, columns * (2 if format in ("w4a8", "w4a4") else 1)


def decode(entries: Mapping[str, torch.Tensor], format: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a layer. Raises QuantizedFileError where its entries do not fit."""
    if format in FLOAT8:
        weight = need(entries, "weight").view(FLOAT8[format]).to(dtype)
        return weight * need(entries, "weight_scale").to(dtype)
    if format not in LAYOUTS:
        raise QuantizedFileError(
            f"Weights in {format} cannot be turned into other formats; take the original file."
        )
    settings, layout = settings_in(entries), _layout(format)
    try:
        params = layout.Params(
            orig_dtype=dtype,
            orig_shape=shape_of(entries, format),
            **_scales(entries, format),
            **_options(settings, format),
        )
    except (ValueError, TypeError) as error:
        raise QuantizedFileError(
            f"The scales do not fit the weight ({error}); the file is damaged, download it again."
        ) from None
    with kernels_for(format, rotation_in(settings, format)):
        return layout.dequantize(need(entries, "weight").view(torch.int8), params)


def _scales(entries: Mapping[str, torch.Tensor], format: str) -> dict[str, torch.Tensor | None]:
    if format != "w4a8":
        return {"scale": need(entries, "weight_scale")}
    scale = need(entries, "weight_s_rel")
    return {
        "scale": scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale,
        "s_channel": need(entries, "weight_s_channel"),
        "codebook": entries.get("weight_codebook"),
    }


def _options(settings: Mapping[str, Any], format: str) -> dict[str, Any]:
    rotation = {"convrot_groupsize": int(settings.get("convrot_groupsize", DEFAULT_ROTATION))}
    if format == "int8":
        return rotation | {"convrot": bool(settings.get("convrot", False))}
    if format == "w4a8":
        return rotation | {"group_size": int(settings.get("group_size", GROUP))}
    return rotation
