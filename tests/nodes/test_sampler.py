"""The sampler within VRAM in the real ComfyUI: where nothing is short it is a KSampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.core.fallback_settings import DEFAULT
from pack.tests.graphs import LORA, loader, node, text_to_image
from pack.tests.host import RunError

OWN = {"policy": "exact only", "vram_limit": 0.0, "settings": DEFAULT}


def within(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The same graph with our sampler in the place of ComfyUI's."""
    asked = {**graph["sampler"]["inputs"], **OWN, **inputs}
    return {**graph, "sampler": node("QwenVRAMSampler", **asked)}


def sampled(host: Any, graph: dict[str, Any]) -> torch.Tensor:
    """The latent that a graph's sampler gives."""
    return host.run(graph, ["save"]).outputs["sampler"][0][0]["samples"]


SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "ddim", "lms"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_gives_what_a_ksampler_gives(host, name: str) -> None:
    graph = text_to_image(steps=3)
    graph["sampler"]["inputs"]["sampler_name"] = name
    stock = sampled(host, graph)
    run = host.run(within(graph))
    assert run.outputs["sampler"][0][0]["samples"].equal(stock)
    status = run.status("sampler")
    assert status["done"] == "as asked" and status["exactness"] == "exact"
    assert status["forward_passes_repeated"] == 0
    assert run.outputs["sampler"][1][0] == status["text"]
