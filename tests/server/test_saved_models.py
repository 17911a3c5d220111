"""Files that Save Quantized Model writes are listed after R, and ComfyUI's own loaders draw alike."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from pack.tests.graphs import embedded_text_to_image, keeping_nothing, node
from pack.tests.official import STOCK_TEXT_ENCODER
from safetensors.torch import load_file, save_file

HEADS = {"qwen_vram": '{"vision_heads": 1}'}


def pixels(png: bytes) -> np.ndarray:
    """The decoded picture."""
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def text_encoder(server) -> str:
    """A file that stock can open, for it holds the vocabulary, and ours, for it says its heads."""
    folder, name = server.base / "models" / "text_encoders", "animals_for_both.safetensors"
    save_file(load_file(folder / STOCK_TEXT_ENCODER), folder / name, HEADS)
    return name


def test_stock_loaders_draw_the_same_picture_from_the_files(server, text_encoder) -> None:
    graph = keeping_nothing(embedded_text_to_image("a red bunny", width=128, height=128))
    graph["sampler"]["inputs"]["steps"] = 2
    graph["unet"]["inputs"]["weight_dtype"] = "int4"  # modulation in int8
    graph["clip"]["inputs"].update(clip_name=text_encoder, weight_dtype="int8")
    graph["write"] = node(
        "QwenVRAMSaveQuantized",
        model=["unet", 0],
        clip=["clip", 0],
        filename_prefix="stock/animals",
    )
    ours = server.submit(graph)
    assert ours.status == "success", ours.error
    name = "stock/animals_00001_.safetensors"
    listed = server.get_json("/object_info")
    for loader, key in (("QwenVRAMLoadDiffusionModel", "unet_name"), ("UNETLoader", "unet_name")):
        assert name in str(listed[loader]["input"]["required"][key])
    del graph["write"]
    graph["unet"] = node("UNETLoader", unet_name=name, weight_dtype="default")
    graph["clip"] = node("CLIPLoader", clip_name=name, type="qwen_image", device="default")
    for name in ("positive", "negative"):
        text = graph[name]["inputs"]["text"]
        graph[name] = node("CLIPTextEncode", clip=["clip", 0], text=text)
    stock = server.submit(keeping_nothing(graph))
    assert stock.status == "success", stock.error
    ours, stock = (pixels(done.images[0].content) for done in (ours, stock))
    assert ours.std() > 1 and np.array_equal(ours, stock)
