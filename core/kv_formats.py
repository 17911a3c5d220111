"""How keys and values are written down: as they are, or in 8 or 4 bits an element.

Quantised for each token and head, as the keys and values of language models are: KIVI (Liu et al.,
arXiv:2402.02750) and QuaRot (Ashkboos et al., arXiv:2404.00456), whose rotation spreads a head's
few large channels over all of them. What is not finite stays so: its scale is not finite either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32  # elements that share a scale in 4 bits; 16 bits of scale make it 4.5 bits an element
TINY = 1e-30  # in place of a scale of 0
AT_A_TIME = 1 << 24  # elements that are worked on at a time, in float32: 64 MiB
Part = tuple[torch.dtype, tuple[int, ...]]


class Format(NamedTuple):
    """One way to write down a tensor (batch, heads, tokens, width) in several parts.

    `parts(shape, dtype)` says which; each has the tokens third. `pack(tensor, parts)` fills them,
    `unpack(parts, out)` the other way round.
    """

    parts: Callable[[Sequence[int], torch.dtype], list[Part]]
    pack: Callable[[Tensor, Sequence[Tensor]], None]
    unpack: Callable[[Sequence[Tensor], Tensor], None]


def parts_of(format: str, shape: Sequence[int], dtype: torch.dtype) -> list[Part]:
    """Type and shape of each part of a tensor (batch, heads, tokens, width). Raises ValueError."""
    if format not in TABLE:
        raise ValueError(f"store_format is one of {', '.join(TABLE)}, not {format}.")
    if len(shape) != 4 or not dtype.is_floating_point:
        raise ValueError(f"Keys and values are (batch, heads, tokens, width), not {tuple(shape)}.")
    if format == "int4" and shape[-1] % 2:
        raise ValueError(f"int4 needs heads of an even width, not {shape[-1]}.")
    return TABLE[format].parts(shape, dtype)


def pack(format: str, tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Write a tensor down, some tokens at a time: the arithmetic is in float32."""
    for chosen in _spans(tensor):
        TABLE[format].pack(tensor[:, :, chosen], [part[:, :, chosen] for part in parts])


def unpack(format: str, parts: Sequence[Tensor], out: Tensor) -> None:
    """Read it into `out`, a tensor or a view of the same shape."""
    for chosen in _spans(out):
        TABLE[format].unpack([part[:, :, chosen] for part in parts], out[:, :, chosen])


def _spans(tensor: Tensor) -> Iterator[slice]:
    batch, heads, tokens, width = tensor.shape
    step = max(1, AT_A_TIME // max(1, batch * heads * width))
    return (slice(first, first + step) for first in range(0, tokens, step))


# ------------------------------------------------------------------------------ the model's own
def _same(shape: Sequence[int], dtype: torch.dtype) -> list[Part]:
    return [(dtype, tuple(shape))]


def _copy(tensor: Tensor, parts: Sequence[Tensor]) -> None:
    parts[0].copy_(tensor)


def _copy_back(parts: Sequence[Tensor], out: Tensor) -> None:
    out.copy_(parts[0])


# ------------------------------------------------------------------------------------- 8 bits
def _parts8(shape: Sequence[int], dtype: torch.dtype) -> list[Part]:
    return [(torch.int8, tuple(shape)), (torch.float32, (*shape[:3], 1))]


def _pack8(tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Symmetric, one scale for each token and head."""
    norm = torch.linalg.vector_norm(tensor, math.inf, -1, keepdim=True, dtype=torch.float32)
    scale = torch.clamp_min(norm.div_(127), TINY, out=parts[1])
    parts[0].copy_((tensor / scale).round_())


def _unpack8(parts: Sequence[Tensor], out: Tensor) -> None:
    torch.mul(*parts, out=out)


# ------------------------------------------------------------------------------------- 4 bits
def _parts4(shape: Sequence[int], dtype: torch.dtype) -> list[Part]:
    *start, width = shape
    groups = width // _group(width)
    packed = (*start, groups, _group(width) // 2)
    return [(torch.int8, packed), (torch.bfloat16, (*start, groups, 1))]


def _group(width: int) -> int:
    return math.gcd(width, GROUP)


def _pack4(tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Rotated; in groups, whose number furthest from zero becomes exactly -8 or nearly so."""
    packed, scales = parts
    width = tensor.shape[-1]
    numbers = tensor.to(torch.float32, copy=True)
    if (rotation := _rotation(width, numbers)) is not None:
        numbers = numbers @ (rotation / width)  # none becomes larger than the largest was
    numbers = numbers.unflatten(-1, packed.shape[3:-1] + (_group(width),))
    furthest = numbers.abs().argmax(-1, keepdim=True)
    scales.copy_(numbers.gather(-1, furthest).div_(-8))
    scale = scales.float()  # as it was rounded
    scale = torch.where(scale.abs() < TINY, TINY, scale)
    scales.copy_(torch.where(scale.isfinite(), scale, math.nan))  # what bounds do not hide
    low, high = numbers.div_(scale).round_().clamp_(-8, 7).to(torch.int8).chunk(2, -1)
    torch.bitwise_or(low & 15, high << 4, out=packed)


def _unpack4(parts: Sequence[Tensor], out: Tensor) -> None:
    packed, scales = parts
    width = out.shape[-1]
    rotation = _rotation(width, out)
    numbers = out if rotation is None else torch.empty_like(out, memory_format=_PLAIN)
    halves = numbers.unflatten(-1, (packed.shape[3], 2, packed.shape[4]))
    torch.mul((packed << 4) >> 4, scales, out=halves[..., 0, :])  # shifts keep the sign
    torch.mul(packed >> 4, scales, out=halves[..., 1, :])
    if rotation is not None:
        out.copy_(numbers @ rotation)
    if out.dtype == torch.float16:  # the error of a number next to the largest makes it infinite
        out.clamp_(-torch.finfo(out.dtype).max, torch.finfo(out.dtype).max)


_PLAIN = torch.contiguous_format


def _rotation(width: int, like: Tensor) -> Tensor | None:
    """Hadamard's matrix of +-1 in this type, on this device; None where the width has none.

    Its product with itself is the width times the identity.
    """
    if width & (width - 1):
        return None
    return _hadamard(width, like.dtype, like.device)


@functools.lru_cache(maxsize=8)
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and used inside and outside of that mode
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < width:  # Sylvester's construction
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        return matrix.to(device, dtype)


TABLE = {
    "model": Format(_same, _copy, _copy_back),
    "int8": Format(_parts8, _pack8, _unpack8),
    "int4": Format(_parts4, _pack4, _unpack4),
}
