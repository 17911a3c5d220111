"""bitsandbytes' formats in 4 bit: NF4 and FP4 (QLoRA, arXiv 2305.14314).

Entries are laid out as bitsandbytes' own modules write them, so that diffusers and transformers
open what is written here, and their files open here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from math import ceil, isfinite
from types import ModuleType
from typing import Any

import torch

from .quantization import BLOCK, NESTED_BLOCK
from .quantized_entries import (
    QuantizedFileError,
    check_finite,
    check_weight,
    is_whole,
    need,
    pack_json,
    unpack_json,
)

# The first that does all of this on a CPU: 0.46 has no FP4 there, and 0.47 and 0.48 end the
# process where fewer scales are quantised than one block holds.
OLDEST = (0, 49)
QUANT_TYPES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"
PIECE = (
    1 << 22
)  # weights quantised at once: bitsandbytes' own code for CPUs takes ~30 bytes of each
LARGEST_CPU_BLOCK = 1024  # above it bitsandbytes' CPU kernel gives way to code that it compiles
FUSED_ROWS = 512  # above it bitsandbytes itself dequantises and multiplies, on most cards far below


def problem() -> str:
    """Why bitsandbytes cannot be used here, with the remedy; "" if it can."""
    update = "; run `python -m pip install -U bitsandbytes` with ComfyUI's Python and restart it."
    needs = f"bitsandbytes {'.'.join(map(str, OLDEST))} or newer is needed"
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return f"{needs} and is not installed{update}"
    if tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < OLDEST:
        return f"{needs}, and {version} is installed{update}"
    try:
        library = _bitsandbytes().cextension.lib
    except Exception as error:  # whatever its import meets: a broken build, a missing library
        return f"bitsandbytes {version} cannot be imported ({error}){update}"
    if type(library).__name__ == "ErrorHandlerMockBNBNativeLibrary":
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "this machine"
        return f"bitsandbytes {version} has no build for {build} that torch uses{update}"
    return ""


def _bitsandbytes() -> ModuleType:
    """The package, imported late: it takes two seconds, and most people never need it."""
    with _without_downloads(), _without_advice():
        import bitsandbytes
    return bitsandbytes


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep bitsandbytes from fetching a kernel from the network when it is imported.

    On CPUs with AVX512-BF16 it does so through the package `kernels`, where that is installed.
    """
    if "bitsandbytes" in sys.modules or "kernels" in sys.modules or not find_spec("kernels"):
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # its import fails, which is allowed for
    try:
        yield
    finally:
        del sys.modules["kernels"]


@contextmanager
def _without_advice() -> Iterator[None]:
    """Mute bitsandbytes' advice, while it is imported, to install that package: none is needed."""
    if "bitsandbytes" in sys.modules:
        yield
        return

    def _mute(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_mute)
    try:
        yield
    finally:
        logger.removeFilter(_mute)


# ---------------------------------------------------------------------------------- NF4 and FP4
@dataclass(frozen=True)
class FourBitWeight:
    """A weight (out, in) in blocks of 4-bit codes, counted along its rows without a gap.

    `packed`: uint8, two codes a byte. `scale`: one for each block, fp32, or with double
    quantisation uint8, codes of `nested_map` (256, fp32) times one `nested_scale` (fp32) for each
    `nested_block` of them, plus `offset`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    quant_type: str
    shape: tuple[int, int]
    block: int = BLOCK
    nested_scale: torch.Tensor | None = None
    nested_map: torch.Tensor | None = None
    nested_block: int = NESTED_BLOCK
    offset: float = 0.0


def quantize_4bit(
    weight: torch.Tensor, quant_type: str, block: int = BLOCK, nested: bool = True
) -> FourBitWeight:
    """Quantise a weight (out, in) of an even number of weights; `nested`: its scales too.

    Raises as `check_weight`, and ValueError for an odd number: versions pack those differently.
    """
    check_weight(weight)
    if weight.numel() % 2:
        raise ValueError(f"A weight of {tuple(weight.shape)} cannot be packed two to a byte.")
    _bitsandbytes()
    pieces = [
        torch.ops.bitsandbytes.quantize_4bit.default(piece, block, quant_type, torch.uint8)
        for piece in weight.contiguous().view(-1).split(PIECE)
    ]
    packed = torch.cat([p for p, _ in pieces])
    scale = torch.cat([s for _, s in pieces])
    made = FourBitWeight(packed, scale, quant_type, (weight.shape[0], weight.shape[1]), block)
    return _twice(made) if nested else made


def _twice(weight: FourBitWeight) -> FourBitWeight:
    """The same with its scales quantised too, around their mean."""
    offset = weight.scale.mean()
    quantize = _bitsandbytes().functional.quantize_blockwise
    codes, state = quantize(weight.scale - offset, blocksize=NESTED_BLOCK)
    return replace(
        weight,
        scale=codes,
        nested_scale=state.absmax,
        nested_map=state.code.clone(),
        offset=offset.item(),
    )


def entries_4bit(weight: FourBitWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The entries of a layer; `dtype` is the one that other programs dequantise to.

    What is made for them lies in RAM wherever the weight lies: see `pack_json`.
    """
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {
        "weight": weight.packed,
        "weight.absmax": weight.scale,
        "weight.quant_map": _map_of(weight.quant_type),
    }
    if weight.nested_scale is not None and weight.nested_map is not None:
        entries["weight.nested_absmax"] = weight.nested_scale
        entries["weight.nested_quant_map"] = weight.nested_map
        state |= {
            "nested_blocksize": weight.nested_block,
            "nested_dtype": "float32",
            "nested_offset": weight.offset,
        }
    entries[STATE + weight.quant_type] = pack_json(state)
    return entries


def _map_of(quant_type: str) -> torch.Tensor:
    """The sixteen numbers that the codes stand for, on the CPU."""
    return _bitsandbytes().functional.get_4bit_type(quant_type, device="cpu")


def weight_4bit(entries: Mapping[str, torch.Tensor]) -> FourBitWeight:
    """The weight of a layer. Raises QuantizedFileError where its entries do not fit together."""
    name = next((key for key in entries if key.startswith(STATE)), f"{STATE}nf4")
    state = unpack_json(need(entries, name), name)
    quant_type, block, shape = _check_state(state, name.removeprefix(STATE))
    packed, scale = need(entries, "weight"), need(entries, "weight.absmax")
    _check_map(need(entries, "weight.quant_map"), quant_type)
    numbers = shape[0] * shape[1]
    blocks = ceil(numbers / block)
    if packed.nbytes != ceil(numbers / 2):
        raise QuantizedFileError(
            f"The packed weight has {packed.nbytes:,} bytes, and one of {shape[0]} x {shape[1]} "
            f"in 4 bit has {ceil(numbers / 2):,}; the file is damaged, download it again."
        )
    _check_length("weight.absmax", scale, blocks)
    weight = FourBitWeight(packed.view(torch.uint8), scale.view(-1), quant_type, shape, block)
    return _nested(weight, entries, state, blocks) if scale.dtype == torch.uint8 else _plain(weight)


def _check_state(state: Mapping[str, Any], suffix: str) -> tuple[str, int, tuple[int, int]]:
    """quant_type, blocksize and shape of a quant_state."""
    quant_type, block, shape = (state.get(key) for key in ("quant_type", "blocksize", "shape"))
    if suffix not in QUANT_TYPES or quant_type != suffix:
        raise QuantizedFileError(
            f"The layer is in bitsandbytes' format {quant_type} (its entry is named {suffix}); "
            "only nf4 and fp4 in an entry of the same name can be read: quantise the original "
            "file again."
        )
    if block not in BLOCKS:
        raise QuantizedFileError(
            f"quant_state says blocks of {block} weights, and only {', '.join(map(str, BLOCKS))} "
            "can be read; quantise the original file again."
        )
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(is_whole(n) and n > 0 for n in shape)
    ):
        raise QuantizedFileError(
            f"quant_state says a weight of the shape {shape}, and only the two numbers of a "
            "linear layer can be read; quantise the original file again."
        )
    return str(quant_type), int(block), (shape[0], shape[1])


def _check_map(given: torch.Tensor, quant_type: str) -> None:
    standard = _map_of(quant_type)
    given = given.detach().cpu().float().view(-1)
    if given.shape != standard.shape or not torch.allclose(given, standard, atol=1e-4):
        raise QuantizedFileError(
            f"weight.quant_map is not {quant_type}'s; the weights stand for other numbers than "
            "bitsandbytes can compute with: quantise the original file again."
        )


def _check_length(name: str, entry: torch.Tensor, length: int) -> None:
    if entry.numel() != length:
        raise QuantizedFileError(
            f"{name} has {entry.numel():,} numbers, and the weight has {length:,} blocks; the "
            "file is damaged, download it again."
        )


def _plain(weight: FourBitWeight) -> FourBitWeight:
    """Check a weight without double quantisation: its scales are floats."""
    if not weight.scale.dtype.is_floating_point:
        raise QuantizedFileError(
            f"weight.absmax is {str(weight.scale.dtype).removeprefix('torch.')}, expected float32 "
            "or, with nested_absmax, uint8; the file is damaged, download it again."
        )
    check_finite("weight.absmax", weight.scale)
    return replace(weight, scale=weight.scale.float())


def _nested(
    weight: FourBitWeight,
    entries: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    blocks: int,
) -> FourBitWeight:
    """Add what double quantisation keeps beside the scales, checked."""
    scale, table = (need(entries, f"weight.nested_{n}").view(-1) for n in ("absmax", "quant_map"))
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    known = is_whole(block) and (is_whole(offset) or isinstance(offset, float))
    if not known or block < 1 or not isfinite(offset):
        raise QuantizedFileError(
            f"quant_state says nested_blocksize {block} and nested_offset {offset}, and both must "
            "be numbers; the file is damaged, download it again."
        )
    _check_length("weight.nested_absmax", scale, ceil(blocks / block))
    for name, entry in (("absmax", scale), ("quant_map", table)):
        check_finite(f"weight.nested_{name}", entry)
    if table.numel() != 256:
        raise QuantizedFileError(
            f"weight.nested_quant_map has {table.numel()} numbers, expected 256; the file is "
            "damaged, download it again."
        )
    return replace(
        weight,
        nested_scale=scale.float(),
        nested_map=table.float(),
        nested_block=block,
        offset=float(offset),
    )


def _scales(weight: FourBitWeight) -> torch.Tensor:
    """One fp32 scale for each block."""
    if weight.nested_scale is None or weight.nested_map is None:
        return weight.scale
    scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
        weight.scale, weight.nested_scale, weight.nested_map, weight.nested_block, torch.float32
    )
    return scales + weight.offset


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) in bf16, fp16 or fp32, without waiting for the device.

    bitsandbytes sees one long row of an even length, whatever the shape: its CPU kernel takes
    the wrong scales where a row does not end with a block, and compiles other code for odd rows.
    """
    _bitsandbytes()
    scales, block = _scales(weight), weight.block
    if weight.packed.device.type == "cpu" and block > LARGEST_CPU_BLOCK:
        scales = scales.repeat_interleave(block // LARGEST_CPU_BLOCK)
        block = LARGEST_CPU_BLOCK
    row = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed, scales, block, weight.quant_type, (1, weight.packed.numel() * 2), dtype
    )
    return row.view(-1)[: weight.shape[0] * weight.shape[1]].view(weight.shape)


def linear_4bit(
    x: torch.Tensor, weight: FourBitWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) -> (..., out), computed in x's dtype, without waiting for the device.

    Few rows on CUDA go to bitsandbytes' fused product (0.50 and newer), which reads the packed
    weight once and knows where each card gains by it. All else is dequantised and multiplied.
    """
    if not _fusible(x, weight):
        return torch.nn.functional.linear(x, dequantize_4bit(weight, x.dtype), bias)
    nested = weight.nested_scale is not None
    offset = torch.full((), weight.offset, device=x.device) if nested else None
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.packed,
        weight.shape,
        weight.nested_scale if nested else weight.scale,
        weight.block,
        weight.quant_type,
        None if bias is None else bias.to(x.dtype),
        weight.scale if nested else None,
        weight.nested_map,
        offset,
    )


def _fusible(x: torch.Tensor, weight: FourBitWeight) -> bool:
    inputs = weight.shape[1]
    if x.device.type != "cuda" or not 0 < x.numel() // inputs <= FUSED_ROWS:
        return False
    fits = inputs % weight.block == 0 and weight.nested_block == NESTED_BLOCK
    return fits and hasattr(_bitsandbytes() and torch.ops.bitsandbytes, "gemm_4bit")
