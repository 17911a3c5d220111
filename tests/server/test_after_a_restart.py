"""The official templates, untouched: a new process encodes nothing, and the picture is the same."""

from __future__ import annotations

import io
import urllib.request
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
from pack.demo import embedded
from pack.demo.figures import drawn
from pack.demo.scenes import Scene
from pack.demo.server import Server
from pack.tests import official
from pack.tests.graphs import node
from pack.tests.redis_server import eventually
from pack.tests.server.restarts import start_again

TRANSFORMER, VAE = (PurePosixPath(name).name for name in (embedded.TRANSFORMER, embedded.VAE))
EDIT = "tiny_qwen_image_edit.safetensors"
TEMPLATES = ("image_qwen_Image_2512", "image_qwen_image_edit_2509", "image_qwen_image_edit_2511")
SMALL = {"upscale_method": "area", "width": 256, "height": 256, "crop": "disabled"}
SPARED = {"CLIPLoader", "CLIPTextEncode", "TextEncodeQwenImageEditPlus", "VAEEncode", "LoadImage"}


def graphs(server: Server) -> dict[str, dict[str, Any]]:
    """The templates; their pictures are drawn. One small step: the sampler is not what is tested.

    With a CFG above 1: the negative prompt would not count otherwise. And with small models where
    pictures are edited, which the templates enlarge to a megapixel.
    """
    found, info = {}, server.get_json("/object_info")
    for name in TEMPLATES:
        graph = found[name] = official.template(name, info)
        if "edit" in name:
            official.rename(graph, {TRANSFORMER: EDIT, VAE: official.NARROW_VAE})
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


class Run(NamedTuple):
    """The picture, the classes of the nodes that ran, and what the badges of the others say."""

    picture: np.ndarray
    ran: set[str]
    badges: set[tuple[str, str | None]]


def run(server: Server, graph: dict[str, Any]) -> Run:
    """Draw."""
    told: list[dict[str, Any]] = []
    result = server.submit(graph, lambda e, data: told.append(data) if "qwen_vram" in e else None)
    assert result.status == "success", result.error
    picture = np.asarray(PIL.Image.open(io.BytesIO(result.images[0].content)))
    ran = {graph[node]["class_type"] for node in result.executed}
    return Run(picture, ran, {(fact["result"], fact.get("tier")) for fact in told})


@pytest.fixture(scope="module")
def first(server: Server) -> dict[str, Run]:
    """Every template in a process that knows nothing of it: other tests may have drawn it."""
    forget = urllib.request.Request(
        f"{server.url}/qwen_vram/conditioning?everything=true", method="DELETE"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(forget) as answer:
        assert answer.status == 200
    server.post_json("/qwen_vram/clear", {"level": "everything"})
    return {name: run(server, graph) for name, graph in graphs(server).items()}


@pytest.fixture(scope="module")
def second(server: Server, first: dict[str, Run]) -> Server:
    """A new process, after the one before has written what it had to write."""

    def written() -> bool:
        told = server.get_json("/qwen_vram/conditioning")
        return told["disk"]["entries"] == told["memory"]["entries"]

    assert eventually(written)
    before = server.pid
    start_again(server)
    assert server.pid != before
    return server


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_encoded_again_and_the_picture_is_the_same(first, second, name) -> None:
    assert first[name].ran & {"CLIPTextEncode", "TextEncodeQwenImageEditPlus"}
    assert first[name].badges == {("miss", None)}
    again = run(second, graphs(second)[name])
    assert not again.ran & SPARED and "KSampler" in again.ran
    assert again.badges == {("hit", "disk")}
    assert np.array_equal(again.picture, first[name].picture) and again.picture.std() > 1
