"""comfy-kitchen's CUDA backend without a card: its Python as it is, kernels that only refuse.

Its Python chooses the kernels. These do no work, and refuse the sizes of ConvRot's matrices that
the real ones refuse, with a sentence that stands in the library.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ONLY_256 = {  # kernels: which argument is the size, and what they say of others
    "rotate_int8_convrot_weight": (2, b"convrot rotate kernel only supports group_size 256"),
    "quantize_int8_rowwise_convrot": (3, b"convrot fused kernel only supports group_size 256"),
    "quantize_int8_rowwise_convrot64": (3, b"convrot64 fused kernel only supports group_size 256"),
    "quantize_int8_convrot_staged": (5, b"convrot staged quantize only supports group_size 256"),
    "dequantize_int8_convrot_weight": (3, b"convrot dequant kernel only supports group_size 256"),
    "w4a8_codebook_linear_chunked": (10, b"convrot fused kernel only supports group_size 256"),
}


@cache
def refusing() -> dict[str, int]:
    """The kernels that refuse all sizes but 256, and their argument."""
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

    def __init__(self) -> None:
        self.refusing, self.seen = refusing(), set()

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def kernel(*args: Any) -> bool:
            self.seen.add(name)
            if name in self.refusing and args[self.refusing[name]] != 256:
                raise RuntimeError(f"{name} only supports group_size 256")
            return True

        return kernel


def installed(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The CUDA backend for all that comfy-kitchen does, on tensors of the CPU."""
    from comfy_kitchen.backends import cuda
    from comfy_kitchen.registry import registry

    made = Kernels()
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(cuda, "_C", made)
    monkeypatch.setattr(cuda, "_wrap_for_dlpack", lambda tensor: tensor)
    monkeypatch.setattr(cuda, "_cuda_device_is_turing", lambda index: False)
    monkeypatch.setattr(cuda, "get_cublas_workspace", lambda: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    usual = registry.get_implementation

    def chosen(name: str, backend: str | None = None, kwargs: Any = None) -> Any:
        told = backend or getattr(registry._thread_local, "backend_override", None)
        return usual(name, told, kwargs) if told else getattr(cuda, name)

    monkeypatch.setattr(registry, "get_implementation", chosen)
    return made
