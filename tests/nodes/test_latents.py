"""Latents that are no picture: sound and meshes have one dimension, nested ones are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.tests.nodes.faults import Faults


class Denoiser(torch.nn.Module):
    """Stands for a model of sound; runs out of memory where a test wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), 0.3), requires_grad=False)
        self.dtype = torch.float32
        self.faults = Faults(())

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, *rest: Any, **more: Any) -> Any:
        """What it predicts, like `x`."""
        self.faults.call(x)
        return x * self.weight + x.mean(dim=-1, keepdim=True)


@pytest.fixture
def model(host) -> Any:
    """ComfyUI's base of all models around it."""
    import comfy.model_base
    import comfy.supported_models_base
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.supported_models_base.latent_formats.LatentFormat()
    config.latent_format.latent_channels = 64
    with torch.inference_mode():
        base = comfy.model_base.BaseModel(config, device=cpu)
    base.diffusion_model = Denoiser()
    yield ModelPatcher(base, cpu, cpu)
    host.part("nodes.recovery").comfy.model_management.unload_all_models()


def sampled(patcher: Any, latent: Any, **more: Any) -> Any:
    """By ComfyUI's KSampler."""
    import nodes as comfy_nodes

    conds = [[[torch.zeros(1, 3, 8), {}]]] * 2
    settings = (patcher, 5, 3, 2.5, "euler", "normal", *conds, {"samples": latent})
    return comfy_nodes.common_ksampler(*settings)[0]["samples"]


def nested() -> Any:
    """A video and its sound."""
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(1, 64, 4, 6), torch.zeros(1, 64, 10)])


@pytest.mark.parametrize("what", ["sound", "a mesh", "nested"])
@pytest.mark.parametrize("at", [set(), {0}, {1, 2}])
def test_latents_of_one_dimension_are_sampled_as_in_a_ksampler(
    host, model, what: str, at: set[int]
) -> None:
    given = {"sound": torch.zeros(2, 64, 100), "a mesh": torch.zeros(1, 64, 33)}
    latent = nested() if what == "nested" else given[what]
    stock = sampled(model, latent)
    model.model.diffusion_model.faults = faults = Faults(at)
    fitting = host.part("nodes.fitting").Fitting("allow changed settings")
    made = sampled(fitting.patch(model), latent)
    assert faults.raised == fitting.record.repeated == len(at)
    pairs = [(made, stock)] if what != "nested" else zip(made.tensors, stock.tensors, strict=True)
    close = torch.equal if fitting.record.exactness() == "exact" else torch.allclose
    assert all(close(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("what", ["sound", "nested"])
def test_a_latent_without_sides_is_made_no_smaller(host, model, what: str) -> None:
    """There is nothing that is a smaller picture: the last error tells of memory."""
    sampler = host.part("nodes.sampler")
    latent = {"samples": nested() if what == "nested" else torch.zeros(1, 64, 100)}
    conds = [[torch.zeros(1, 3, 8), {}]]
    request = sampler.Request(3, 2.5, "euler", conds, conds, latent)
    assert request.settings()["latent_size"] is None
    fitting = host.part("nodes.fitting").Fitting("allow changed settings")
    model.model.diffusion_model.faults = Faults(range(100))
    more = {"seed": 1, "scheduler": "normal", "denoise": 1.0}
    rows = host.part("core.fallback_settings").parse("0: 2, 1, euler")
    with pytest.raises(RuntimeError, match="There is not enough memory"):
        sampler._sample(fitting, fitting.patch(model), request, rows, more)


def test_tokens_of_latents_without_sides(host) -> None:
    tokens = host.part("nodes.workload").tokens_of
    shapes = [(1, 64, 100), (1, 1, 5000), (2, 8), (1, 16, 4, 6), (1, 16, 3, 5, 4)]
    assert [tokens(torch.empty(shape, device="meta")) for shape in shapes] == [100, 5000, 1, 6, 18]
