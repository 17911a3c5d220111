"""ConvRot matrices that comfy-kitchen's kernels know: what we write opens on every device."""

from __future__ import annotations

import pytest
import torch
from pack.core import host_formats
from pack.core.quantization import ROTATIONS, WIDTHS
from pack.core.quantized_layers import decode, encode
from pack.tests import cuda_kernels
from pack.tests.conftest import missing
from pack.tests.nodes.quantized_models import others_w4a8

ROWS, INPUTS = 32, 1024
LAYOUTS = host_formats.LAYOUTS


@pytest.fixture(autouse=True)
def package() -> None:
    if problem := host_formats.problem():
        missing(problem)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> cuda_kernels.Kernels:
    return cuda_kernels.installed(monkeypatch)


def use(format: str, rotation: int) -> None:
    """Quantise, dequantise, multiply few rows and one, as a layer does."""
    from comfy_kitchen import tensor as kitchen

    layout = getattr(kitchen, LAYOUTS[format])
    options = {"per_channel": True, "convrot": True} if format == "int8" else {}
    w = torch.randn(ROWS, INPUTS, dtype=torch.bfloat16)
    codes, params = layout.quantize(w, convrot_groupsize=rotation, **options)
    weight = kitchen.QuantizedTensor(codes, LAYOUTS[format], params)
    assert weight.dequantize().shape == w.shape
    for rows in (1, 5):
        x = torch.randn(rows, INPUTS, dtype=torch.bfloat16)
        assert torch.nn.functional.linear(x, weight, None).shape == (rows, ROWS)


@pytest.mark.parametrize("format", list(ROTATIONS))
@pytest.mark.parametrize("rotation", [256, 64, 16])
def test_cudas_kernels_know_the_rotations_that_we_write(kernels, format, rotation) -> None:
    if rotation in ROTATIONS[format]:
        use(format, rotation)
        assert kernels.seen
    else:
        if not kernels.refusing:
            pytest.skip("comfy-kitchen's library no longer has the sentences that it refused with")
        with pytest.raises(RuntimeError, match="only supports group_size 256"):
            use(format, rotation)


@pytest.mark.parametrize("format", list(ROTATIONS))
@pytest.mark.parametrize("inputs", [64, 128, 256, 320, 512, 3072, 3420, 3584, 12288, 18944])
def test_what_we_encode_is_rotated_as_all_devices_can(format, inputs) -> None:
    w = torch.randn(4, inputs, dtype=torch.bfloat16)
    if inputs % WIDTHS.get(format, 1):
        with pytest.raises(ValueError, match=f"{format}, which takes multiples of .*; choose int8"):
            encode(w, format)
        return
    settings = host_formats.settings_in(encode(w, format))
    rotation = host_formats.rotation_in(settings, format)
    assert host_formats.has_kernels(format, rotation)
    assert rotation == next((s for s in (256, 64, 16) if inputs % s == 0), None)


def test_a_layer_of_others_that_no_kernel_knows_is_dequantised_by_torch(kernels) -> None:
    w = torch.randn(ROWS, 128, dtype=torch.bfloat16)
    back = decode(others_w4a8(w, 64), torch.bfloat16)
    assert float((back - w).float().norm() / w.float().norm()) < 0.09
    assert not kernels.seen
