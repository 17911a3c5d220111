"""Samplers that work in tiles: what the model sees of everything, and what comes out."""

from __future__ import annotations

import gc
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pack.tests.examples import examples
from pack.tests.graphs import LORA, UNET, VAE, node, text_to_image
from pack.tests.host import Host, RunError
from pack.tests.nodes.slicing_models import SIDES, conditioning, random, sample
from torch import Tensor

TILE = 128  # pixels: 16 latent pixels
LIMIT = "qwen_vram.vram_limit"  # nodes/vram_limit.py
Predict = Callable[..., Tensor]


def part_of(tiled: ModuleType, name: str) -> ModuleType:
    """A module beside that of the node."""
    return importlib.import_module(tiled.__name__.replace("tiled_diffusion", name))


@pytest.fixture(scope="module")
def tiled(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.tiled_diffusion")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


# ------------------------------------------------------------------- a model without attention
def by_position(
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """A prediction that at each position depends on what is there alone, and on the text."""
    out = x * 0.7 + t.reshape(-1, *[1] * (x.ndim - 1)) * 0.1
    out = out + c_crossattn.mean((1, 2)).reshape(-1, *[1] * (x.ndim - 1))
    if c_concat is not None:
        out = out + 0.3 * c_concat[:, :16]
    for reference in more.get("ref_latents") or ():
        out = out + 0.2 * reference
    for one in more.get("maps") or ():
        out = out + (0.3 * one if one.ndim == x.ndim else one.mean())
    for hint in (control or {}).get("input", ()):
        out = out + 0.1 * hint
    return out


def predicting(model: Any, predict: Predict = by_position) -> tuple[Any, list[dict[str, Any]]]:
    """A clone whose forward passes are this function, and what they were given."""
    clone, calls = model.clone(), []

    def wrapper(executor: Any, x: Tensor, t: Tensor, *args: Any, **more: Any) -> Tensor:
        names = ("c_concat", "c_crossattn", "control", "transformer_options")
        given = {**dict(zip(names, args, strict=False)), **more}
        calls.append({"x": x.clone(), "t": t, **given})
        return predict(x, t, **given)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    return clone, calls


def places(calls: list[dict[str, Any]], whole: Tensor) -> list[tuple[int, int]]:
    """Where in the first step's input each call's picture was."""
    found = []
    for call in calls:
        height, width = call["x"].shape[-2:]
        windows = whole.unfold(-2, height, 1).unfold(-2, width, 1)
        same = (windows == call["x"][:, :, :, None, None]).all(-1).all(-1)[0, :, 0].all(0)
        found.append(tuple(same.nonzero()[0].tolist()))
    return found


class Hint:
    """Makes a ControlNet of ComfyUI's kind that gives its hint, and counts how often it is made."""

    def __new__(cls, picture: Tensor, strength: float = 1.0) -> Any:
        import comfy.controlnet
        import comfy.utils

        class Fake(comfy.controlnet.ControlBase):
            made: list[tuple[int, ...]] = []

            def get_control(self, x: Tensor, *_: Any) -> dict[str, Any]:
                previous = self.previous_controlnet
                before = previous.get_control(x, *_)["input"] if previous else []
                if self.cond_hint is None:
                    size = x.shape[-1] * 8, x.shape[-2] * 8
                    method = self.upscale_algorithm
                    scaled = comfy.utils.common_upscale(
                        self.cond_hint_original, *size, method, "center"
                    )
                    self.cond_hint = scaled[:, :1, 4::8, 4::8].unsqueeze(2)
                    self.made.append(tuple(self.cond_hint.shape[-2:]))
                return {"input": [*before, self.cond_hint * self.strength]}

        return Fake().set_cond_hint(picture, strength)


def area(*sides: int, **more: Any) -> dict[str, Any]:
    """As Conditioning (Set Area) does."""
    return {"area": sides, "strength": 1.0, **more}


def mask(*box: int) -> Tensor:
    """Of the picture's pixels, soft, 1 in the box."""
    found = torch.zeros(1, SIDES[0] * 8, SIDES[1] * 8)
    top, left, height, width = box
    found[:, top : top + height, left : left + width] = torch.linspace(0.2, 1, width)
    return found


def inpainting() -> dict[str, Any]:
    """What models for inpainting have beside x."""
    import comfy.conds

    concat = comfy.conds.CONDNoiseShape(random(1, 17, 1, *SIDES, seed=4))
    return {"model_conds": {"c_concat": concat}}


def maps() -> dict[str, Any]:
    """A list of inputs, as some models have, of which only one lies on the picture."""
    import comfy.conds

    values = [random(1, 16, 1, *SIDES, seed=4), random(1, 3, seed=5)]
    return {"model_conds": {"maps": comfy.conds.CONDList(values)}}


def chained() -> Any:
    """A ControlNet behind another, with hints that are larger, smaller and of another shape."""
    first = Hint(random(1, 3, 640, 576, seed=3))
    return Hint(random(1, 3, 200, 100, seed=2), 0.5).set_previous_controlnet(first)


SAME = random(1, 16, 1, *SIDES, seed=11)
WITH: dict[str, Callable[[], tuple[list[Any], list[Any]]]] = {
    "texts of different lengths": lambda: (conditioning(13), conditioning(7, seed=8)),
    "a reference": lambda: (conditioning(reference_latents=[SAME]), conditioning(seed=8)),
    "inpainting": lambda: (conditioning(**inpainting()), conditioning(seed=8, **inpainting())),
    "inputs in a list": lambda: (conditioning(**maps()), conditioning(seed=8, **maps())),
    "areas": lambda: (
        [
            *conditioning(mask_strength=0.3, **area(17, 30, 3, 5)),
            *conditioning(seed=9, **area(9, 9, 31, 27)),
            *conditioning(seed=10, **area(40, 12, 0, 20, strength=0.3)),
        ],
        conditioning(seed=8),
    ),
    "masks": lambda: (
        [
            *conditioning(mask=mask(0, 0, 200, 160), mask_strength=0.8),
            *conditioning(seed=9, mask=mask(100, 90, 220, 198)),
        ],
        conditioning(seed=8),
    ),
    "a default with a mask": lambda: (
        [
            *conditioning(mask=mask(0, 0, 200, 160)),
            *conditioning(seed=9, default=True, mask=mask(200, 100, 40, 40)),
        ],
        conditioning(seed=8),
    ),
    "a mask in an area": lambda: (
        [
            *conditioning(mask=mask(0, 0, 200, 160), **area(25, 25, 2, 2)),
            *conditioning(seed=9, strength=0.5),
        ],
        conditioning(seed=8),
    ),
    "a range of timesteps": lambda: (
        [
            *conditioning(start_percent=0.0, end_percent=0.4),
            *conditioning(seed=9, start_percent=0.3, end_percent=1.0),
        ],
        conditioning(seed=8),
    ),
    "ControlNets": lambda: (
        conditioning(control=chained(), control_apply_to_uncond=True),
        conditioning(seed=8),
    ),
    "a ControlNet in an area": lambda: (
        [
            *conditioning(control=Hint(random(1, 3, 320, 288)), **area(24, 30, 9, 3)),
            *conditioning(seed=9),
        ],
        conditioning(seed=8),
    ),
}


@pytest.mark.parametrize("what", WITH)
def test_a_model_without_attention_predicts_the_same_in_tiles(tiled, model, what: str) -> None:
    clone, calls = predicting(model)
    whole = sample(clone, *WITH[what](), steps=3)
    assert whole.isfinite().all()
    calls.clear()
    for overlap in (0, 64):
        calls.clear()
        apart = sample(tiled.patch(clone, tiled.Tiling(TILE, overlap)), *WITH[what](), steps=3)
        assert max(max(call["x"].shape[-2:]) for call in calls) <= TILE // 8
        torch.testing.assert_close(apart, whole, rtol=0, atol=1e-5)


def test_without_shared_pixels_it_is_the_same_bit_for_bit(tiled, model) -> None:
    sides = (48, 32)
    clone, calls = predicting(model)
    references = {"reference_latents": [random(1, 16, 1, *sides, seed=11)]}
    both = conditioning(**references), conditioning(7, seed=8, **references)
    whole = sample(clone, *both, sides=sides, batch=2, steps=3)
    calls.clear()
    clone = tiled.patch(clone, tiled.Tiling(TILE, 0, batch=1))
    assert torch.equal(sample(clone, *both, sides=sides, batch=2, steps=3), whole)
    assert len(calls) == 6 * 2 * 3 and {tuple(c["x"].shape) for c in calls} == {(2, 16, 1, 16, 16)}


@settings(max_examples=examples(30))
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    tile=st.sampled_from([64, 128, 256]),
    overlap=st.integers(0, 40),
    batch=st.integers(1, 2),
    frames=st.sampled_from([None, 1, 3]),
)
def test_any_latent_comes_back(tiled, height, width, tile, overlap, batch, frames) -> None:
    """Smaller than a tile, odd sides, four and five dimensions, several layers."""
    shape = (batch, 16, *([frames] if frames else []), height, width)
    x = random(*shape)
    run = tiled.Run(tiled.Tiling(tile, overlap), (height, width))
    cond = {"model_conds": {}, "uuid": 1}
    seen = []

    def execute(model: Any, conds: Any, x: Tensor, *_: Any) -> list[Tensor]:
        seen.append(tuple(x.shape[-2:]))
        return [x * 2, x * 0]

    inner = SimpleNamespace(diffusion_model=None)
    out, nothing = run.calculate(execute, inner, [[cond], None], x, torch.ones(batch), {})
    torch.testing.assert_close(out, x * 2, rtol=0, atol=2e-6)
    assert torch.equal(nothing, x * 0) and len(set(seen)) == 1
    assert seen[0] == (min(height, tile // 8), min(width, tile // 8))


# ------------------------------------------------------------------------------ the real model
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc"])
def test_one_tile_is_the_stock_sampler_bit_for_bit(tiled, model, sampler: str) -> None:
    import comfy.sample

    references = {"reference_latents": [SAME, random(1, 16, 1, 6, 30)]}
    positive = conditioning(mask=mask(9, 9, 99, 99), **references)
    noise, latent = random(1, 16, 1, *SIDES), SAME * 0.5

    @torch.inference_mode()
    def run(patcher: Any) -> Tensor:
        return comfy.sample.sample(
            patcher,
            noise,
            3,
            2.5,
            sampler,
            "simple",
            [*positive, *conditioning(**area(9, 9, 3, 3))],
            conditioning(9, seed=8),
            latent,
            denoise=0.8,
            noise_mask=mask(0, 0, 160, 160),
            disable_pbar=True,
            seed=1,
        )

    assert torch.equal(run(tiled.patch(model, tiled.Tiling(320, 64))), run(model))


def test_a_mask_of_the_latent_keeps_the_rest(tiled, model) -> None:
    import comfy.sample

    noise_mask, latent = mask(0, 0, 160, 160).gt(0).float(), random(1, 16, 1, *SIDES, seed=3)
    with torch.inference_mode():
        out = comfy.sample.sample(
            tiled.patch(model, tiled.Tiling(TILE, 32)),
            random(*latent.shape),
            2,
            1.0,
            "euler",
            "simple",
            conditioning(),
            conditioning(),
            latent,
            noise_mask=noise_mask,
            disable_pbar=True,
            seed=1,
        )
    kept = torch.ones(SIDES, dtype=torch.bool)
    kept[:21, :21] = False
    torch.testing.assert_close(out[..., kept], latent[..., kept], rtol=0, atol=1e-5)
    assert (out - latent)[..., :20, :20].abs().mean() > 0.1


def test_what_a_tile_sees_of_references(tiled, model) -> None:
    """The picture's own size, half of it, another shape, and one that is chosen by hand."""
    clone, calls = predicting(model, lambda x, t, **_: x)
    latents = [
        SAME,
        random(1, 16, 1, 20, 18, seed=12),
        random(1, 16, 1, 8, 30, seed=13),
        random(1, 16, 1, 20, 18, seed=14),
    ]
    given = [latent.clone() for latent in latents]
    choices = ("auto", "auto", "auto", "keep whole")
    tiling = tiled.Tiling(TILE, 32, references=choices, batch=1)
    positive = conditioning(reference_latents=latents)
    sample(tiled.patch(clone, tiling), positive, conditioning(seed=8), steps=1)
    assert all(map(torch.equal, latents, given)) and positive[0][1]["reference_latents"] is latents
    seen = [call for call in calls if "ref_latents" in call]
    inner = lambda latent: model.model.process_latent_in(latent)  # noqa: E731
    grid = tiled.grid_of(tiling, *SIDES)
    assert len(seen) == len(grid) == 9
    for call, tile in zip(seen, grid.tiles(), strict=True):
        one, half, other, chosen = call["ref_latents"]
        rows, columns = slice(tile.top, tile.top + 16), slice(tile.left, tile.left + 16)
        assert torch.equal(one, inner(SAME)[..., rows, columns])
        top, left = tile.top // 2, tile.left // 2
        assert torch.equal(half, inner(latents[1])[..., top : top + 8, left : left + 8])
        assert torch.equal(other, inner(latents[2])) and torch.equal(chosen, inner(latents[3]))


def test_in_an_area_a_tile_sees_the_reference_of_what_the_model_sees(tiled, model) -> None:
    """Where a tile meets an area the model gets that part alone, and what it shows."""
    clone, calls = predicting(model, lambda x, t, **_: x)
    positive = conditioning(reference_latents=[SAME], **area(10, 12, 9, 7))
    sample(tiled.patch(clone, tiled.Tiling(TILE, 0)), positive, steps=1)
    seen = [call for call in calls if "ref_latents" in call]
    assert len(seen) == 2 * 2 and all(
        call["ref_latents"][0].shape[-2:] == call["x"].shape[-2:] for call in seen
    )
    whole = model.model.process_latent_in(SAME)
    assert torch.equal(seen[0]["ref_latents"][0], whole[..., 9:16, 7:16])


@pytest.mark.parametrize("picture", [(3072, 3072), (2160, 3840), (3840, 5120), (3840, 2176)])
def test_a_tile_sees_its_own_place_in_a_reference_of_another_size(tiled, model, picture) -> None:
    """A reference of 1 MP whose values tell where in the picture they lie, in latent pixels."""
    sides = tuple(side // 8 for side in picture)
    scale = (128 * 128 / (sides[0] * sides[1])) ** 0.5
    own = [round(side * scale / 4) * 4 for side in sides]
    ramps = [(torch.arange(n) + 0.5) * side / n for n, side in zip(own, sides, strict=True)]
    latent = torch.stack(torch.meshgrid(*ramps, indexing="ij"))[None, :, None]
    run = tiled.Run(tiled.Tiling(1024, 128), sides)
    shapes = set()
    for tile in run.grid.tiles():
        (part,) = part_of(tiled, "tile_conditions").crop_references(
            [latent], ("auto",), sides, tile
        )
        shapes.add(tuple(part.shape))
        rows, columns = part[0, 0, 0, :, 0], part[0, 1, 0, 0]
        for seen, start, length in zip((rows, columns), tile[:2], tile[2:], strict=True):
            places = start + (torch.arange(len(seen)) + 0.5) * length / len(seen)
            # Less than half a pixel of the picture off, also where a tile ends with the picture.
            torch.testing.assert_close(seen, places, rtol=0, atol=0.06)
    (shape,) = shapes
    assert shape[-1] % 2 == shape[-2] % 2 == 0
    (cond,) = run.for_the_load({"positive": [{"reference_latents": [latent]}]})[0]["positive"]
    assert cond["reference_latents"][0].shape == shape


@given(
    own=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    sides=st.tuples(st.integers(17, 90), st.integers(17, 90)),
)
@example(own=SIDES, sides=SIDES)
def test_every_tile_sees_as_much_of_a_reference(tiled, own, sides) -> None:
    conditions = part_of(tiled, "tile_conditions")
    latent = torch.zeros(1, 1, 1, *own)
    grid = tiled.grid_of(tiled.Tiling(TILE, 32), *sides)
    crops = [conditions.crop_reference(latent, sides, tile) for tile in grid.tiles()]
    (shape,) = {tuple(part.shape[-2:]) for part in crops}
    for size, whole, side, tile in zip(
        shape, own, sides, (grid.tile_height, grid.tile_width), strict=True
    ):
        assert 1 <= size <= whole
        assert own == sides or size == whole or (size % 2 == 0 and size >= 2)
        assert own == sides or abs(size - max(2, whole * tile / side)) <= 1 or size == whole
    if own == sides:
        assert shape == (grid.tile_height, grid.tile_width)
        assert {part.data_ptr() - latent.data_ptr() for part in crops} == {
            4 * (tile.top * own[1] + tile.left) for tile in grid.tiles()
        }  # views: nothing is copied in each step


@pytest.mark.parametrize(
    ("own", "sides", "cropped"),
    [
        ((128, 96), (128, 96), True),
        ((148, 112), (384, 288), True),  # 1 MP of 3:4, in steps of 32 px
        ((130, 114), (384, 288), False),
        ((96, 128), (128, 96), False),
        ((128, 128), (512, 516), True),
        ((112, 60), (512, 256), True),
        ((112, 70), (512, 256), False),
    ],
)
def test_auto_goes_by_the_shape(tiled, own, sides, cropped) -> None:
    conditions = part_of(tiled, "tile_conditions")
    assert conditions.is_cropped(torch.zeros(1, 16, 1, *own), "auto", sides) is cropped
    assert conditions.is_cropped(torch.zeros(1, 16, 1, *own), "crop along", sides)
    assert not conditions.is_cropped(torch.zeros(1, 16, 1, *own), "keep whole", sides)


# ------------------------------------------------------------------------------ ControlNets
def tiny_controlnet(host: Host) -> Any:
    """One for Qwen-Image, of ComfyUI's own classes, with random weights."""
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ops
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
    from pack.demo.tiny_checkpoints import TEXT_HIDDEN

    inner = QwenImageControlNetModel(
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=(4, 14, 14),
        extra_condition_channels=4,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in inner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return comfy.controlnet.ControlNet(
        inner.eval(),
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        concat_mask=True,
        load_device=torch.device("cpu"),
        extra_conds=[],
    )


@pytest.fixture(scope="module")
def vae(host: Host) -> Any:
    """The tiny one."""
    return host.nodes.VAELoader().load_vae(VAE)[0]


def test_a_copy_of_a_controlnet_begins_anew(tiled) -> None:
    """Also that for another GPU, and of an adapter, which keeps what it made of its hint."""
    control, other = Hint(random(1, 3, 80, 80)), Hint(random(1, 3, 80, 80))
    control.cond_hint = control.control_input = other.cond_hint = torch.ones(1, 1, 4, 4)
    control.extra_concat = other.extra_concat = [torch.ones(1, 1, 4, 4)]
    control.multigpu_clones["cuda:1"] = other
    hints = part_of(tiled, "tile_control").Hints()
    tile = tiled.grid_of(tiled.Tiling(64, 0), 20, 20).tiles()[4]
    own = hints.of(control, (20, 20), tile)
    assert own is hints.of(control, (20, 20), tile) is not control
    for made in (own, own.get_instance_for_device("cuda:1")):
        assert made.cond_hint is None and made.cond_hint_original.shape[-2:] == (64, 64)
        assert made.extra_concat is None
    assert own.get_instance_for_device("cuda:1") is not other and own.control_input is None
    assert control.cond_hint is control.control_input is other.cond_hint is not None


def test_a_controlnet_sees_the_tile_and_encodes_its_part_once(
    host, tiled, model, vae, monkeypatch
) -> None:
    control, seen = tiny_controlnet(host), []
    picture = random(1, 3, SIDES[0] * 8, SIDES[1] * 8, seed=3).sigmoid()
    inpaint = mask(64, 32, 99, 199).unsqueeze(0)
    control.set_cond_hint(picture, 0.7, vae=vae, extra_concat=[inpaint])
    forward = type(control.control_model).forward

    def recording(self: Any, x: Tensor, *args: Any, hint: Tensor, **more: Any) -> Any:
        seen.append(hint)
        return forward(self, x, *args, hint=hint, **more)

    monkeypatch.setattr(type(control.control_model), "forward", recording)
    encoded, copies = [], []
    encode = type(vae).encode
    keep = lambda self, pixels, *a: encoded.append(pixels) or encode(self, pixels, *a)  # noqa: E731
    monkeypatch.setattr(type(vae), "encode", keep)
    tiling = tiled.Tiling(TILE, 0)
    hints = part_of(tiled, "tile_control")
    copy = hints.copy.copy
    monkeypatch.setattr(
        hints.copy, "copy", lambda one: copies.append(weakref.ref(made := copy(one))) or made
    )
    patched = tiled.patch(model, tiling)  # which keeps nothing of its run
    out = sample(patched, conditioning(control=control), steps=2)
    grid = tiled.grid_of(tiling, *SIDES)
    assert len(encoded) == len(grid) == 9 and len(seen) == 9 * 2
    for pixels, hint, tile in zip(encoded, seen, grid.tiles(), strict=False):
        top, left, height, width = (side * 8 for side in tile)
        part = picture[..., top : top + height, left : left + width]
        assert torch.equal(pixels, part.movedim(1, -1))
        scaled = torch.nn.functional.interpolate(inpaint, size=SIDES, mode="nearest-exact")
        rows, columns = slice(tile.top, tile.top + 16), slice(tile.left, tile.left + 16)
        assert torch.equal(hint[:, 16, 0], scaled[:, 0, rows, columns])
    assert all(torch.equal(a, b) for a, b in zip(seen[:9], seen[9:], strict=True))
    assert not torch.equal(out, sample(tiled.patch(model, tiling), steps=2))
    assert control.cond_hint is None and control.cond_hint_original is picture
    gc.collect()
    assert len(copies) == 9 and [copy() for copy in copies] == [None] * 9


def test_the_patch_of_a_diffsynth_controlnet_sees_the_tile(host, tiled, model, vae) -> None:
    """ComfyUI's own node, with random weights of the tiny model's width, and a picture of
    another size and shape."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils
    import comfy_extras.nodes_model_patch as patches

    inner = patches.QwenImageBlockWiseControlNet(
        2, additional_in_dim=4, dim=128, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in inner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    patch = comfy.model_patcher.CoreModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))
    picture = random(1, TILE, TILE, 3, seed=3).sigmoid()  # the patch encodes this size at once
    scaled = comfy.utils.common_upscale(picture.movedim(-1, 1), 288, 320, "area", "center")
    (clone,) = patches.QwenImageDiffsynthControlnet().diffsynth_controlnet(
        model, patch, vae, picture, 0.8, mask=mask(64, 32, 99, 199)
    )
    (own,) = clone.model_options["transformer_options"]["patches"]["double_block"]
    where = comfy.utils.common_upscale(own.mask[:, :, 0], 36, 40, "bilinear", "none").unsqueeze(2)
    whole, tiling = own.encoded_image.clone(), tiled.Tiling(TILE, 0)
    seen: dict[tuple[int, int], list[int]] = {}
    encode = inner.process_input_latent_image

    def recording(latent: Tensor) -> Tensor:
        seen.setdefault(tuple(latent.shape[-2:]), []).append(latent.clone())
        return encode(latent)

    inner.process_input_latent_image = recording
    out = sample(tiled.patch(clone, tiling), steps=2)
    grid = tiled.grid_of(tiling, *SIDES)
    assert {size: len(found) for size, found in seen.items()} == {(16, 16): len(grid)}
    for latent, tile in zip(seen[16, 16], grid.tiles(), strict=True):
        top, left, height, width = (side * 8 for side in tile)
        part = scaled[..., top : top + height, left : left + width].movedim(1, -1)
        assert torch.equal(latent[:, :16], vae.encode(part))
        rows, columns = slice(tile.top, tile.top + 16), slice(tile.left, tile.left + 16)
        assert torch.equal(latent[:, 16:], where[..., rows, columns])
    assert torch.equal(own.encoded_image, whole) and own.image.shape == picture.shape
    assert not torch.equal(out, sample(tiled.patch(model, tiling), steps=2))
    alone = sample(tiled.patch(clone, tiled.Tiling(320, 0)), steps=2)
    assert torch.equal(alone, sample(clone, steps=2))


# ------------------------------------------------------------------------------ several at once
def test_tiles_share_a_forward_pass_as_far_as_they_may(tiled, model) -> None:
    references = {"reference_latents": [SAME, random(1, 16, 1, 8, 30)]}
    both = conditioning(**references), conditioning(7, seed=8)
    one = sample(tiled.patch(model, tiled.Tiling(TILE, 32, batch=1)), *both, batch=2)
    noted, calls = predicting(model, lambda x, t, **_: x)
    sample(tiled.patch(noted, tiled.Tiling(TILE, 32, batch=4)), *both, batch=2, steps=1)
    assert [call["x"].shape[0] for call in calls] == [6] * 2 * 3  # 9 tiles in 3 passes, 2 latents
    first = next(call for call in calls if "ref_latents" in call)
    assert [tuple(r.shape) for r in first["ref_latents"]] == [(6, 16, 1, 16, 16), (6, 16, 1, 8, 30)]
    assert torch.equal(first["ref_latents"][0][0], first["ref_latents"][0][1])
    assert not torch.equal(first["ref_latents"][0][1], first["ref_latents"][0][2])
    together = sample(tiled.patch(model, tiled.Tiling(TILE, 32, batch=4)), *both, batch=2)
    assert (together - one).abs().max() <= 2**-6 * one.abs().max()  # of bfloat16


@pytest.mark.parametrize(("latents", "references", "texts"), [(1, 4, 3), (3, 2, 2)])
def test_each_latent_has_the_same_references_and_text_in_every_tile(
    tiled, model, latents, references, texts
) -> None:
    """As ComfyUI gives them out: the first ones, and from the start again."""
    text = torch.cat([conditioning(seed=30 + index)[0][0] for index in range(texts)])
    seen = [random(references, 16, 1, 8, 30), random(references, 16, 1, *SIDES, seed=9)]
    positive = [[text, {"reference_latents": seen}]]
    clones = (tiled.patch(model, tiled.Tiling(TILE, 32, batch=batch)) for batch in (1, 3))
    one, together = (sample(clone, positive, batch=latents, steps=1) for clone in clones)
    torch.testing.assert_close(together, one, rtol=0, atol=1e-3)  # of values up to 16
    noted, calls = predicting(model, lambda x, t, **_: x)
    sample(tiled.patch(noted, tiled.Tiling(TILE, 32, batch=3)), positive, batch=latents, steps=1)
    assert all(call["x"].shape[0] % (3 * latents) == 0 for call in calls)


@pytest.mark.parametrize(
    ("positive", "patch"),
    [
        (lambda: conditioning(control=Hint(random(1, 3, 64, 64))), None),
        (lambda: conditioning(mask=mask(0, 0, 320, 288)), None),
        (lambda: conditioning(**area(40, 36, 0, 0)), None),
        (conditioning, "double_block"),
    ],
)
def test_tiles_that_differ_go_one_by_one(tiled, model, positive, patch) -> None:
    noted, calls = predicting(model, lambda x, t, **_: x)
    if patch:
        noted.set_model_patch(lambda options: options, patch)
    sample(tiled.patch(noted, tiled.Tiling(TILE, 32, batch=4)), positive(), steps=1)
    sides = [len(call["transformer_options"]["cond_or_uncond"]) for call in calls]
    assert [call["x"].shape[0] for call in calls] == sides
    assert {call["x"].shape[-1] for call in calls} == {16}


@pytest.mark.parametrize(
    ("batch", "free", "together"),
    [
        (0, 10**6, 3),  # 9 tiles in 3 passes
        (0, 449, 2),  # of 150 each
        (0, 10, 1),
        (1, 10**6, 1),
        (16, 10**6, 9),
        (5, 10**6, 5),
        (8, 1100, 5),  # of 7 at most, spread evenly
        (5, 500, 3),
    ],
)
def test_how_many_tiles_go_together(tiled, model, batch, free, together) -> None:
    run = tiled.Run(tiled.Tiling(TILE, 32, batch=batch), SIDES)
    patcher = SimpleNamespace(get_free_memory=lambda device: free)
    stub = SimpleNamespace(
        diffusion_model=model.model.diffusion_model,
        current_patcher=patcher,
        memory_required=lambda shape, cond_shapes: 100,
    )
    conds = [[{"model_conds": {}}], None]
    assert run._size(stub, conds, SAME, {}) == together
    for elsewhere in ("multigpu_clones", "model_function_wrapper"):
        assert run._size(stub, conds, SAME, {elsewhere: {}}) == 1
    limited = run._size(stub, conds, SAME, {"transformer_options": {LIMIT: 10**12}})
    assert limited == (together if batch else 1)


# ------------------------------------------------------------------------------ active, known
def test_tiles_that_are_not_active_keep_what_is_known(tiled, model) -> None:
    known = random(1, 16, *SIDES, seed=21)  # a latent of four dimensions
    told: list[tuple[int, int]] = []
    tell = lambda *at: told.append(at)  # noqa: E731
    tiling = tiled.Tiling(TILE, 32, active=frozenset({0, 1}), known=known, told=tell, batch=1)
    clone, calls = predicting(model)
    out = sample(tiled.patch(clone, tiling), steps=2)
    grid = tiled.grid_of(tiling, *SIDES)
    left = max(tile.left for tile in grid.tiles()[:2]) + 16
    torch.testing.assert_close(out[:, :, 0, 16:], known[:, :, 16:], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, :, 0, :, left:], known[..., left:], rtol=0, atol=1e-5)
    assert (out[:, :, 0, :9, :9] - known[..., :9, :9]).abs().mean() > 0.1
    assert len(calls) == 2 * 2 and told == [(1, 2), (2, 2)] * 2


def test_without_an_active_tile_the_prediction_is_what_is_known(tiled, model) -> None:
    known = random(2, 16, 1, *SIDES, seed=21)
    clone, calls = predicting(model)
    for tile in (TILE, 512):
        tiling = tiled.Tiling(tile, 32, active=frozenset(), known=known)
        out = sample(tiled.patch(clone, tiling), steps=1, batch=2)
        torch.testing.assert_close(out, known, rtol=0, atol=1e-5)
    assert not calls
    with pytest.raises(ValueError, match="known is a latent of"):
        wrong = tiled.Tiling(TILE, 32, active=frozenset(), known=known[..., :8])
        sample(tiled.patch(clone, wrong), steps=1, batch=2)
    with pytest.raises(ValueError, match="need a known latent"):
        tiled.Tiling(TILE, 32, active=frozenset({1}))


def test_an_interruption_stops_between_two_tiles(tiled, model) -> None:
    import comfy.model_management as management

    clone, calls = predicting(model)
    told = lambda done, count: management.interrupt_current_processing(done == 2)  # noqa: E731
    with pytest.raises(management.InterruptProcessingException):
        sample(tiled.patch(clone, tiled.Tiling(TILE, 32, told=told, batch=1)))
    assert len({id(call["x"]) for call in calls}) == 2 and not management.processing_interrupted()


def test_a_prompt_costs_nothing_where_its_mask_is_not(tiled, model) -> None:
    clone, calls = predicting(model)
    positive = [*conditioning(mask=mask(0, 0, 72, 72)), *conditioning(seed=9)]
    sample(tiled.patch(clone, tiled.Tiling(TILE, 0)), positive, steps=1)
    sides = [side for call in calls for side in call["transformer_options"]["cond_or_uncond"]]
    assert (sides.count(0), sides.count(1)) == (9 + 1, 9)


def test_what_is_predicted_beside_the_sampler_has_sides_of_its_own(tiled, model) -> None:
    """As patches of other nodes do for a guidance of theirs."""
    import comfy.samplers

    clone, calls = predicting(model)
    found: list[Tensor] = []

    def beside(args: dict[str, Any]) -> Tensor:
        given = [args["cond"]], args["input"][..., :20, :33], args["sigma"], args["model_options"]
        found.extend(comfy.samplers.calc_cond_batch(args["model"], *given))
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(beside)
    sample(clone, steps=1)
    calls.clear()
    sample(tiled.patch(clone, tiled.Tiling(TILE, 32)), steps=1)
    whole, apart = found
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-5)
    assert max(max(call["x"].shape[-2:]) for call in calls) <= TILE // 8


def test_a_load_for_another_latent_is_none_of_tiles(tiled, model) -> None:
    """A run within the run, as of a node that samples a mask or a smaller picture first."""
    tiling = tiled.TiledModel(tiled.Tiling(TILE, 32))
    tiling._run = tiled.Run(tiling.tiling, SIDES)
    for shape in ((1, 16, 1, 80, 80), (1, 16, 1, 8, 8)):
        conds = {"positive": [{"reference_latents": [SAME]}]}
        asked = tiling._prepare(lambda *given, **_: given, model, shape, conds)
        assert asked == (model, shape, conds) and asked[2] is conds


# ------------------------------------------------------------------------------ pixels, latents
@given(
    ratio=st.sampled_from([1, 4, 8, 16, 32, 42]),
    tile=st.integers(8, 64),
    overlap=st.integers(0, 900),
    sides=st.tuples(st.integers(1, 150), st.integers(1, 150)),
)
def test_a_grid_for_latent_pixels_of_any_size(tiled, ratio, tile, overlap, sides) -> None:
    tiling = tiled.Tiling(tile * 32, min(overlap, tile * 32 - 16))
    height, width = (side * 8 * 8 // ratio for side in sides)
    grid = tiled.grid_of(tiling, max(1, height), max(1, width), ratio)
    step = max(32, 2 * ratio)
    for side, starts, own in (
        (height, grid.tops, grid.tile_height),
        (width, grid.lefts, grid.tile_width),
    ):
        if len(starts) == 1:
            continue
        assert own < side and abs(own * ratio - tiling.tile) <= step / 2
        patch = max(16, 2 * ratio)
        shared = min((own - (after - before)) * ratio for before, after in pairwise(starts))
        assert shared >= min(tiling.overlap, own * ratio - patch)
        assert all(start * ratio % patch == 0 for start in starts[:-1])


@pytest.mark.parametrize(("ratio", "latents"), [(4, 32), (8, 16), (16, 8), (42, 4)])
def test_tiles_are_in_the_pixels_of_the_model(tiled, model, monkeypatch, ratio, latents) -> None:
    monkeypatch.setattr(model.model.latent_format, "spacial_downscale_ratio", ratio)
    lines: list[str] = []
    monkeypatch.setattr(tiled.outcome, "tell", lambda text, *nodes: lines.append(text))
    clone, calls = predicting(model)
    patched = tiled.patch(clone, tiled.Tiling(TILE, 0, batch=1))
    torch.testing.assert_close(sample(patched, steps=1), sample(clone, steps=1), rtol=0, atol=1e-5)
    assert tuple(calls[0]["x"].shape[-2:]) == (latents, latents)
    assert lines[0].endswith(f"each {latents * ratio} x {latents * ratio} pixels")
    options = {"transformer_options": {}}
    found: list[int] = []

    def execute(_: Any, conds: Any, x: Tensor, *rest: Any) -> list[Tensor]:
        found.append(x.shape[-1])
        return [x]

    beside = SimpleNamespace(latent_format=model.model.latent_format, diffusion_model=None)
    conds = [[{"model_conds": {}, "uuid": 1}]]
    tiled.TiledModel(tiled.Tiling(TILE, 0))._calculate(
        execute, beside, conds, random(1, 16, 99, 99), torch.ones(1), options
    )
    assert set(found) == {latents}


# ------------------------------------------------------------------------------ memory
def test_what_tiles_may_take_is_reckoned_with_their_references(tiled, model, monkeypatch) -> None:
    """As ComfyUI itself reckons with them when it has the tile."""
    reckoned: list[tuple[Any, Any]] = []
    required = type(model.model).memory_required

    def noting(self: Any, shape: Any, cond_shapes: Any = None) -> float:
        found = (cond_shapes or {}).get("ref_latents", [])
        reckoned.append((list(shape), [list(size) for size in found]))
        return required(self, shape, cond_shapes=cond_shapes)

    monkeypatch.setattr(type(model.model), "memory_required", noting)
    halves = [random(4, 16, 1, 21, 19, seed=3), random(1, 16, 1, 8, 30)]
    patched = tiled.patch(model, tiled.Tiling(TILE, 32, references=("crop along", "keep whole")))
    keep: list[int] = []

    def before(executor: Any, *args: Any) -> Any:
        keep.append(len(reckoned))
        return executor(*args)

    patched.add_wrapper_with_key("calc_cond_batch", "qwen_vram.test", before)
    sample(patched, conditioning(reference_latents=halves), steps=1, batch=2)
    ours, size = reckoned[keep[0] - 1], 8 * 8 + 8 * 30
    assert ours == ([2, 16, 1, 16, 16], [[2, 16, size]])
    assert ([6, 16, 1, 16, 16], [[1, 16, 6 * size]]) in reckoned[keep[0] :]  # three tiles
    assert model.model.memory_required(*ours[:1], {"ref_latents": ours[1]}) == pytest.approx(
        required(model.model, [6, 16, 1, 16, 16], {"ref_latents": [[1, 16, 6 * size]]}) / 3
    )


@pytest.mark.parametrize("first", ["fit", "tiles"])
@pytest.mark.parametrize(("limit", "batch", "together"), [(0, 0, 3), (10**9, 0, 1), (10**9, 3, 3)])
def test_within_a_limit_a_pass_has_one_tile(
    host, tiled, model, first, limit, batch, together
) -> None:
    """Unless more are asked for: what is free is more than the limit leaves."""
    fit = host.part("nodes.fitting").Fitting("exact only", limit)
    noted, calls = predicting(model, lambda x, t, **_: x)
    tiling = tiled.Tiling(TILE, 32, batch=batch)
    both = tiled.patch(fit.patch(noted), tiling)
    if first == "tiles":
        both = fit.patch(tiled.patch(noted, tiling))
    sample(both, steps=1)
    sides = [len(call["transformer_options"]["cond_or_uncond"]) for call in calls]
    assert [call["x"].shape[0] for call in calls] == [side * together for side in sides]


@pytest.mark.parametrize(("batch", "count"), [(0, 1), (3, 3), (16, 9)])
def test_the_load_reckons_with_tiles(tiled, model, batch: int, count: int) -> None:
    clone, loads = model.clone(), []

    def note(executor: Any, patcher: Any, shape: Any, conds: Any, **more: Any) -> Any:
        import comfy.sampler_helpers

        need = comfy.sampler_helpers.estimate_memory(patcher, shape, conds)
        loads.append((tuple(shape), conds["positive"][0].get("reference_latents"), need))
        return executor(patcher, shape, conds, **more)

    clone.add_wrapper_with_key("prepare_sampling", "qwen_vram.test", note)
    seen, latents = [], [SAME, random(1, 16, 1, 8, 30)]
    patched = tiled.patch(clone, tiled.Tiling(TILE, 32, batch=batch))
    keep = lambda executor, *args: seen.append(args[1]) or executor(*args)  # noqa: E731
    patched.add_wrapper_with_key("calc_cond_batch", "qwen_vram.test", keep)
    both = conditioning(reference_latents=latents), conditioning(seed=8)
    sample(patched, *both, steps=1)
    sample(clone, *both, steps=1)
    (tile, references, need), (whole, every, more) = loads
    assert tile == (count, 16, 1, 16, 16) and whole == (1, 16, 1, *SIDES) and every is latents
    assert [tuple(r.shape) for r in references] == [(count, 16, 1, 16, 16), (count, 16, 1, 8, 30)]
    assert more[0] / need[0] == pytest.approx(
        (2 * 1440 + 1440 + 240) / (count * (2 * 256 + 256 + 240))
    )


@pytest.mark.parametrize("first", ["fit", "tiles"])
def test_fit_goes_with_it_and_reckons_with_tiles(host, tiled, model, monkeypatch, first) -> None:
    fitting, passes = host.part("nodes.fitting"), host.part("nodes.passes")
    fit = fitting.Fitting("exact only", 10**9)
    tiling, shapes = tiled.Tiling(TILE, 32, batch=1), []
    expect = passes.Passes.expect

    def keep(self: Any, patcher: Any, shape: Any, conds: Any) -> int:
        shapes.append((tuple(shape), conds["positive"][0]["reference_latents"][0].shape[-2:]))
        return expect(self, patcher, shape, conds)

    monkeypatch.setattr(passes.Passes, "expect", keep)
    both = tiled.patch(fit.patch(model), tiling)
    if first == "tiles":
        both = fit.patch(tiled.patch(model, tiling))
    positive = conditioning(reference_latents=[SAME])
    out = sample(both, positive)
    assert shapes == [((1, 16, 1, 16, 16), (16, 16))]
    assert torch.equal(out, sample(tiled.patch(model, tiling), positive))
    assert fit.record.exactness() == "exact" and not fit.record.ended


# ------------------------------------------------------------------------------ other patches
def node_of(host: Host, name: str, *args: Any) -> Any:
    """What a node of ComfyUI makes of a model."""
    kind = host.nodes.NODE_CLASS_MAPPINGS[name]
    made = kind.execute(*args)
    return made.args[0] if hasattr(made, "args") else made[0]


def test_a_cache_of_passes_is_refused(host, tiled, model) -> None:
    cached = node_of(host, "EasyCache", model, 0.2, 0.15, 0.95, False)
    for patched in (
        tiled.patch(cached, tiled.Tiling(TILE, 32)),
        node_of(host, "EasyCache", tiled.patch(model, tiled.Tiling(TILE, 32)), 0.2, 0.15, 0.95, 0),
    ):
        with pytest.raises(ValueError, match=r"EasyCache keeps .* Take that node out"):
            sample(patched)
    sample(tiled.patch(cached, tiled.Tiling(320, 32)), steps=1)  # one tile
    with pytest.raises(ValueError, match="Flux KV Cache keeps"):
        sample(tiled.patch(node_of(host, "FluxKVCache", model), tiled.Tiling(TILE, 32)))


def test_lazycache_goes_with_it(host, tiled, model) -> None:
    """It keeps whole predictions, above the tiles."""
    clone, calls = predicting(model)
    patched = tiled.patch(clone, tiled.Tiling(TILE, 32, batch=1))
    lazy = node_of(host, "LazyCache", patched, 3.0, 0.0, 1.0, False)
    assert sample(lazy, steps=6).isfinite().all()
    steps = {float(call["t"][0]) for call in calls}
    assert 2 <= len(steps) < 6 and len(calls) % 9 == 0


def test_what_cannot_be_cut_is_refused(tiled, model) -> None:
    tiling = tiled.Tiling(TILE, 32)
    clone = model.clone()
    clone.model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="context windows"):
        sample(tiled.patch(clone, tiling))
    with pytest.raises(ValueError, match="GLIGEN"):
        tiled.TiledModel(tiling)._check({"transformer_options": {}}, {"positive": [{"gligen": 1}]})
    with pytest.raises(ValueError, match=r"\(1, 16, 99\) is no picture"):
        tiled.TiledModel(tiling)._sample(SimpleNamespace(class_obj=None), torch.zeros(1, 16, 99))


class Somebody:
    """A patch of another pack."""

    def __call__(self, options: Any) -> Any:
        return options

    @staticmethod
    def replace(given: dict[str, Any], more: dict[str, Any]) -> Any:
        """That of a block."""
        return more["original_block"](given)


def test_the_log_names_foreign_patches_once(tiled, model, caplog) -> None:
    clone, _ = predicting(model)
    clone.set_model_patch(Somebody(), "attn1_patch")
    clone.set_model_patch(by_position, "attn1_patch")
    for block in range(3):
        clone.set_model_patch_replace(Somebody.replace, "dit", "double_block", block)
    clone.add_wrapper_with_key("diffusion_model", "somebody's", lambda run, *a, **m: run(*a, **m))
    clone = tiled.patch(clone, tiled.Tiling(TILE, 32))
    with caplog.at_level(logging.INFO, "qwen_vram"):
        for _ in range(2):
            sample(clone, steps=1)
    (line,) = [record.getMessage() for record in caplog.records if "see tiles" in record.message]
    assert line.endswith(
        "somebody's, Somebody (attn1_patch), by_position (attn1_patch), Somebody.replace (dit)"
    )


def test_a_second_tiling_replaces_the_first(tiled, model) -> None:
    clone, calls = predicting(model)
    twice = tiled.patch(tiled.patch(clone, tiled.Tiling(TILE, 32)), tiled.Tiling(256, 32))
    sample(twice, steps=1)
    assert {tuple(call["x"].shape[-2:]) for call in calls} == {(32, 32)}


def test_a_lora_holds_in_every_tile(host, tiled, model) -> None:
    lora = host.nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)[0]
    one, two = (sample(tiled.patch(m, tiled.Tiling(TILE, 32))) for m in (model, lora))
    apart = (one - two).abs().mean((0, 1, 2))
    assert all(part.min() > 0 for part in apart.split(16))
    before = tiled.patch(model, tiled.Tiling(TILE, 32))
    after = host.nodes.LoraLoaderModelOnly().load_lora_model_only(before, LORA, 1.0)[0]
    assert torch.equal(sample(after), two)


def test_a_compiled_model_samples_in_tiles(tiled, model) -> None:
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", dynamic=False)
    tiling = tiled.Tiling(TILE, 32)
    out = sample(tiled.patch(compiled, tiling), steps=1)
    torch.testing.assert_close(out, sample(tiled.patch(model, tiling), steps=1), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------ the node
def in_tiles(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The same graph with the node before its sampler."""
    values = {"tile_size": 256, "overlap": 64, "window": "hann", "tile_batch": 0}
    values |= dict.fromkeys(("reference_1", "reference_2", "other_references"), "auto")
    values |= inputs
    graph["tiles"] = node("QwenVRAMTiledDiffusion", model=["shift", 0], **values)
    graph["sampler"]["inputs"]["model"] = ["tiles", 0]
    return graph


def test_the_node_says_what_it_does(host, tiled, monkeypatch) -> None:
    told: list[tuple[str, str]] = []
    tell = lambda text, node_id, sid: told.append((node_id, text))  # noqa: E731
    monkeypatch.setattr(host.server, "send_progress_text", tell)
    graph = in_tiles(text_to_image(size=448, steps=1))
    graph["out"] = node("PreviewAny", source=["sampler", 0])
    run = host.run(graph, ["out"])
    assert run.outputs["sampler"][0][0]["samples"].shape[-2:] == (56, 56)
    assert run.status("tiles")["text"] == "samples in tiles when a sampler runs with it"
    line = "tiles: 4, each 256 x 256 pixels"
    said = [text for node_id, text in told if node_id == "tiles"]
    assert said[-2:] == [line, f"{line} · in one forward pass: 2"]
    line = tiled.Run(tiled.Tiling(256, 64, references=("auto", "keep whole")), SIDES).line
    given = [{"reference_latents": [SAME, SAME, SAME]}, {"reference_latents": []}]
    assert line({"positive": given, "negative": [{}]}) == (
        "tiles: 4, each 256 x 256 pixels · references cropped: 1, whole: 2"
    )


def test_of_references_the_first_alone_is_cropped_unless_asked(tiled) -> None:
    """Further ones are often a style or a person, and as square as the picture."""
    inputs = {each.id: each for each in tiled.TiledDiffusion.define_schema().inputs}
    names = ("reference_1", "reference_2", "other_references")
    chosen = tuple(inputs[name].default for name in names)
    assert chosen == ("auto", "keep whole", "keep whole")
    line = tiled.Run(tiled.Tiling(256, 64, references=chosen), SIDES).line
    assert "cropped: 1, whole: 2" in line({"positive": [{"reference_latents": [SAME] * 3}]})


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"overlap": 256}, "overlap: tiles of 256 pixels can share 0 to 240 pixels, not 256"),
        ({"overlap": 2000}, "Make it smaller, or tile_size larger"),
    ],
)
def test_too_much_overlap_is_a_sentence(host, inputs, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        host.run(in_tiles(text_to_image(size=64), **inputs), ["sampler"])
