"""bitsandbytes' row-wise int8 (LLM.int8, arXiv 2208.07339), of weights only.

Its entries and numbers are bitsandbytes', its arithmetic is torch's: no package is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .quantized_entries import QuantizedFileError, check_finite, check_weight, need

PIECE = 1 << 22  # weights quantised at once
CPU_ROWS = 64
FEW_ROWS = 256  # of inputs: up to here it is cheaper to scale the outputs than the weights
ROW_MAJOR = 0  # in "weight_format"; 1 to 3 are tile orders of old GPUs
INT8_MAX = 127


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 (out, in) and the largest magnitude of each row, fp32 (out,). Raises as `check_weight`.

    bitsandbytes' numbers, computed here in fp32: its own code goes through fp16, where weights
    above 65504 are infinite.
    """
    check_weight(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    largest = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        piece = slice(start, start + rows)
        values = weight[piece].float()
        largest[piece] = values.abs().amax(1)
        factor = torch.where(largest[piece] > 0, INT8_MAX / largest[piece], 0.0)
        codes[piece] = (values * factor[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes, largest


def entries_int8(codes: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """The entries of a layer; what is made for them lies in RAM, as in `pack_json`."""
    row_major = torch.tensor(ROW_MAJOR, dtype=torch.uint8)
    return {"weight": codes, "SCB": largest, "weight_format": row_major}


def weight_int8(entries: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and largest magnitudes of a layer. Raises QuantizedFileError where they do not fit."""
    codes, largest = need(entries, "weight"), need(entries, "SCB")
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise QuantizedFileError(
            f"The layer has an SCB, and its weight is {str(codes.dtype).removeprefix('torch.')} of "
            f"the shape {tuple(codes.shape)}, expected int8 (out, in); quantise the original file "
            "again."
        )
    if largest.numel() != codes.shape[0] or not largest.dtype.is_floating_point:
        raise QuantizedFileError(
            f"SCB has {largest.numel():,} numbers in {str(largest.dtype).removeprefix('torch.')}, "
            f"and the weight has {codes.shape[0]:,} rows, which need one float each; the file is "
            "damaged, download it again."
        )
    check_finite("SCB", largest)
    if "weight_format" in entries:
        _check_order(entries["weight_format"])
    return codes, largest.float().view(-1)


def _check_order(order: torch.Tensor) -> None:
    if order.numel() != 1 or order.dtype.is_floating_point:
        raise QuantizedFileError(
            f"weight_format has {order.numel():,} numbers in "
            f"{str(order.dtype).removeprefix('torch.')}, expected one whole number; the file is "
            "damaged, download it again."
        )
    if int(order) != ROW_MAJOR:
        raise QuantizedFileError(
            "The int8 weight is stored in the tile order of an old GPU (weight_format is not 0); "
            "load it with bitsandbytes 0.43 or newer and save it again."
        )


def dequantize_int8(codes: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in), rounded to `dtype` once, without waiting for the device."""
    scale = (largest * (1 / INT8_MAX))[:, None]
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.device.type != "cpu":
        return torch.mul(codes, scale, out=out)
    # torch's CPU code for mixed dtypes is five times slower than this, a few rows at a time.
    for part, row, factor in zip(*(t.split(CPU_ROWS) for t in (out, codes, scale)), strict=True):
        part.copy_(row.float().mul_(factor))
    return out


def linear_int8(
    x: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) -> (..., out), computed in x's dtype, without waiting for the device.

    int8 is exact in bf16. Few rows are multiplied by the codes and scaled afterwards: on an H200
    that takes a third less for one row. In fp16 such sums pass 65504, so there, and for many rows,
    the weight is dequantised.
    """
    if x.dtype == torch.float16 or x.numel() // codes.shape[1] > FEW_ROWS:
        return torch.nn.functional.linear(x, dequantize_int8(codes, largest, x.dtype), bias)
    out = torch.nn.functional.linear(x, codes.to(x.dtype)) * (largest * (1 / INT8_MAX))
    return (out if bias is None else out + bias).to(x.dtype)
