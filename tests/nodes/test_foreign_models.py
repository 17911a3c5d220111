"""Behind another loader: nodes work for a model of a class that they do not know, and say what
they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET, node
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, within

NOT_OURS = "not ComfyUI's own Qwen-Image (NunchakuQwenImageTransformer2DModel)"
PATCHES = {
    "QwenVRAMReferenceCache": (
        {"refresh": "every n steps", "every_n": 2, "threshold": 0.1},
        NOT_OURS,
    ),
    "QwenVRAMEarlyExit": ({"threshold": 0.0}, "watches the prediction"),
    "QwenVRAMAttention": ({"backend": "auto"}, "auto: runs when a sampler runs with the model"),
    "QwenVRAMTiledDiffusion": ({"tile_width": 256, "tile_height": 256}, "samples in tiles"),
}


@pytest.fixture
def foreign(host, monkeypatch) -> Iterator[Any]:
    """Our loader gives a model as Nunchaku's loader makes it: the base class is ComfyUI's, the
    network and its blocks are classes of its own."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy_api.latest import io

    class NunchakuQwenImageTransformer2DModel(QwenImageTransformer2DModel):
        def _forward(self, *given: Any, **named: Any) -> torch.Tensor:
            return super()._forward(*given, **named)

    path = str(host.models / "diffusion_models" / UNET)
    model = host.part("nodes.architectures").load_transformer(path, {})
    model.model.diffusion_model.__class__ = NunchakuQwenImageTransformer2DModel
    for block in model.model.diffusion_model.transformer_blocks:
        block.__class__ = type("NunchakuQwenImageTransformerBlock", (block.__class__,), {})
    loader = host.part("nodes.loaders").LoadDiffusionModel
    handed_out = classmethod(lambda cls, **_: io.NodeOutput(model))
    monkeypatch.setattr(loader, "execute", handed_out)
    host.executor.reset()
    yield model.model.diffusion_model
    host.executor.reset()


def usual(host, name: str) -> dict[str, Any]:
    """The values that a node has when it is put down."""
    required = host.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    told = {key: given[1] for key, given in required.items() if len(given) > 1}
    first = {key: more["options"][0] for key, more in told.items() if "options" in more}
    return {**first, **{key: more["default"] for key, more in told.items() if "default" in more}}


def test_nodes_behind_another_loader_draw_the_same_picture(host, foreign) -> None:
    stock = latent(host.run(small()))
    for name, (given, says) in PATCHES.items():
        graph = small()
        graph["patch"] = node(name, **{**usual(host, name), "model": ["shift", 0], **given})
        graph["sampler"]["inputs"]["model"] = ["patch", 0]
        run = host.run(graph)
        assert latent(run).equal(stock), name
        assert says in run.status("patch")["text"], name


def test_the_sampler_repeats_what_failed_and_says_that_it_cuts_no_slices(host, foreign) -> None:
    stock = latent(host.run(small()))
    fit = host.run(fitted(small()))
    assert latent(fit).equal(stock) and NOT_OURS in fit.status("fit")["text"]
    with blocks_fail(foreign, Faults({1})):
        run = host.run(within(small()))
    assert latent(run).equal(stock)
    text = run.status("sampler")["text"]
    assert "forward passes repeated: 1" in text and NOT_OURS in text and "slices" in text
