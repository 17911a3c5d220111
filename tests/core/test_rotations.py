"""ConvRot matrices that comfy-kitchen's kernels know: seen without a card in its CUDA backend.

Its Python chooses the kernels and runs here as it is; the kernels are replaced by ones that do no
work, and refuse the sizes that the real ones refuse with a sentence that stands in the library.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.core import host_formats
from pack.core.quantization import ROTATIONS, WIDTHS
from pack.core.quantized_layers import decode, encode
from pack.tests.conftest import missing

ROWS, INPUTS = 32, 1024
LAYOUTS = host_formats.LAYOUTS
ONLY_256 = {  # kernels: which argument is the size, and what they say of others
    "rotate_int8_convrot_weight": (2, b"convrot rotate kernel only supports group_size 256"),
    "quantize_int8_rowwise_convrot": (3, b"convrot fused kernel only supports group_size 256"),
    "quantize_int8_rowwise_convrot64": (3, b"convrot64 fused kernel only supports group_size 256"),
    "quantize_int8_convrot_staged": (5, b"convrot staged quantize only supports group_size 256"),
    "dequantize_int8_convrot_weight": (3, b"convrot dequant kernel only supports group_size 256"),
    "w4a8_codebook_linear_chunked": (10, b"convrot fused kernel only supports group_size 256"),
}


@pytest.fixture(scope="module")
def refusing() -> dict[str, int]:
    """The kernels that refuse all sizes but 256, and their argument."""
    if problem := host_formats.problem():
        missing(problem)
    library = getattr(importlib.import_module("comfy_kitchen.backends.cuda"), "_C", None)
    if library is None:
        pytest.skip("comfy-kitchen brings no library for CUDA on this system")
    with (
        Path(library.__file__).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return {k: at for k, (at, sentence) in ONLY_256.items() if data.find(sentence) >= 0}


class Kernels:
    """The library's names; each does nothing and says that it did it."""

    def __init__(self, refusing: dict[str, int]) -> None:
        self.refusing, self.seen = refusing, set()

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def kernel(*args: Any) -> bool:
            self.seen.add(name)
            if name in self.refusing and args[self.refusing[name]] != 256:
                raise RuntimeError(f"{name} only supports group_size 256")
            return True

        return kernel


@pytest.fixture
def kernels(refusing: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The CUDA backend on tensors of the CPU, for all of comfy-kitchen."""
    from comfy_kitchen.backends import cuda
    from comfy_kitchen.registry import registry

    made = Kernels(refusing)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(cuda, "_C", made)
    monkeypatch.setattr(cuda, "_wrap_for_dlpack", lambda tensor: tensor)
    monkeypatch.setattr(cuda, "_cuda_device_is_turing", lambda index: False)
    monkeypatch.setattr(cuda, "get_cublas_workspace", lambda: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    eager = registry.get_implementation

    def chosen(name: str, backend: str | None = None, kwargs: Any = None) -> Any:
        told = backend or getattr(registry._thread_local, "backend_override", None)
        return eager(name, told, kwargs) if told else getattr(cuda, name)

    monkeypatch.setattr(registry, "get_implementation", chosen)
    yield made


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
    elif kernels.refusing:
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
    from comfy_kitchen import use_backend

    layout = host_formats._layout("w4a8")
    w = torch.randn(ROWS, 128, dtype=torch.bfloat16)
    with use_backend("eager"):
        codes, params = layout.quantize(w, convrot_groupsize=64)
    entries = {f"weight{n}": t for n, t in layout.state_dict_tensors(codes, params).items()}
    settings = host_formats.settings_of("asym_w4a8_int8", params)
    entries["comfy_quant"] = host_formats.pack_json(settings)
    back = decode(entries, torch.bfloat16)
    assert float((back - w).float().norm() / w.float().norm()) < 0.09
    assert not kernels.seen
