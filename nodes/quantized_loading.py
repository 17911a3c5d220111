"""Quantise a model while its file is read: never more than the result and one layer in memory."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ..core import checkpoint, quantization
from ..core.checkpoint import CheckpointError, Header
from ..core.host_formats import (
    CONFIGURATION,
    LAYOUTS,
    OUR_NAMES,
    PIECE,
    check,
    has_kernels,
    rotation_in,
    settings_in,
)
from ..core.layer_source import LayerSource, stored_formats
from ..core.quantization import BITSANDBYTES, FORMATS, Preset
from ..core.quantized_entries import need
from ..core.quantized_layers import (
    QuantizedFileError,
    format_of,
    missing_package,
    shape_of,
    split_name,
)
from ..core.tensor_reader import own_memory, trim
from .status import say

ENCODING_BYTES = 16  # room on the device for each weight while it is quantised
HELD_BYTES = 3  # and for each of its layer's, before and after
FOUR_BITS = {"nvfp4": 4} | {f.name: f.bits for f in FORMATS.values() if f.bits == 4}

IN_TORCH = (
    "Qwen VRAM: {} has layers rotated in groups that ComfyUI's kernels for CUDA do not know: they "
    "are computed in torch, which is slower. Quantise the original file again if you have it."
)


@dataclass(frozen=True)
class Quantization:
    """What the user chose: a name of core.quantization.FORMATS, and which layers get it."""

    format: str
    preset: Preset


@dataclass(frozen=True)
class Weights:
    """A state dict, and whether its quantised layers are computed by this pack's operations."""

    state: dict[str, torch.Tensor]
    metadata: Mapping[str, str]
    ours: bool


def read_weights(header: Header, options: dict[str, Any], strip: str = "") -> Weights:
    """The file's tensors, less the prefix `strip`, as `options` ask for them.

    `options`: ComfyUI's model_options; "quantization" (a Quantization) asks for this pack's
    formats. Raises CheckpointError, OSError.
    """
    quantised = options.get("quantization")
    stored = stored_formats(header)
    check_choice(header, stored, quantised, options.get("dtype"))
    if quantised is None or stored:
        state = _state_dict(header, strip)
        state, metadata = comfy.utils.convert_old_quants(state, "", metadata=header.metadata)
        ours = quantised is not None or is_ours(header, stored)
        if not ours and not hosts_kernels_fit(header, state):
            logging.warning(IN_TORCH.format(os.path.basename(header.path)))
            ours = True
        return Weights(state, metadata, ours)
    device = options.get("load_device", mm.get_torch_device())
    state = quantized_state_dict(header, quantised, device, strip)
    return Weights(state, header.metadata, True)


def hosts_kernels_fit(header: Header, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the host's kernels know how all layers are rotated: this pack knows a way if not.

    Raises CheckpointError for damaged layers that the host's own operations would open: they ask
    less of a layer than this pack's, and name neither file nor remedy.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if (parts := split_name(name)) is not None:
            layers.setdefault(parts[0], {})[parts[1]] = tensor
    known = True
    for layer, entries in layers.items():
        if CONFIGURATION not in entries:
            continue
        try:
            found = check_host_layer(entries)
            known &= has_kernels(found or "", rotation_in(settings_in(entries), found or ""))
        except QuantizedFileError as error:
            file = os.path.basename(header.path)
            raise CheckpointError(f"{file}, layer {layer}: {error}") from None
    return known


def check_host_layer(
    entries: Mapping[str, torch.Tensor], shape: tuple[int, int] | None = None
) -> str | None:
    """The format of a layer that says it in `comfy_quant`, or is in none of bitsandbytes'.

    Raises QuantizedFileError, as core.host_formats.check, and for formats that nobody knows.
    """
    found = format_of(entries)
    if found in LAYOUTS:
        check(entries, found, shape)
    elif found is None or not found.startswith("bnb_"):
        need(entries, CONFIGURATION)
        if found not in QUANT_ALGOS:
            raise QuantizedFileError(
                f"comfy_quant says the format {found}, which this ComfyUI does not know; "
                "update ComfyUI, or download the file again."
            )
    return found


@contextmanager
def naming_the_file(header: Header) -> Iterator[None]:
    """What is wrong with a quantised layer, as CheckpointError with the name of the file."""
    try:
        yield
    except QuantizedFileError as error:
        name = os.path.basename(header.path)
        text = str(error)
        raise CheckpointError(text if name in text else f"{name}: {text}") from None


def is_ours(header: Header, stored: Mapping[str, str]) -> bool:
    """Whether a file opens with this pack's operations without being asked: it wrote it, or
    ComfyUI has no others for it."""
    own = "quantization" in header.hints()
    return bool(stored) and (own or any(_package(f) == BITSANDBYTES for f in stored.values()))


def check_choice(
    header: Header,
    stored: Mapping[str, str],
    wanted: Quantization | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise CheckpointError where what the file holds and what the user chose do not agree."""
    name, formats = os.path.basename(header.path), sorted(set(stored.values()))
    for format in formats:
        if _package(format) == BITSANDBYTES and (why := missing_package(format)):
            raise CheckpointError(f"{name} is quantised as {format}. {why}")
    if wanted is None:
        if dtype is not None and stored:
            raise CheckpointError(
                f"{name} is quantised as {' and '.join(formats)}, and stays so; choose "
                "weight_dtype default, or a file in bf16."
            )
        return
    if stored and wanted.format != (main := main_format(header, stored)):
        raise CheckpointError(
            f"{name} is quantised as {main}, not as {wanted.format}; choose "
            "weight_dtype default to open it as it is, or quantise a file in bf16, fp16 or fp8."
        )


def main_format(header: Header, stored: Mapping[str, str]) -> str:
    """What a quantised file was asked to be: as it says itself if this pack wrote it.

    Else the format of the fewest bits, then of most layers: 8 bit is what presets mix in.
    """
    told = header.hints().get("quantization")
    format = told.get("format") if isinstance(told, dict) else None
    if isinstance(format, str) and format in FORMATS:
        return format
    counted = Counter(stored.values()).most_common()
    return min(counted, key=lambda pair: FOUR_BITS.get(pair[0], 8))[0]


def _package(format: str) -> str:
    return FORMATS[format].package if format in FORMATS else ""


def quantized_state_dict(
    header: Header, quantised: Quantization, device: torch.device, strip: str = ""
) -> dict[str, torch.Tensor]:
    """The file's tensors less the prefix `strip`, planned layers as entries of their format.

    Each layer is quantised on `device`; everything returned lies in RAM. Raises CheckpointError.
    """
    source = LayerSource(header, strip)
    plan = _plan(source, quantised)
    mm.free_memory(_room(source, plan), device)
    progress = comfy.utils.ProgressBar(sum(t.bytes for t in header.tensors.values()))
    state: dict[str, torch.Tensor] = {}
    done, often = 0, max(1, len(plan) // 50)
    for step in source.steps(plan, device):
        mm.throw_exception_if_processing_interrupted()
        state.update({name: in_ram(tensor) for name, tensor in step.entries.items()})
        progress.update(step.read)
        done += bool(step.layer)
        if step.layer and done % often == 0:
            say(f"quantising {done} of {len(plan)} layers")
    mm.soft_empty_cache()
    trim()
    return state


def _plan(source: LayerSource, quantised: Quantization) -> dict[str, str]:
    """The format of each layer that gets one. Raises CheckpointError: none, or no package."""
    plan = quantization.plan(source.layers, quantised.format, quantised.preset)
    if not plan:
        raise CheckpointError(
            f"The preset {quantised.preset.name} quantises no layer of "
            f"{os.path.basename(source.header.path)}; choose another preset, or weight_dtype "
            "default."
        )
    for format in sorted(set(plan.values())):
        if why := missing_package(format):
            raise CheckpointError(why)
    return plan


def _room(source: LayerSource, plan: Mapping[str, str]) -> int:
    """Bytes that quantising the largest layer takes on the device."""
    sizes = [rows * columns for rows, columns in (source.layers[name] for name in plan)]
    return max(HELD_BYTES * n + ENCODING_BYTES * min(n, PIECE) for n in sizes)


def in_ram(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in RAM, in memory of exactly its size, which goes back when the model goes."""
    place = own_memory(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    return place.copy_(tensor)


def _state_dict(header: Header, strip: str) -> dict[str, torch.Tensor]:
    """What the host reads, which leaves the weights in the file where it can, of all shards."""
    state = {}
    for path in header.paths():
        for name, tensor in comfy.utils.load_torch_file(path, safe_load=True).items():
            usual = checkpoint.usual_name(name)
            if usual and usual.startswith(strip):
                state[usual[len(strip) :]] = tensor
    return state


def layer_entries(state: Mapping[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by what follows its name."""
    start = f"{layer}."
    return {name[len(start) :]: t for name, t in state.items() if name.startswith(start)}


def inputs_of(state: Mapping[str, torch.Tensor], layer: str) -> int:
    """How many values a linear layer takes, however its weight is stored."""
    entries = layer_entries(state, layer)
    return shape_of(entries)[1] if format_of(entries) else entries["weight"].shape[1]


def formats_in(model: torch.nn.Module) -> Counter[str]:
    """How many layers of a model are in which quantised format."""
    layers = (m for m in model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor))
    names = Counter(layer.quant_format for layer in layers)
    return Counter({OUR_NAMES.get(name, name): count for name, count in names.most_common()})
