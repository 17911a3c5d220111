"""On a card: a known prompt after a restart gives the same picture, and stock gives it too."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pack.demo.checkpoints import make_checkpoints
from pack.demo.server import Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import keeping_nothing, node, text_to_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def stock(graph: dict[str, Any]) -> dict[str, Any]:
    """The same work with stock loaders and encoders."""
    names = {k: next(iter(graph[k]["inputs"].values())) for k in ("unet", "clip", "vae")}
    plain = {
        **graph,
        "unet": node("UNETLoader", unet_name=names["unet"], weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=names["clip"], type="qwen_image", device="default"),
        "vae": node("VAELoader", vae_name=names["vae"]),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a red bunny"),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text="blurry"),
    }
    return plain


@pytest.mark.parametrize("flags", [(), ("--disable-dynamic-vram",)], ids=["dynamic", "not dynamic"])
def test_cold_restarted_and_stock_pictures_are_the_same(
    comfyui: Path, tmp_path: Path, flags
) -> None:
    shutil.copytree(ROOT / "tests" / "teach_stock", tmp_path / "custom_nodes" / "teach_stock")
    make_checkpoints(comfyui, tmp_path / "models")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.html").touch()
    graph = text_to_image(size=768)  # large enough for the attention order to matter
    pictures = []
    plain = stock(graph)
    runs = [("miss", graph), ("hit", graph), ("fresh", keeping_nothing(plain))]
    for wanted, prompt in [*runs, ("miss", plain), ("hit", plain)]:
        told: dict[str, Any] = {}
        extra = ["--front-end-root", str(tmp_path / "web"), *flags]
        with Server(comfyui, tmp_path, ROOT, cpu=False, extra_args=extra) as server:
            result = server.submit(
                prompt, lambda event, data, told=told: told.update({event: data})
            )
        assert result.status == "success", result.error
        shown = told["qwen_vram.cache"]  # the last of the two encode nodes
        assert shown["result"] == ("hit" if wanted == "hit" else "miss"), shown
        pictures.append(np.asarray(PIL.Image.open(io.BytesIO(result.images[0].content))))
    assert all(np.array_equal(pictures[0], picture) for picture in pictures[1:])
