"""Tiled edits: as the plain chain with one tile; exact where nothing is to change; any picture."""

from __future__ import annotations

import itertools
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.demo import embedded, figures
from pack.demo.animals import Scene
from pack.tests.examples import examples
from pack.tests.graphs import loader, node
from pack.tests.host import Host, Run, RunError
from pack.tests.nodes.test_fitting import queued
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
    wanted = {
        "image": ["picture", 0],
        "instruction": instruction,
        "negative": "",
        "vae": ["vae", 0],
    }
    wanted |= {"model": ["shift", 0], "clip": ["clip", 0], **sampled(), **tiles, **inputs}
    return {
        **models(),
        "picture": node("LoadImage", image=picture),
        "edit": node("QwenVRAMTiledEdit", **wanted),
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
@pytest.mark.parametrize(
    ("mode", "guide", "denoise"),
    [("together", "start of denoising", 1.0), ("one after another", "off", 0.6)],
)
def test_one_tile_is_the_plain_chain_bit_for_bit(host, mode, guide, denoise) -> None:
    """With a guide to start from, the one tile is what the guide would have been."""
    name = write(host, "one.png", (160, 128))
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
        links = {name: [name, 0] for name in objects}
        graph = edit("none", **{"cache": "off", **links, **inputs})
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
    host, hand_over, quick_vae
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
def test_outside_of_the_mask_every_pixel_is_the_original(host, hand_over, quick_vae, mode) -> None:
    """Sides that are no multiples of 32, two tiles of four touched, one of them by the edge."""
    picture, mask = cat(410, 280), boxed(280, 410, 150, 20, 260, 120)
    run = host.run(hand_over(picture, {"mask": mask}, mode=mode, skip_threshold=0, **SMALL))
    made = image(run)
    assert torch.equal(made[mask == 0], picture[mask == 0])
    assert (made[mask == 1] - picture[mask == 1]).abs().mean() > 1 / 255
    assert torch.equal(edited(run) > 0, mask > 0)
    assert "2 of 4 tiles keep their pixels: 2 by the mask" in report(run)


def only(monkeypatch, host: Host, *tiles: int) -> None:
    """Let a guide change these tiles alone, and all of them."""
    guide = part(host, "tile_guide").Guide
    monkeypatch.setattr(guide, "changed", lambda *_: frozenset(tiles))
    monkeypatch.setattr(guide, "region", lambda *_: None)


@pytest.mark.parametrize("mode", ["together", "one after another"])
def test_tiles_that_the_guide_leaves_alone_keep_their_pixels(
    host, hand_over, quick_vae, monkeypatch, mode
) -> None:
    only(monkeypatch, host, 1)
    picture = cat(400, 290)
    run = host.run(hand_over(picture, mode=mode, **SMALL))
    assert torch.equal(image(run)[edited(run) == 0], picture[edited(run) == 0])
    assert (edited(run) > 0).nonzero().amin(0).tolist() == [0, 0, 160]  # tile 2 begins there
    assert (edited(run) == 1)[:, :30, 260:].all() and not edited(run)[:, 256:].any()
    assert (image(run) - picture)[edited(run) == 1].abs().mean() > 1 / 255
    assert "3 of 4 tiles keep their pixels: 3 because" in report(run)
    assert run.status("edit")["pictures"][0]["edited_tiles"] == [2]


def test_where_nothing_is_changed_the_picture_is_handed_back(host, hand_over, quick_vae) -> None:
    picture = cat(300, 260)
    run = host.run(hand_over(picture, skip_threshold=255.0, **SMALL))
    assert torch.equal(image(run), picture) and not edited(run).any()
    assert "nothing edited: the guide changes at most" in run.status("edit")["text"]
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


@pytest.mark.parametrize("channels", [2, 5])
def test_pictures_of_other_channels_are_refused(host, hand_over, channels) -> None:
    with pytest.raises(RunError, match=f"image has {channels} channels; gray, RGB and RGBA"):
        host.run(hand_over(torch.ones(1, 40, 40, channels), **SMALL))


def test_a_model_without_reference_latents_is_refused(host) -> None:
    class Model:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="carries Linear, which is not Qwen-Image-Edit. Load"):
        part(host, "tile_sampling").require_edit_model(Model())


@pytest.mark.parametrize("kind", ["MageFlow", "Qwen-Image-Layered"])
def test_a_relative_of_qwen_image_edit_is_refused(host, kind) -> None:
    import comfy.model_base

    own = {"MageFlow": comfy.model_base.MageFlow}.get(kind, comfy.model_base.QwenImage)
    inner = own.__new__(own)
    torch.nn.Module.__init__(inner)
    inner.diffusion_model = torch.nn.Linear(1, 1)
    inner.diffusion_model.default_ref_method = "index" if kind == "MageFlow" else "negative_index"
    with pytest.raises(ValueError, match=f"carries {kind}, which is not"):
        part(host, "tile_sampling").require_edit_model(SimpleNamespace(model=inner))


def test_without_scikit_image_it_says_so_before_anything_is_sampled(
    host, hand_over, untouched, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    graph = hand_over(cat(400, 290), guide="off", **SMALL)
    with pytest.raises(RunError, match="pip install scikit-image"):
        host.run(graph)
    assert not untouched
    host.run(hand_over(cat(100, 90), guide="off", **SMALL))  # a single tile needs it not
    host.run(hand_over(cat(400, 290), guide="off", registration=False, **SMALL))


# --------------------------------------------------------------------------------- the store
def test_a_known_prompt_needs_no_text_encoder_and_a_known_picture_no_encoding(fresh) -> None:
    name = write(fresh, "stored.png", (96, 64))
    first = fresh.run(edit(name, guide="off", **SMALL))
    assert {"clip", "vae"} <= set(first.executed)
    fresh.restart()
    again = fresh.run(edit(name, guide="off", **SMALL))
    assert torch.equal(image(again), image(first))
    assert "clip" not in again.executed and "vae" in again.executed  # which decodes
    assert again.status("edit")["result"] == "hit"
    assert "conditioning: hit, disk · latents: hit, disk" in again.status("edit")["text"]
    other = fresh.run(edit(name, "make it blue", guide="off", **SMALL))
    line = other.status("edit")["text"]
    assert "conditioning: miss (new text)" in line and "latents: hit, memory" in line


def test_a_negative_is_encoded_unless_cfg_is_one(fresh) -> None:
    name = write(fresh, "negative.png", (64, 64))
    fresh.run(edit(name, guide="off", **SMALL))
    fresh.restart()
    blurry = edit(name, guide="off", **{**SMALL, "negative": "blurry"})
    assert "clip" not in fresh.run(blurry).executed
    blurry["edit"]["inputs"]["cfg"] = 2.0
    run = fresh.run(blurry)
    assert "clip" in run.executed and "conditioning: 1 of 2 hit" in run.status("edit")["text"]


# --------------------------------------------------------------------------------- the flow
class Sampled(NamedTuple):
    """What the sampler was given."""

    latent: torch.Tensor
    noise: torch.Tensor
    references: list[torch.Tensor]
    denoise: float
    mask: torch.Tensor | None
    model: Any
    by: Any  # the Sampling


@pytest.fixture
def untouched(host, quick_vae, monkeypatch) -> list[Sampled]:
    """A sampler that gives back the latent that it was given, and remembers the rest."""
    calls: list[Sampled] = []

    def run(self, latent, noise, references, *, denoise, mask, callback, model=None) -> Any:
        calls.append(Sampled(latent, noise, references, denoise, mask, model, self))
        return latent

    monkeypatch.setattr(part(host, "tile_sampling").Sampling, "run", run)
    return calls


EVERY = {"skip_threshold": 0.0, "registration": False, "colour_match": False}


def parts_of(latent: torch.Tensor, *starts: tuple[int, int]) -> list[torch.Tensor]:
    """Crops of 32 x 32 latent pixels."""
    return [latent[..., top : top + 32, left : left + 32] for top, left in starts]


@pytest.mark.parametrize("guide", ["start of denoising", "extra reference"])
def test_each_tile_gets_its_part_of_everything(host, hand_over, untouched, guide) -> None:
    """A guide and four tiles, one after another; then the whole, for the model to cut."""
    second = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    options = {"guide": guide, **EVERY, **SMALL}
    graph = hand_over(cat(400, 290), {"image2": second}, mode="one after another", **options)
    host.run(graph)
    first, *tiles = untouched
    assert first.denoise == 1.0 and first.noise.shape == (1, 16, 1, 40, 52)
    assert torch.equal(first.latent, first.references[0]) and len(first.references) == 2
    assert [t.denoise for t in tiles] == [0.6] * 4
    starts = (0, 0), (0, 20), (8, 0), (8, 20)
    for tile, noise in zip(tiles, parts_of(first.noise, *starts), strict=True):
        assert torch.equal(tile.noise, noise)
        original, *extra, other = tile.references
        assert original.shape[-2:] == (32, 32) and torch.equal(other, first.references[1])
        assert torch.equal(tile.latent, original) == (guide == "extra reference")
        assert len(extra) == (guide == "extra reference")
        near = extra[0] if extra else tile.latent  # the guide, twice through the VAE
        assert (near - original).abs().mean() < 0.2 * original.std()
    untouched.clear()
    graph["edit"]["inputs"]["mode"] = "together"
    host.run(graph)
    first, whole = untouched
    assert torch.equal(whole.noise, first.noise) and whole.model is not None
    assert [r.shape[-2:] for r in whole.references[:-1]] == [(40, 52)] * (1 + len(extra))
    assert torch.equal(whole.references[-1], other)


def test_a_mask_fixes_the_latent_around_it(host, hand_over, untouched) -> None:
    mask = boxed(290, 400, 100, 100, 101, 200)
    host.run(hand_over(cat(400, 290), {"mask": mask}, mode="together", **EVERY, **SMALL))
    guide, whole = untouched
    assert torch.equal(guide.mask, whole.mask) and whole.mask.shape == (1, 40, 52)
    assert whole.mask.nonzero().tolist() == [[0, 12, column] for column in range(12, 25)]
    fixed = whole.mask.expand_as(whole.latent) == 0
    assert torch.equal(whole.latent[fixed], whole.references[0][fixed])
    assert not torch.equal(whole.latent, whole.references[0])


def test_beyond_24_megapixels_the_vae_goes_tile_by_tile(
    host, hand_over, untouched, monkeypatch
) -> None:
    graph = hand_over(cat(400, 290), guide="off", **EVERY, **SMALL)
    at_once = image(host.run(graph))
    coding, pieces = part(host, "tile_coding"), []
    encode = coding.encode
    monkeypatch.setattr(coding, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(coding, "encode", lambda *g: pieces.append(g[1].shape) or encode(*g))
    graph["edit"]["inputs"]["seed"] = 4
    by_tiles = image(host.run(graph))
    assert untouched[1].references[0].shape == untouched[0].references[0].shape
    assert pieces == [(1, 256, 256, 3)] * 4
    assert (by_tiles - at_once).abs().mean() < 1 / 255


# --------------------------------------------------------------------------------- progress
class Shown(list):
    """What the frontend would get: steps done, steps, preview; the user interrupts at one."""

    interrupt_at = 0


@pytest.fixture
def shown(host, monkeypatch) -> Shown:
    """Progress as the server sends it."""
    import comfy.utils
    import latent_preview
    from comfy import model_management

    events = Shown()

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        model_management.throw_exception_if_processing_interrupted()
        events.append((value, total, preview))
        if len(events) == events.interrupt_at:
            model_management.interrupt_current_processing()

    method = latent_preview.LatentPreviewMethod.Latent2RGB
    monkeypatch.setattr(latent_preview, "default_preview_method", method)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    return events


@pytest.mark.parametrize("mode", ["together", "one after another"])
def test_one_bar_with_a_preview_of_the_whole_picture(
    host, hand_over, quick_vae, monkeypatch, shown, mode
) -> None:
    only(monkeypatch, host, 0, 3)
    host.run(hand_over(cat(400, 290), mode=mode, **{**SMALL, "steps": 2}))
    done = [value for value, *_ in shown]
    assert done == sorted(done) and shown[-1][:2] == (6, 6)  # of the guide 2, of two tiles 4
    previews = [preview[1] for *_, preview in shown if preview is not None]
    sizes = {preview.size for preview in previews}
    if mode == "together":
        assert len(previews) == 4 and sizes == {(52, 40)}  # a latent's pixels
        return
    assert len(previews) == 6 and sizes == {(52, 40), (400, 290)}
    first, last = (np.asarray(previews[i]).astype(int) for i in (3, -1))
    assert (first != last)[260:, 260:].any()  # the fourth tile
    assert (first == last)[:60, :150].all()  # the first one was done
    expected = (cat(400, 290)[0].numpy() * 255).astype(int)
    assert (last == expected)[270:, :150].all()  # the third is skipped


def test_an_interrupt_ends_it_at_once_and_the_next_run_is_whole(
    host, hand_over, quick_vae, shown
) -> None:
    graph = hand_over(cat(400, 290), mode="one after another", guide="off", **EVERY, **SMALL)
    shown.interrupt_at = 3
    with pytest.raises(RunError) as failure:
        host.run(graph)
    assert failure.value.details["node_id"] == "edit" and len(shown) == 3  # of four tiles
    shown.interrupt_at = 0
    broken = image(host.run(graph))
    again = host.run(graph)
    assert "edit" in again.executed and torch.equal(image(again), broken)


@pytest.mark.usefixtures("quick_vae")
def test_the_picture_s_metadata_say_what_was_done(host, hand_over, monkeypatch) -> None:
    only(monkeypatch, host, 3)
    graph = hand_over(cat(400, 290), **SMALL)
    graph["save"] = node("SaveImage", images=["edit", 0], filename_prefix="edited")
    (path,) = queued(host, graph, extra_pnginfo={"workflow": {"nodes": []}})
    (said,) = json.loads(Image.open(path).info["qwen_vram"])["edit"]["pictures"]
    assert said["edited_tiles"] == [4] and said["tiles"] == 4 and said["tile_px"] == [256, 256]
    assert said["guide_px"] == [416, 320] and said["moved_px"].keys() == {"4"}


# --------------------------------------------------------------------------------- geometry
SIDES = st.integers(1, 200)


@given(SIDES, SIDES, st.sampled_from([1, 3, 4]), st.randoms())
@settings(max_examples=examples(30))
def test_tiles_that_come_back_as_they_were_give_the_picture(
    host, height, width, channels, random
) -> None:
    """For any set of edited tiles; where none was, bit for bit."""
    canvas_of, grids = part(host, "tile_canvas"), part(host, "tile_editing")
    picture = torch.rand(1, height, width, channels)
    canvas = canvas_of.Canvas(picture)
    options = grids.Settings(0.6, "together", 64, 32, "off", 0.0, False, False, "hann")
    grid = options.grid(canvas)
    active = frozenset(i for i in range(len(grid)) if random.random() < 0.7)
    tiles = canvas_of.Tiles(grid, "hann", active)
    blend = canvas_of.Blend(canvas, tiles, None)
    for index in sorted(active, key=lambda _: random.random()):
        blend.add(index, canvas.crop(grid.tiles()[index]))
    made, edited = blend.finish()
    expected = picture if channels > 1 else picture.expand(-1, -1, -1, 3)
    assert torch.equal(made[edited == 0], expected[edited == 0])
    assert torch.allclose(made, expected, atol=1e-6) and 0 <= edited.min() <= edited.max() <= 1
    assert tiles.skipped() or (edited > 1 - 1e-6).all()


@given(st.integers(33, 300), st.integers(33, 300), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=examples(30))
def test_the_guide_lies_where_the_picture_has_it(host, height, width, down, right) -> None:
    """A ramp, reduced and enlarged again, is the ramp; but at the very edge, half a pixel of it."""
    guides = part(host, "tile_guide")
    ramp = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 2, width)
    picture = (ramp / 3)[None, :, :, None].expand(-1, -1, -1, 3)
    canvas = part(host, "tile_canvas").Canvas(picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guides, "PIXELS", 64 * 64)
        frame = guides.Frame.of(canvas)
    small = frame.scaled(canvas)
    assert small.shape[1:3] == (frame.size.height, frame.size.width)
    assert frame.size.width % 32 == frame.size.height % 32 == 0
    corrected = guides.Correction(0.0, 0.0, (0.0, 0.0, 0.0), "")
    guide = guides.Guide(frame, small, torch.zeros(small.shape[:3]), corrected)
    tile = part(host, "tile_canvas").Tile(down * 2, right * 2, 16, 16)
    near = guide.crop(tile) - canvas.crop(tile)
    edge = 0.5 / frame.size.height / 3 + 1 / frame.size.width / 3
    assert near.abs().max() <= edge + 1e-3
    target, unchanged = guide.target(tile, canvas.crop(tile))
    assert torch.allclose(target, canvas.crop(tile), atol=1e-4) and (unchanged > 0.999).all()


def test_a_correction_is_told_by_its_direction_and_without_a_negative_nothing(host) -> None:
    report, guides = part(host, "tile_report"), part(host, "tile_guide")
    made = guides.Correction(-0.26, 0.01, (-0.04, 0.6, -0.6), "")
    assert report._told(made) == "moved 0.26 px up, 0.01 px right; colour +0.0 +0.6 -0.6 of 255"
    assert report._label(made) == "-0.3 +0.0 px"
    assert report._label(made._replace(right=-0.01)) == "-0.3 +0.0 px"


def test_a_guide_names_the_tiles_that_it_changes_also_at_the_end_of_a_side(
    host, monkeypatch
) -> None:
    guides, canvas_of = part(host, "tile_guide"), part(host, "tile_canvas")
    monkeypatch.setattr(guides, "PIXELS", 256 * 256)
    canvas = canvas_of.Canvas(torch.zeros(1, 513, 609, 3))  # continued by 31 px each
    frame = guides.Frame.of(canvas)
    before = frame.scaled(canvas)
    after = before.clone()
    after[:, -12:, -12:] = 1
    off = {"register": False, "colour": False}
    guide = guides.Guide.compare(frame, before, before, after, **off)
    options = part(host, "tile_editing").Settings(
        0.6, "together", 128, 32, "off", 6.0, False, False, "hann"
    )
    grid = options.grid(canvas)
    assert guide.changed(grid, 6.0) == {len(grid) - 1}
    assert guide.changed(grid, 0.0) == set(range(len(grid)))
    target, unchanged = guide.target(grid.tiles()[-1], canvas.crop(grid.tiles()[-1]))
    assert (target[:, -40:, -40:] > 0.9).all() and (unchanged[:, -40:, -40:] == 0).all()
    assert not target[:, :50, :50].any() and (unchanged[:, :50, :50] > 0.999).all()


# --------------------------------------------------------------------------------- what else counts
def clone_of_the_model(host: Host) -> Any:
    """That of the last run."""
    return host.executor.caches.outputs.get_local("shift").outputs[0][0].clone()


def test_the_negative_is_the_sampler_s_also_with_cfg_1_where_a_patch_wants_it(
    host, hand_over, untouched
) -> None:
    inputs = {"guide": "off", **EVERY, **SMALL, "negative": "blurry"}
    host.run(hand_over(cat(64, 64), **{**inputs, "cfg": 2.0}))
    host.run(hand_over(cat(64, 64), **inputs))
    wants = clone_of_the_model(host)
    wants.set_model_sampler_post_cfg_function(
        lambda values: values["denoised"], disable_cfg1_optimization=True
    )
    host.run(hand_over(cat(64, 64), {"model": wants}, **inputs))
    both, one, wanted = (call.by for call in untouched)
    assert one.negative is one.positive
    for by in (both, wanted):
        assert not torch.equal(by.positive[0][0], by.negative[0][0])
        assert torch.equal(by.positive[0][0], one.positive[0][0])


@pytest.mark.parametrize(("guide", "cropped"), [("start of denoising", 1), ("extra reference", 2)])
def test_only_active_tiles_are_sampled_and_further_references_stay_whole(
    host, hand_over, untouched, monkeypatch, guide, cropped
) -> None:
    tilings: list[Any] = []
    editing = part(host, "tile_editing")
    patch = editing.patch
    monkeypatch.setattr(editing, "patch", lambda *given: tilings.append(given[1]) or patch(*given))
    only(monkeypatch, host, 1, 2)
    graph = hand_over(cat(400, 290), {"image2": cat(64, 64)}, guide=guide, **SMALL)
    host.run(graph)
    assert tilings[0].active == {1, 2}
    assert torch.equal(tilings[0].known, untouched[1].references[0])
    assert tilings[0].references == (*("crop along",) * cropped, "keep whole")


def test_weights_in_pinned_memory_stay_there_when_the_tiles_are_done(
    host, hand_over, untouched
) -> None:
    graph = hand_over(cat(400, 290), guide="off", **EVERY, **SMALL)
    host.run(graph)
    model = clone_of_the_model(host)
    model.pinned = {"a weight"}
    try:
        graph = hand_over(cat(400, 290), {"model": model}, guide="off", **EVERY, **SMALL)
        host.run(graph)
        assert untouched[-1].model.pinned == set() and model.pinned == {"a weight"}
    finally:
        model.pinned = set()


def test_the_pictures_of_a_batch_have_their_own_masks_and_one_place(
    host, hand_over, untouched, monkeypatch
) -> None:
    """In a file on the disk, where they are large."""
    node_of = part(host, "tiled_edit")
    places: list[torch.Tensor] = []
    new = node_of.new_picture
    monkeypatch.setattr(node_of, "new_picture", lambda s: places.append(new(s)) or places[-1])
    pair = torch.cat([cat(96, 64), cat(96, 64).flip(2)])
    masks = torch.cat([torch.zeros(1, 64, 96), torch.ones(1, 64, 96)])
    run = host.run(hand_over(pair, {"mask": masks}, guide="off", **EVERY, **SMALL))
    assert torch.equal(image(run)[0], pair[0]) and not edited(run)[0].any()
    assert not torch.equal(image(run)[1], pair[1]) and (edited(run)[1] == 1).all()
    assert [place.data_ptr() for place in places] == [image(run).data_ptr(), edited(run).data_ptr()]


def test_an_empty_mask_needs_no_model_of_the_prompt(host, hand_over, untouched) -> None:
    picture = torch.cat([cat(300, 260)] * 2)
    run = host.run(hand_over(picture, {"mask": torch.zeros(1, 260, 300)}, **SMALL))
    assert torch.equal(image(run), picture) and not untouched
    assert not {"clip", "vae"} & set(run.executed)
    assert "nothing edited: the mask is empty" in run.status("edit")["text"]


def test_a_latent_that_the_vae_made_in_tiles_is_not_stored(host, quick_vae, monkeypatch) -> None:
    coding = part(host, "tile_coding")
    picture = part(host, "pictures").Picture(1, cat(64, 64), (64, 64), "untouched")
    monkeypatch.setattr(coding, "why_stock_encodes", lambda *_: "")
    assert not coding._encode_whole(None, picture).tiled
    tiles = part(host, "vae_layers").Outcome("tiles", 4)
    monkeypatch.setattr(coding, "encode", lambda *_: (torch.zeros(1, 16, 1, 8, 8), tiles))
    assert coding._encode_whole(None, picture).tiled


def test_what_the_vae_cannot_keep_is_no_change(host) -> None:
    guides, canvas_of = part(host, "tile_guide"), part(host, "tile_canvas")
    picture = (torch.arange(128) // 2 % 2).float().expand(1, 128, 128)[..., None].repeat(1, 1, 1, 3)
    coded = torch.full_like(picture, 0.5)
    frame = guides.Frame.of(canvas_of.Canvas(picture))
    off = {"register": False, "colour": False}
    assert guides.Guide.compare(frame, picture, coded, coded, **off).change.max() < 0.5 / 255
    other = guides.Guide.compare(frame, picture, coded, picture, **off)
    assert other.change.max() > 6 / 255


def test_a_guide_that_is_enlarged_stays_a_picture(host, monkeypatch) -> None:
    """Cubic curves go beyond the values that they run through."""
    guides, canvas_of = part(host, "tile_guide"), part(host, "tile_canvas")
    monkeypatch.setattr(guides, "PIXELS", 64 * 64)
    canvas = canvas_of.Canvas(torch.zeros(1, 256, 256, 3))
    frame = guides.Frame.of(canvas)
    sharp = torch.zeros(1, 64, 64, 3)
    sharp[:, :, 32:] = 1
    off = {"register": False, "colour": False}
    guide = guides.Guide.compare(frame, sharp, sharp, sharp, **off)
    found = guide.crop(canvas.whole)
    assert found.shape == (1, 256, 256, 3) and found.min() == 0 and found.max() == 1


def test_what_was_looked_up_answers_the_same_inputs_only_and_keeps_no_picture(host) -> None:
    tiled = part(host, "tiled_edit")
    picture = torch.ones(1, 4, 4, 3)
    asked = tiled.Asked(picture, None, None, "make it red", "", False, "off")
    found = tiled.Found(asked.weak(), [])
    assert found.answers(asked)
    for other in (
        asked._replace(image=picture.clone()),
        asked._replace(image2=picture),
        asked._replace(image=None),
        asked._replace(instruction="make it blue"),
        asked._replace(both=True),
    ):
        assert not found.answers(other)
    left = found.asked[0]
    del picture, asked, other
    assert left() is None


def test_the_sampler_gets_the_seed(host, hand_over, quick_vae, monkeypatch) -> None:
    """Some samplers draw noise of their own."""
    import comfy.sample

    given: list[dict[str, Any]] = []

    def sample(model, noise, steps, cfg, name, scheduler, positive, negative, latent, **more):
        given.append(more)
        return latent

    monkeypatch.setattr(comfy.sample, "sample", sample)
    host.run(hand_over(cat(400, 290), seed=77, **EVERY, **SMALL))
    assert [more["seed"] for more in given] == [77, 77]


@pytest.mark.parametrize(
    ("guide", "what"), [("start of denoising", "The guide"), ("off", "Tile 1")]
)
def test_a_model_that_gives_nan_is_named(host, hand_over, quick_vae, monkeypatch, guide, what):
    def run(self, latent, *_: Any, **__: Any) -> torch.Tensor:
        return latent * float("nan")

    monkeypatch.setattr(part(host, "tile_sampling").Sampling, "run", run)
    with pytest.raises(RunError, match=f"{what} came out as NaN .* --bf16-unet"):
        host.run(hand_over(cat(400, 290), guide=guide, **EVERY, **SMALL))


def test_a_cache_of_steps_is_refused_before_anything_is_loaded(host, hand_over, untouched) -> None:
    graph = hand_over(cat(300, 64), **EVERY, **SMALL)
    host.run(graph)
    model = clone_of_the_model(host)
    untouched.clear()
    model.add_wrapper_with_key("diffusion_model", "easycache", lambda executor, *a: executor(*a))
    with pytest.raises(RunError, match="EasyCache keeps what the model computed") as failure:
        host.run(hand_over(cat(300, 64), {"model": model}, **EVERY, **SMALL))
    assert failure.value.details["node_id"] == "edit" and not untouched
    one_by_one = {"mode": "one after another", **EVERY, **SMALL}
    host.run(hand_over(cat(300, 64), {"model": model}, **one_by_one))
    host.run(hand_over(cat(256, 64), {"model": model}, **EVERY, **SMALL))  # a single tile


@pytest.mark.parametrize("mode", ["together", "one after another"])
def test_a_reference_cache_keeps_the_references_of_every_tile(host, quick_vae, mode) -> None:
    """Their crops are tiles' own; with every step in full nothing differs."""
    picture = write(host, "kept_references.png", (320, 64))
    own = {"tile_size": 256, "overlap": 64, "guide": "off", "denoise": 1.0, "cache": "off"}
    plain_edit = edit(picture, mode=mode, **own)
    expected = image(host.run(plain_edit))
    inputs = {
        "model": ["shift", 0],
        "refresh": "first step",
        "drift_threshold": 0.1,
        "full_last_steps": 0,
        "store_format": "model",
        "store_place": "auto",
        "causal": False,
        "region": False,
        "region_margin": 64,
        "region_threshold": 0.05,
    }
    own = {**plain_edit["edit"]["inputs"], "model": ["cache", 0]}
    for every in (1, 10):
        cache = node("QwenVRAMReferenceCache", **inputs, refresh_every=every)
        run = host.run({**plain_edit, "cache": cache, "edit": node("QwenVRAMTiledEdit", **own)})
        error = (image(run) - expected).square().mean()
        assert error == 0 if every == 1 else 0 < error < 0.02
    assert run.status("edit")["pictures"][0]["edited_tiles"] == [1, 2]
