"""Tiled edits: as the plain chain with one tile; exact where nothing is to change; any picture."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pack.demo import embedded, figures
from pack.demo.animals import Scene
from pack.tests.graphs import loader, node
from pack.tests.host import Host, Run, RunError
from PIL import Image

CAT = Scene("cat", "orange", background="meadow", jitter=3)
_numbers = itertools.count()
SMALL = {"steps": 1, "cfg": 1.0, "tile_size": 256, "overlap": 64}  # the least that is accepted


def models() -> dict[str, Any]:
    """The embedded model's loaders."""
    files = {
        "DiffusionModel": embedded.TRANSFORMER,
        "TextEncoder": embedded.TEXT_ENCODER,
        "VAE": embedded.VAE,
    }
    names = zip(("unet", "clip", "vae"), files.items(), strict=True)
    loaded = {name: loader(kind, path.rpartition("/")[2]) for name, (kind, path) in names}
    return {**loaded, "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1)}


def sampled(**values: Any) -> dict[str, Any]:
    """The inputs that a KSampler and Tiled Edit share."""
    common = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return {**common, **values}


def edit(picture: str, instruction: str = "make it red", **inputs: Any) -> dict[str, Any]:
    """A graph that edits a file of ComfyUI's input folder."""
    tiles = {
        "denoise": 0.6,
        "mode": "together",
        "tile_size": 256,
        "overlap": 64,
        "guide": "start of denoising",
        "skip_threshold": 6.0,
        "registration": True,
        "colour_match": True,
        "window": "hann",
        "cache": "memory and disk",
    }
    given = {"image": ["picture", 0], "instruction": instruction, "negative": "", "vae": ["vae", 0]}
    given |= {"model": ["shift", 0], "clip": ["clip", 0], **sampled(), **tiles, **inputs}
    return {
        **models(),
        "picture": node("LoadImage", image=picture),
        "edit": node("QwenVRAMTiledEdit", **given),
        "out": node("PreviewAny", source=["edit", 3]),
    }


def plain(picture: str, denoise: float) -> dict[str, Any]:
    """The same edit without tiles, by nodes of this pack and ComfyUI's KSampler."""
    encode = {"clip": ["clip", 0], "text": "make it red", "image1": ["picture", 0]}
    sizes = {"reference_size": "own size", "width": 64, "height": 64, "cache": "off"}
    return {
        **models(),
        "picture": node("LoadImage", image=picture),
        "e": node("QwenVRAMCachedImageEditEncode", vae=["vae", 0], **encode, **sizes),
        "latent": node("QwenVRAMEncode", pixels=["picture", 0], vae=["vae", 0], vram_limit=0.0),
        "sampler": node(
            "KSampler",
            model=["shift", 0],
            positive=["e", 0],
            negative=["e", 0],
            latent_image=["latent", 0],
            **sampled(denoise=denoise),
        ),
        "decode": node("QwenVRAMDecode", samples=["sampler", 0], vae=["vae", 0], vram_limit=0.0),
        "out": node("PreviewImage", images=["decode", 0]),
    }


def write(host: Host, name: str, size: tuple[int, int], mode: str = "RGB") -> str:
    """The cat in a file, of this width and height."""
    picture = Image.fromarray(figures.drawn(CAT)).resize(size, Image.Resampling.LANCZOS)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(size))
    if mode == "I;16":
        wide = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        picture = Image.fromarray(wide)
    picture.save(host.base / "input" / name)
    return name


def image(run: Run) -> torch.Tensor:
    """The result."""
    return run.outputs["edit"][0][0]


def edited(run: Run) -> torch.Tensor:
    """Where it may differ."""
    return run.outputs["edit"][1][0]


def original(run: Run) -> torch.Tensor:
    """What was loaded."""
    return run.outputs["picture"][0][0]


def report(run: Run) -> str:
    """The last output."""
    return run.outputs["edit"][3][0]


def part(host: Host, name: str) -> ModuleType:
    """A module of nodes/ of the loaded pack."""
    return host.part(f"nodes.{name}")


# --------------------------------------------------------------------------------- one tile
@pytest.mark.parametrize("mode", ["together", "one after another"])
@pytest.mark.parametrize(("guide", "denoise"), [("start of denoising", 1.0), ("off", 0.6)])
def test_one_tile_is_the_plain_chain_bit_for_bit(host, mode, guide, denoise) -> None:
    """With a guide to start from, the one tile is what the guide would have been."""
    name = write(host, "one.png", (256, 224))
    made = image(host.run(edit(name, mode=mode, guide=guide)))
    expected = host.run(plain(name, denoise)).outputs["decode"][0][0]
    assert torch.equal(made, expected)


# --------------------------------------------------------------------------------- any picture
@pytest.fixture
def hand_over(host, monkeypatch):
    """Make a graph whose picture, and inputs by name, are objects of the test.

    A list of pictures is handed on as ComfyUI's lists are, one after another.
    """

    def giving(value: Any) -> dict[str, Any]:
        class Given:
            RETURN_TYPES = ("*",)
            OUTPUT_IS_LIST = (isinstance(value, list),)
            FUNCTION = "run"
            CATEGORY = "test"

            @classmethod
            def INPUT_TYPES(cls) -> dict[str, Any]:
                return {"required": {}}

            @classmethod
            def IS_CHANGED(cls) -> float:
                return float("nan")

            def run(self) -> tuple[Any]:
                return (value,)

        name = f"TestGiven{next(_numbers)}"  # ComfyUI takes no node for another one
        monkeypatch.setitem(host.nodes.NODE_CLASS_MAPPINGS, name, Given)
        return node(name)

    def make(picture: Any, objects: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
        objects = objects or {}
        graph = edit("none", **inputs, **{name: [name, 0] for name in objects})
        graph["picture"] = giving(picture)
        return {**graph, **{name: giving(value) for name, value in objects.items()}}

    return make


def cat(width: int, height: int) -> torch.Tensor:
    """(1, height, width, 3), in the values that a file can hold."""
    picture = Image.fromarray(figures.drawn(CAT)).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


@pytest.mark.parametrize(("size", "channels"), [((1, 1), 3), ((17, 600), 3), ((90, 70), 1)])
def test_any_picture_comes_back_in_its_own_size(host, hand_over, size, channels) -> None:
    picture = cat(*size)[..., :channels]
    run = host.run(hand_over(picture, guide="off", **SMALL))
    assert image(run).shape == (1, size[1], size[0], 3)
    assert edited(run).shape == (1, size[1], size[0])
    assert image(run).isfinite().all() and image(run).min() >= 0 and image(run).max() <= 1
    assert (image(run) - picture).abs().mean() > 1 / 255


def test_a_file_of_16_bits_is_edited(host) -> None:
    """ComfyUI itself reads it, in full depth."""
    run = host.run(edit(write(host, "deep.png", (64, 90), "I;16"), guide="off", **SMALL))
    assert image(run).shape == (1, 90, 64, 3)


def test_the_alpha_channel_stays_as_it_is(host, hand_over) -> None:
    alpha = torch.rand(1, 70, 100, 1, generator=torch.Generator().manual_seed(1))
    picture = torch.cat([cat(100, 70), alpha], -1)
    made = image(host.run(hand_over(picture, guide="off", **SMALL)))
    assert torch.equal(made[..., 3:], alpha) and not torch.equal(made[..., :3], picture[..., :3])


def test_pictures_of_a_batch_go_one_by_one_and_those_of_a_list_have_their_own_sizes(
    host, hand_over
) -> None:
    sizes = [(64, 96), (96, 64), (33, 65)]
    alone = [image(host.run(hand_over(cat(*s), guide="off", **SMALL))) for s in sizes]
    run = host.run(hand_over([cat(*s) for s in sizes], guide="off", **SMALL))
    made = run.outputs["edit"][0]
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))
    pair = torch.cat([cat(64, 96), cat(64, 96).flip(2)])
    run = host.run(hand_over(pair, guide="off", **SMALL))
    assert torch.equal(image(run)[:1], alone[0]) and len(image(run)) == 2 == len(edited(run))
    assert "Picture 2: 64x96 px" in report(run) and len(run.outputs["edit"][2][0]) == 2


# --------------------------------------------------------------------------------- what stays
def boxed(height: int, width: int, *box: int) -> torch.Tensor:
    """A mask (1, height, width) that is white from top, left to bottom, right."""
    mask = torch.zeros(1, height, width)
    mask[:, box[0] : box[2], box[1] : box[3]] = 1
    return mask


@pytest.mark.parametrize("mode", ["together", "one after another"])
def test_outside_of_the_mask_every_pixel_is_the_original(host, hand_over, mode) -> None:
    """Sides that are no multiples of 32, two tiles of four touched, one of them by the edge."""
    picture, mask = cat(410, 280), boxed(280, 410, 150, 20, 260, 120)
    run = host.run(hand_over(picture, {"mask": mask}, mode=mode, skip_threshold=0, **SMALL))
    made = image(run)
    assert torch.equal(made[mask == 0], picture[mask == 0])
    assert (made[mask == 1] - picture[mask == 1]).abs().mean() > 1 / 255
    assert torch.equal(edited(run) > 0, mask > 0)
    assert "2 of 4 tiles keep their pixels: 2 by the mask" in report(run)


def only(monkeypatch, host: Host, *tiles: int) -> None:
    """Let a guide change these tiles alone."""
    found = lambda *_: frozenset(tiles)  # noqa: E731
    monkeypatch.setattr(part(host, "tile_guide").Guide, "changed", found)


@pytest.mark.parametrize("mode", ["together", "one after another"])
def test_tiles_that_the_guide_leaves_alone_keep_their_pixels(
    host, hand_over, monkeypatch, mode
) -> None:
    only(monkeypatch, host, 1)
    picture = cat(400, 290)
    run = host.run(hand_over(picture, mode=mode, **SMALL))
    assert torch.equal(image(run)[edited(run) == 0], picture[edited(run) == 0])
    assert (edited(run) > 0).nonzero().amin(0).tolist() == [0, 0, 160]  # tile 2 begins there
    assert (edited(run) == 1)[:, :30, 260:].all() and not edited(run)[:, 256:].any()
    assert (image(run) - picture)[edited(run) == 1].abs().mean() > 1 / 255
    assert "3 of 4 tiles keep their pixels: 0 by the mask, 3 because" in report(run)
    assert run.status("edit")["pictures"][0]["edited_tiles"] == [2]


def test_where_nothing_is_changed_the_picture_is_handed_back(host, hand_over) -> None:
    picture = cat(300, 260)
    run = host.run(hand_over(picture, skip_threshold=255.0, **SMALL))
    assert torch.equal(image(run), picture) and not edited(run).any()
    assert "nothing edited: the guide changes no tile" in run.status("edit")["text"]
    run = host.run(hand_over(picture, {"mask": torch.zeros(1, 64, 64)}, **SMALL))
    assert torch.equal(image(run), picture) and not edited(run).any()
    line = run.status("edit")["text"]
    assert "nothing edited: the mask is empty" in line and "mask resized to the picture" in line


# --------------------------------------------------------------------------------- refusals
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "overlap": ({"overlap": 512}, {}, "An overlap of 512 px leaves nothing of a tile of 256 px"),
    "tile": ({"tile_size": 300}, {}, "tile_size is 300 px, which is no multiple of 32. Choose 288"),
    "no vae": ({}, {"vae": None}, "The vae input carries no VAE"),
    "other vae": ({}, {"vae": "a VAE"}, "The vae input carries str, which is not the VAE of"),
    "no clip": ({"instruction": "new"}, {"clip": None}, "carries no text encoder"),
    "masks": ({}, {"mask": torch.ones(2, 64, 64)}, "2 masks do not go with 1 pictures"),
    "empty mask": ({}, {"mask": torch.ones(1, 0, 64)}, "The mask input carries no mask"),
    "pictures": ({}, {"image2": torch.ones(10, 32, 32, 3)}, "11 pictures are connected, 10 are"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_edited_is_refused_with_a_sentence(host, hand_over, what) -> None:
    inputs, objects, sentence = REFUSED[what]
    graph = hand_over(cat(64, 64), objects, **{**SMALL, **inputs})
    with pytest.raises(RunError, match=sentence):
        host.run(graph)


def test_a_missing_library_is_told_before_anything_is_sampled(host, hand_over, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    monkeypatch.setattr(part(host, "tile_sampling").Sampling, "run", None)
    with pytest.raises(RunError, match="pip install scikit-image"):
        host.run(hand_over(cat(300, 300), **SMALL))


@pytest.mark.parametrize("channels", [2, 5])
def test_pictures_of_other_channels_are_refused(host, hand_over, channels) -> None:
    with pytest.raises(RunError, match=f"image has {channels} channels; gray, RGB and RGBA"):
        host.run(hand_over(torch.ones(1, 40, 40, channels), **SMALL))


def test_a_model_without_reference_latents_is_refused(host) -> None:
    class Model:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="carries Linear, which is not Qwen-Image-Edit. Load"):
        part(host, "tile_sampling").require_edit_model(Model())
