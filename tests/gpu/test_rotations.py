"""On a card: its kernels know every rotation that we write, and others are computed all the same."""

from __future__ import annotations

import pytest
import torch
from pack.core import host_formats
from pack.core.quantized_layers import decode, encode
from pack.tests.nodes.quantized_models import others_w4a8
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDTHS = {
    "int8": (16, 64, 128, 256, 320, 3072, 3420, 18944),
    "w4a8": (256, 512, 3072, 12288, 18944),
    "w4a4": (64, 128, 256, 3072, 18944),
}
CASES = [(format, inputs) for format, widths in WIDTHS.items() for inputs in widths]
ERRORS = {"int8": 0.03, "w4a8": 0.1, "w4a4": 0.3}  # of a product, activations rounded too
AGAIN = 0.005  # what bf16 rounds


def weight(rows: int, columns: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows * 1009 + columns)
    return (torch.randn(rows, columns, generator=draw) * 0.05).to("cuda", torch.bfloat16)


def error(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made.double() - exact.double()).norm() / exact.double().norm())


def tensor_of(entries: dict[str, torch.Tensor], format: str) -> torch.Tensor:
    """The weight of a layer, as ComfyUI's layers hold it."""
    from comfy_kitchen import tensor as kitchen

    settings = host_formats.settings_in(entries)
    params = getattr(kitchen, host_formats.LAYOUTS[format]).Params(
        orig_dtype=torch.bfloat16,
        orig_shape=host_formats.shape_of(entries, format),
        **host_formats._scales(entries, format),
        **host_formats._options(settings, format),
    )
    return kitchen.QuantizedTensor(entries["weight"], host_formats.LAYOUTS[format], params)


@pytest.mark.parametrize(("format", "inputs"), CASES)
def test_what_we_write_is_quantised_multiplied_and_dequantised(format, inputs) -> None:
    w = weight(128, inputs)
    entries = encode(w, format)
    on_cpu = decode({name: e.cpu() for name, e in entries.items()}, torch.bfloat16)
    assert error(decode(entries, torch.bfloat16).cpu(), on_cpu) < AGAIN
    for rows in (1, 5, 300):
        x = weight(rows, inputs)
        assert error(F.linear(x, tensor_of(entries, format)), F.linear(x, w)) < ERRORS[format]


@pytest.mark.parametrize("rotation", [16, 64])
def test_rotations_of_others_give_what_the_cpu_gives(rotation) -> None:
    entries = others_w4a8(weight(128, 192).cpu(), rotation)
    moved = {name: e.cuda() for name, e in entries.items()}
    on_cpu = decode(entries, torch.bfloat16)
    assert error(decode(moved, torch.bfloat16).cpu(), on_cpu) < AGAIN
    x, held = weight(5, 192), tensor_of(moved, "w4a8")
    with host_formats.kernels_for("w4a8", rotation):
        assert error(F.linear(x, held), F.linear(x, on_cpu.cuda())) < ERRORS["int8"]
