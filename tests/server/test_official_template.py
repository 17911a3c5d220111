"""The official 2512 template: ours in place of its loaders and encoders gives the same picture.

Both draw with the embedded model; stock knows its narrow sizes from tests/teach_stock, and gets the
text encoder with the vocabulary written out, which ours computes.
"""

from __future__ import annotations

import copy
import io
from pathlib import PurePosixPath
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from pack.demo.embedded import TEXT_ENCODER
from pack.demo.substitutions import NUMBERS
from pack.tests import official
from pack.tests.graphs import keeping_nothing

OURS = {
    "UNETLoader": ("QwenVRAMLoadDiffusionModel", {"device": "default", "keep_loaded": False}),
    "CLIPLoader": (
        "QwenVRAMLoadTextEncoder",
        {"weight_dtype": "default", "device": "default", "keep_loaded": False},
    ),
    "VAELoader": (
        "QwenVRAMLoadVAE",
        {"weight_dtype": "default", "device": "default", "keep_loaded": False},
    ),
    "CLIPTextEncode": ("QwenVRAMCachedTextEncode", {"cache": "memory and disk"}),
}


def pixels(png: bytes) -> np.ndarray:
    """The decoded picture: metadata may differ, pixels may not."""
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def template(server) -> dict[str, Any]:
    """The untouched template for 2512, in few steps."""
    with mock.patch.dict(NUMBERS, steps=3):
        return official.template("image_qwen_Image_2512", server.get_json("/object_info"))


def with_ours(graph: dict[str, Any]) -> dict[str, Any]:
    """Replace the stock loaders and encoders, and nothing else."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["class_type"] in OURS:
            node["class_type"], extra = OURS[node["class_type"]]
            node["inputs"].pop("type", None)
            if "clip_name" in node["inputs"]:
                node["inputs"]["clip_name"] = PurePosixPath(TEXT_ENCODER).name
            node["inputs"].update(extra)
    return graph


def test_the_picture_is_bit_identical_to_stock_and_the_lora_switch_changes_it(
    server, template
) -> None:
    pictures = []
    for lightning in (False, True):
        graph = copy.deepcopy(template)
        (switch,) = [n for n in graph.values() if n["class_type"] == "PrimitiveBoolean"]
        switch["inputs"]["value"] = lightning
        stock = server.submit(keeping_nothing(graph))
        assert stock.status == "success", stock.error
        ours = server.submit(with_ours(graph))
        assert ours.status == "success", ours.error
        classes = {with_ours(graph)[n]["class_type"] for n in ours.executed}
        assert {"QwenVRAMLoadDiffusionModel", "QwenVRAMLoadVAE"} <= classes
        assert np.array_equal(pixels(stock.images[0].content), pixels(ours.images[0].content))
        pictures.append(pixels(ours.images[0].content))
        assert pictures[-1].std() > 1  # a picture, not a blank
    assert not np.array_equal(*pictures)


def test_a_controlnet_works_as_behind_stock_loaders(server, template) -> None:
    graph = copy.deepcopy(template)
    (sampler,) = [n for n in graph.values() if n["class_type"] == "KSampler"]
    (vae,) = [i for i, n in graph.items() if n["class_type"] == "VAELoader"]
    graph["net"] = {"class_type": "TestTinyControlNet", "inputs": {}}
    graph["hint"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 256, "height": 256, "batch_size": 1, "color": 0x20C040},
    }
    inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "control_net": ["net", 0]}
    inputs.update(image=["hint", 0], vae=[vae, 0])
    inputs.update({k: sampler["inputs"][k] for k in ("positive", "negative")})
    graph["apply"] = {"class_type": "ControlNetApplyAdvanced", "inputs": inputs}
    sampler["inputs"].update(positive=["apply", 0], negative=["apply", 1])
    plain, stock, ours = (
        server.submit(g) for g in (template, keeping_nothing(graph), with_ours(graph))
    )
    assert stock.status == ours.status == "success", stock.error + ours.error
    plain, stock, ours = (pixels(r.images[0].content) for r in (plain, stock, ours))
    assert np.array_equal(stock, ours)
    assert not np.array_equal(stock, plain)
