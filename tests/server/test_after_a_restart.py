"""The official templates, untouched: a new process encodes nothing, and the picture is the same."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pack.demo.figures import drawn
from pack.demo.scenes import Scene
from pack.demo.server import Server
from pack.tests import official
from pack.tests.conftest import ROOT
from pack.tests.graphs import node

TEMPLATES = ("image_qwen_Image_2512", "image_qwen_image_edit_2509", "image_qwen_image_edit_2511")
SMALL = {"upscale_method": "area", "width": 256, "height": 256, "crop": "disabled"}
SPARED = {"CLIPLoader", "CLIPTextEncode", "TextEncodeQwenImageEditPlus", "VAEEncode", "LoadImage"}


@pytest.fixture(scope="module")
def base(make_base: Callable[[str], Path]) -> Path:
    """A ComfyUI base directory with the embedded model, known to the stock loaders."""
    return make_base("restart")


def start(comfyui: Path, base: Path) -> Server:
    """A new process."""
    return Server(comfyui, base, ROOT, cpu=True, extra_args=["--use-pytorch-cross-attention"])


def graphs(server: Server) -> dict[str, dict[str, Any]]:
    """The templates; their pictures are drawn. One small step: the sampler is not what is tested.

    With a CFG above 1: the negative prompt would not count otherwise.
    """
    (server.base / "input").mkdir(exist_ok=True)
    found = {}
    for name in TEMPLATES:
        graph = found[name] = official.template(name, server.get_json("/object_info"))
        for item in list(graph.values()):
            if item["class_type"] == "KSampler":
                small = graph["small"] = node(
                    "LatentUpscale", samples=item["inputs"]["latent_image"]
                )
                small["inputs"] |= SMALL
                item["inputs"].update(steps=1, cfg=2.0, latent_image=["small", 0])
            path = server.base / "input" / str(item["inputs"].get("image"))
            if item["class_type"] == "LoadImage" and not path.exists():
                scene = Scene("pig", "pink", background="snow", jitter=5)
                PIL.Image.fromarray(drawn(scene)).save(path)
    return found


def run(server: Server, graph: dict[str, Any]) -> tuple[np.ndarray, set[str]]:
    """The picture, and the classes of the nodes that were executed."""
    result = server.submit(graph)
    assert result.status == "success", result.error
    picture = np.asarray(PIL.Image.open(io.BytesIO(result.images[0].content)))
    return picture, {graph[node]["class_type"] for node in result.executed}


@pytest.fixture(scope="module")
def first(comfyui: Path, base: Path) -> dict[str, tuple[np.ndarray, set[str]]]:
    """Every template in a process that knows nothing."""
    with start(comfyui, base) as server:
        return {name: run(server, graph) for name, graph in graphs(server).items()}


@pytest.fixture(scope="module")
def second(comfyui: Path, base: Path, first) -> Iterator[Server]:
    """A new process."""
    with start(comfyui, base) as server:
        yield server


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_encoded_again_and_the_picture_is_the_same(first, second, name) -> None:
    picture, ran = first[name]
    assert ran & {"CLIPTextEncode", "TextEncodeQwenImageEditPlus"}
    again, ran = run(second, graphs(second)[name])
    assert not ran & SPARED and "KSampler" in ran
    assert np.array_equal(again, picture) and picture.std() > 1
