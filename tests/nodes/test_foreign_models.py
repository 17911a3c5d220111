"""Behind another loader: nodes work for a model of a class that they do not know, and say what
they leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pack.demo import embedded
from pack.tests.graphs import UNET, node
from pack.tests.host import RunError
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, within
from pack.tests.nodes.test_tiled_edit import SMALL, edit, image, write

NETWORKS = {
    "nunchaku": "NunchakuQwenImageTransformer2DModel",
    "Qwen-Image 2.1": "QwenImage21Transformer2DModel",
}
NOT_OURS = "not ComfyUI's own Qwen-Image ({})"
PATCHES = {
    "QwenVRAMReferenceCache": (
        {"refresh": "every n steps", "every_n": 2, "threshold": 0.1},
        NOT_OURS,
    ),
    "QwenVRAMEarlyExit": ({"threshold": 0.0}, "watches the prediction"),
    "QwenVRAMAttention": ({"backend": "auto"}, "auto: runs when a sampler runs with the model"),
    "QwenVRAMTiledDiffusion": ({"tile_width": 256, "tile_height": 256}, "samples in tiles"),
}
every_kind = pytest.mark.parametrize("kind", NETWORKS)


def estrange(model: Any, kind: str) -> None:
    """Nunchaku's loader: the model's class is ComfyUI's, those of the network and its blocks are
    not. Qwen-Image 2.1: the model's class, too, is another one."""
    import comfy.conds
    from comfy.model_base import BaseModel

    class QwenImage21(BaseModel):
        def extra_conds(self, **given: Any) -> dict[str, Any]:
            text = comfy.conds.CONDRegular(given["cross_attn"])
            return {**super().extra_conds(**given), "c_crossattn": text}

    network = model.diffusion_model
    own = type(network)

    def forward(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        return own._forward(self, *given, **named)

    network.__class__ = type(NETWORKS[kind], (own,), {"_forward": forward})
    for block in network.transformer_blocks:
        block.__class__ = type("ItsBlock", (block.__class__,), {})
    if kind == "Qwen-Image 2.1":
        model.__class__ = QwenImage21


@pytest.fixture
def foreign(host, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Our loader gives a model as another loader makes it; returns the network."""
    from comfy_api.latest import io

    def give(kind: str, file: str = UNET) -> Any:
        path = str(host.models / "diffusion_models" / file)
        model = host.part("nodes.architectures").load_transformer(path, {})
        estrange(model.model, kind)
        handed_out = classmethod(lambda cls, **_: io.NodeOutput(model))
        monkeypatch.setattr(host.part("nodes.loaders").LoadDiffusionModel, "execute", handed_out)
        host.executor.reset()
        return model.model.diffusion_model

    yield give
    host.executor.reset()


def usual(host, name: str) -> dict[str, Any]:
    """The values that a node has when it is put down."""
    required = host.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    told = {key: given[1] for key, given in required.items() if len(given) > 1}
    first = {key: more["options"][0] for key, more in told.items() if "options" in more}
    return {**first, **{key: more["default"] for key, more in told.items() if "default" in more}}


@every_kind
def test_nodes_behind_another_loader_draw_the_same_picture(host, foreign, kind) -> None:
    foreign(kind)
    stock = latent(host.run(small()))
    for name, (given, says) in PATCHES.items():
        graph = small()
        graph["patch"] = node(name, **{**usual(host, name), "model": ["shift", 0], **given})
        graph["sampler"]["inputs"]["model"] = ["patch", 0]
        run = host.run(graph)
        assert latent(run).equal(stock), name
        assert says.format(NETWORKS[kind]) in run.status("patch")["text"], name


@every_kind
def test_the_sampler_repeats_what_failed_and_says_that_it_cuts_no_slices(
    host, foreign, kind
) -> None:
    network, says = foreign(kind), NOT_OURS.format(NETWORKS[kind])
    stock = latent(host.run(small()))
    fit = host.run(fitted(small()))
    assert latent(fit).equal(stock) and says in fit.status("fit")["text"]
    with blocks_fail(network, Faults({1})):
        run = host.run(within(small()))
    assert latent(run).equal(stock)
    text = run.status("sampler")["text"]
    assert "forward passes repeated: 1" in text and says in text and "slices" in text


def test_tiled_edit_works_behind_nunchaku_and_refuses_qwen_image_21(
    host, foreign, quick_vae
) -> None:
    graph = edit(write(host, "foreign.png", (320, 256)), cache="off", **SMALL)
    host.executor.reset()
    stock = image(host.run(graph)).clone()
    file = embedded.TRANSFORMER.rpartition("/")[2]
    foreign("nunchaku", file)
    run = host.run(graph)
    # Each tile goes through it alone, where our own model takes several at once: rounding.
    assert "unet" in run.executed and (image(run) - stock).abs().max() < 1e-3
    foreign("Qwen-Image 2.1", file)
    with pytest.raises(RunError, match="carries QwenImage21, which is not Qwen-Image-Edit"):
        host.run(graph)
