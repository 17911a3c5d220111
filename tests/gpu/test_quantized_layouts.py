"""On a card: products with bitsandbytes' weights are those of the dequantised weight, any rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from pack.core import bitsandbytes_formats as formats
from pack.core import bitsandbytes_int8 as int8
from pack.core.quantized_layers import decode, encode
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Relative, L2, against the product in fp64 with the same dequantised weight: by the dtype's steps.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-3}


def weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows * 1009 + columns)
    return (torch.randn(rows, columns, generator=draw) * 0.05).to("cuda", dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(18432, 3072), (3072, 12288), (100, 96), (33, 128)])
def test_few_rows_are_multiplied_as_many(kind, nested, dtype, shape) -> None:
    w = formats.quantize_4bit(weight(*shape, dtype), kind, nested=nested)
    plain = formats.dequantize_4bit(w, torch.float32).double()
    bias = weight(1, shape[0], dtype)[0]
    for rows in (1, 2, 5, 60, 300, 512, 513):
        x = weight(rows, shape[1], dtype)
        exact = F.linear(x.double(), plain, bias.double())
        made = {
            "fused" if formats._fusible(x, w) else "dequantised": formats.linear_4bit(x, w, bias),
            "plain": F.linear(x, formats.dequantize_4bit(w, dtype), bias),
        }
        errors = {n: float((y.double() - exact).norm() / exact.norm()) for n, y in made.items()}
        if rows in (1, 60) and shape[0] == 18432:
            warnings.warn(f"{kind} {dtype} {rows} rows: {errors}", stacklevel=1)
        assert max(errors.values()) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_int8_is_dequantised_on_the_card_as_on_the_cpu(dtype) -> None:
    entries = encode(weight(384, 3072, dtype).cpu(), "bnb_int8")
    moved = {name: entry.to("cuda") for name, entry in entries.items()}
    assert torch.equal(decode(moved, dtype).cpu(), decode(entries, dtype))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_int8_products_of_few_rows_are_those_of_many(dtype) -> None:
    codes, largest = int8.quantize_int8(weight(18432, 3072, dtype))
    plain, bias = codes.double() * largest.double()[:, None] / 127, weight(1, 18432, dtype)[0]
    for rows in (1, 256, 257):
        x = weight(rows, 3072, dtype)
        exact = F.linear(x.double(), plain, bias.double())
        made = int8.linear_int8(x, codes, largest, bias)
        assert float((made.double() - exact).norm() / exact.norm()) < ROUNDING[dtype]


def test_a_product_waits_for_nothing() -> None:
    w = formats.quantize_4bit(weight(3072, 3072, torch.bfloat16), "nf4")
    codes, largest = int8.quantize_int8(weight(3072, 3072, torch.bfloat16))
    few, many = weight(1, 3072, torch.bfloat16), weight(600, 3072, torch.bfloat16)
    formats.linear_4bit(few, w), formats.linear_4bit(many, w)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        formats.linear_4bit(few, w), formats.linear_4bit(many, w)
        int8.linear_int8(few, codes, largest), int8.linear_int8(many, codes, largest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
