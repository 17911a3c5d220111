"""What this machine is, and what a weight_dtype means on it."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import replace

import comfy.memory_management
import comfy.model_management as mm
import comfy.quant_ops
import torch
from comfy.cli_args import args

from ..core import checkpoint, container_memory, quantization
from ..core.checkpoint import Header
from ..core.format_support import (
    CPU,
    CUDA,
    HIP_KERNELS,
    MPS,
    ROCM,
    Machine,
    int4_for,
    obstacle,
    slowness,
)
from ..core.layer_source import stored_formats
from ..core.quantization import BITSANDBYTES, COMFY_KITCHEN, DEFAULT_PRESET, FORMATS, Preset
from ..core.quantization_choice import FLOATS, FP8_SCALED, SMALLEST, Choice, File, choose
from ..core.quantized_layers import layers_of, missing_package
from ..core.qwen_layers import TOKEN_TABLE
from . import architectures
from .devices import device_memory
from .quantization_presets import all_presets
from .quantized_loading import main_format

AUTO, INT4, FP8_FAST = "auto", "int4", "fp8_e4m3fn_fast"
SAFETENSORS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
SAFETENSORS |= {"F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2"}
KINDS = {checkpoint.TRANSFORMER: "diffusion_models", checkpoint.TEXT_ENCODER: "text_encoders"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}  # else one


def resolve(weight_dtype: str, header: Header, device: str, preset: Preset | None = None) -> Choice:
    """What to load a file as: "auto" and "int4" decided, everything else as it is.

    `device` is the loader's option (default, cpu, gpu:0 ...), `preset` says which layers would be
    quantised (default: the pack's own). `why` is "" where there is nothing to say. Raises
    ValueError, a sentence, for what this machine cannot run.
    """
    target = _target(header, device)
    if weight_dtype.startswith("fp8") and not mm.supports_cast(target, torch.float8_e4m3fn):
        raise ValueError(f"{_name(target)} holds no fp8; choose bf16, or bnb_int8.")
    if weight_dtype == FP8_FAST and not mm.supports_fp8_compute(target):
        return Choice(weight_dtype, f"{_name(target)} does not compute in fp8: as fp8_e4m3fn")
    here = machine(target)
    if weight_dtype == AUTO:
        choice = _choose(file_of(header, preset), here)
        if choice.weight_dtype in FORMATS:
            own = all_presets()[KINDS[checkpoint.kind_of(header)]].get(choice.preset or "")
            _checked(choice.weight_dtype, "", header, own or preset, here)
        return choice
    if weight_dtype == INT4:
        format = int4_for(here.capability, linear_shapes(header).values())
        return _checked(format, "int4: ", header, preset, here)
    if weight_dtype in FORMATS:
        return _checked(weight_dtype, "", header, preset, here)
    return Choice(weight_dtype, "")


def _choose(file: File, here: Machine) -> Choice:
    """What suits, of what really works: whether bitsandbytes does is known after its import."""
    choice = choose(file, here)
    if choice.weight_dtype in FORMATS and (why := missing_package(choice.weight_dtype)):
        without = frozenset({FORMATS[choice.weight_dtype].package})
        broken = {choice.weight_dtype: why}
        return choose(file, replace(here, packages=here.packages - without, broken=broken))
    return choice


def _checked(
    format: str, said: str, header: Header, preset: Preset | None, here: Machine
) -> Choice:
    """A format of FORMATS, if this machine runs it and what the preset asks for beside it.

    Whether a package works is known after its import, so it is asked when layers are quantised.
    Raises ValueError.
    """
    preset = preset or quantization.presets()[KINDS[checkpoint.kind_of(header)]][DEFAULT_PRESET]
    formats = _formats(format, header, preset)
    for name in formats:
        if problem := obstacle(name, here):
            beside = f" Or choose another preset than {preset.name}, which has layers in {name}."
            raise ValueError(problem if name == format else problem + beside)
    slow = {name: why for name in formats if (why := slowness(name, here))}
    told = [f"{said}{format}"] if said else []
    if format in slow:  # whose name stands before it, among the layers
        return Choice(format, ", ".join([*told, slow[format]]))
    return Choice(format, "; ".join([*told, *(f"{name}, {why}" for name, why in slow.items())]))


def _formats(format: str, header: Header, preset: Preset) -> list[str]:
    """What layers would be in, `format` first. Words are looked up in a table, not computed."""
    if stored_formats(header):
        return [format]
    planned = quantization.plan(linear_shapes(header), format, preset)
    planned.pop(TOKEN_TABLE, None)
    return sorted(set(planned.values()) or {format}, key=lambda name: (name != format, name))


def _target(header: Header, device: str) -> torch.device:
    """Where the file's model computes."""
    chosen = architectures.resolve_device(device)
    if chosen is not None:
        return chosen
    text = checkpoint.kind_of(header) == checkpoint.TEXT_ENCODER
    return torch.device(mm.text_encoder_device() if text else mm.get_torch_device())


# ---------------------------------------------------------------------------------------- the file
def linear_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The linear layers of a file that is not quantised: name -> (out, in), without a prefix."""
    prefix = checkpoint.transformer_prefix(header.tensors) or ""
    end = ".weight"
    return {
        name[len(prefix) : -len(end)]: tensor.shape
        for name, tensor in header.tensors.items()
        if name.startswith(prefix) and name.endswith(end) and len(tensor.shape) == 2
    }


def file_of(header: Header, preset: Preset | None = None) -> File:
    """A file as its header tells it, with what it would take in each format."""
    kind = checkpoint.kind_of(header)
    sizes = {name: _bytes(tensor) for name, tensor in header.tensors.items()}
    parameters = sum(math.prod(t.shape) for t in header.tensors.values())
    dtype = _dtype_of(header)
    planned: dict[str, int] = {}
    smallest: dict[str, int] = {}
    if dtype in FLOATS:
        presets = all_presets()[KINDS[kind]]  # with the user's own smallest, if there is one
        planned = _planned(header, preset or presets[DEFAULT_PRESET])
        smallest = _planned(header, presets[SMALLEST])
    return File(kind, dtype, sum(sizes.values()), parameters, planned, smallest)


def _bytes(tensor: checkpoint.Tensor) -> int:
    return math.prod(tensor.shape) * BYTES.get(tensor.dtype, 1)


def _dtype_of(header: Header) -> str:
    """One of FLOATS, or the format that the file was quantised in."""
    if stored := stored_formats(header):
        return main_format(header, stored)
    if layers_of(header):  # what is left of them
        return FP8_SCALED
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    most = max(counts, key=lambda dtype: counts[dtype], default="F32")
    return SAFETENSORS.get(most, most.lower())


def _planned(header: Header, preset: Preset) -> dict[str, int]:
    """Bytes of the whole model by format, with what stays in bf16."""
    layers = linear_shapes(header)
    parameters = sum(math.prod(t.shape) for t in header.tensors.values())
    found = {}
    for name in FORMATS:
        plan = quantization.plan(layers, name, preset)
        rest = parameters - sum(math.prod(layers[layer]) for layer in plan)
        found[name] = 2 * rest + sum(quantization.bytes_of(f, layers[n]) for n, f in plan.items())
    return found


# ------------------------------------------------------------------------------------- the machine
def machine(device: torch.device) -> Machine:
    """This machine, with `device` as the one that computes."""
    ram_total, ram_free, container = _ram()
    total, free = (0, 0) if device.type in (CPU, MPS) else _vram(device)
    version = torch.version.cuda
    return Machine(
        device=ROCM if device.type == CUDA and torch.version.hip else device.type,
        name=_name(device),
        capability=_capability(device),
        cuda=tuple(int(n) for n in version.split(".")) if version else None,
        vram_total=total,
        vram_free=free,
        ram_total=ram_total,
        ram_free=ram_free,
        dynamic_vram=bool(comfy.memory_management.aimdo_enabled) and device.type == CUDA,
        packages=_packages(),
        pins_blindly=container and not args.disable_pinned_memory,
        pinnable=int(mm.MAX_PINNED_MEMORY) if mm.MAX_PINNED_MEMORY > 0 else None,
    )


def _name(device: torch.device) -> str:
    """The card's name, or "CPU", "a Mac's GPU"."""
    known = {CPU: "the CPU", MPS: "a Mac's GPU"}
    return known.get(device.type) or device_memory(device).name


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != CUDA or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def _packages() -> frozenset[str]:
    """What is installed; importing it would take seconds."""
    found = {n for n in (BITSANDBYTES,) if importlib.util.find_spec(n)}
    if comfy.quant_ops._CK_AVAILABLE:
        found.add(COMFY_KITCHEN)
        hip = comfy.quant_ops.ck.list_backends().get("hip", {})
        if "int8_linear" in hip.get("capabilities", ()) and not hip.get("disabled"):
            found.add(HIP_KERNELS)
    return frozenset(found)


def _ram() -> tuple[int, int, bool]:
    """RAM in all, what ComfyUI may take of it, and whether a container sets the limit.

    It may take everything that others do not hold.

    What ComfyUI itself holds counts as free, since it lets go of models for new ones; else the
    second run of a workflow would be decided otherwise than the first.
    """
    memory = device_memory(torch.device(CPU))
    total, own = int(memory.total_bytes or 0), int(memory.own_bytes or 0)
    free = total - max(0, int(memory.used_bytes or 0) - own)
    limit = container_memory.limit()
    if limit is None or limit.most >= total:
        return total, max(0, free), False
    return limit.most, max(0, min(free, limit.most - max(0, limit.held - own))), True


def _vram(device: torch.device) -> tuple[int, int]:
    """The same of a card."""
    memory = device_memory(device)
    total = int(memory.total_bytes or mm.get_total_memory(device))
    if memory.other_bytes is not None:
        return total, max(0, total - memory.other_bytes)
    if memory.used_bytes is None:
        return total, total
    own = torch.cuda.memory_reserved(device) if device.type == CUDA else 0
    return total, max(0, total - max(0, memory.used_bytes - own))
