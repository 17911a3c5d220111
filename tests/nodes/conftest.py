"""What holds for every module of tests that run in ComfyUI's process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.tests.host import Host
from torch.nn import functional


@pytest.fixture(scope="module", autouse=True)
def forgotten(host: Host) -> Iterator[None]:
    """Afterwards the host knows no model of the module's tests. Clones that failed on purpose end
    in a cycle with their error; ComfyUI then keeps a dead entry for a model that still lives.

    What is alive before it stays: libraries that were imported on the way, above all. Tests and
    nodes collect garbage thousands of times, which takes ten times as long if it looks at those
    too. No model may be among it: let go later, it would never be collected, and ComfyUI's list
    keep it. So not at the end of a module, where the arguments of its last test still live.
    """
    from comfy import model_management

    gc.collect()
    gc.freeze()
    host.restart()  # an executor's caches refer to each other, and shall be collected one day
    yield
    host.part("nodes.loaders").REGISTRY.release()
    host.executor.reset()
    model_management.unload_all_models()
    gc.collect()
    loaded = model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if not entry.is_dead()]


@pytest.fixture
def quick_vae(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiled Edit with a VAE whose latents are means of 8 x 8 pixels. Nothing that it makes may be stored."""
    coding = host.part("nodes.tile_coding")
    whole = host.part("nodes.vae_layers").Outcome("whole", 0)

    def encode(vae: Any, pixels: torch.Tensor, *_: Any) -> Any:
        means = functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return means.repeat(1, 6, 1, 1)[:, :16, None], whole

    def decode(vae: Any, latent: torch.Tensor, *_: Any) -> Any:
        pixels = latent[:, :3, 0].clamp(0, 1).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return pixels.movedim(1, -1)[:, None], whole

    monkeypatch.setattr(coding, "encode", encode)
    monkeypatch.setattr(coding, "decode", decode)
