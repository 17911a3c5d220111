"""Masked edits: the outside keeps its keys and values, and nothing else changes."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.demo.animals import Scene, draw
from pack.demo.edit_graph import edit_graph
from pack.tests.graphs import UNET, node
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import conditioning, random
from torch import Tensor

SIDES = (28, 24)  # latent pixels
REFERENCES = [random(1, 16, 1, 12, 10, seed=3), random(1, 16, 1, 8, 16, seed=4)]
INSIDE = (slice(4, 14), slice(6, 20))  # of SIDES, in latent pixels
ALWAYS = 1e9  # a threshold that everything is below


@pytest.fixture(scope="module")
def cache(host: Host) -> ModuleType:
    """The module of the node."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.reference_cache")


@pytest.fixture(scope="module")
def reuse(host: Host) -> ModuleType:
    """The module under test."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.region_reuse")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A random model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def mask_of(*box: slice, sides: tuple[int, int] = SIDES) -> Tensor:
    """(1, 1, 1, height, width) with 1 in the box."""
    mask = torch.zeros(1, 1, 1, *sides)
    mask[..., box[0], box[1]] = 1
    return mask


@torch.inference_mode()
def sample(patcher: Any, mask: Tensor | None, **more: Any) -> Tensor:
    """An edit of a random latent, by the host's own sampler."""
    import comfy.sample

    given = {"steps": 4, "cfg": 2.5, "sampler": "euler", "references": REFERENCES, "batch": 1}
    given |= more
    latent = random(given["batch"], 16, 1, *SIDES, seed=11)
    own = {"reference_latents": given["references"]} if given["references"] else {}
    if method := given.get("method"):
        own["reference_latents_method"] = method
    return comfy.sample.sample(
        patcher,
        random(*latent.shape),
        given["steps"],
        given["cfg"],
        given["sampler"],
        "simple",
        conditioning(**own),
        conditioning(seed=8, **own),
        latent,
        noise_mask=mask,
        disable_pbar=True,
        seed=1,
    )


def settings(cache: ModuleType, **more: Any) -> Any:
    """The node's, exact where nothing else is said."""
    given = {
        "refresh": "first step",
        "refresh_every": 10,
        "drift_threshold": 0.5,
        "full_last_steps": 0,
        "store_format": "model",
        "store_place": "gpu",
        "causal": False,
        "region": True,
        "region_margin": 16,
        "region_threshold": ALWAYS,
    }
    return cache.Settings(**{**given, **more})


# ------------------------------------------------------------------------------ the same by hand
def by_hand(model: Any, mask: Tensor, margin: int, alone: int = 2) -> Any:
    """A clone that computes all tokens in every step, but lets those that are reused be seen by
    others with the keys and values that they had: of references in the first step, of the outside
    in the step before `alone`. Nothing is left out, so no place can be mistaken."""
    import comfy.ldm.common_dit

    clone, seen = model.clone(), {}
    wide = torch.nn.functional.max_pool2d(mask[:, :, 0], 2 * margin + 1, 1, margin)
    padded = comfy.ldm.common_dit.pad_to_patch_size(wide, (2, 2))
    outside = torch.nn.functional.max_pool2d(padded, 2).flatten() == 0

    def wrapper(executor: Any, x: Tensor, t: Tensor, context: Tensor, *rest: Any, **more: Any):
        *between, options = rest
        kept, steps = seen.setdefault(tuple(options["uuids"]), ({}, set()))
        steps.add(float(t[0]))
        text, picture = context.shape[1], outside.numel()

        def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any):
            block = kwargs["transformer_options"]["block_index"]
            for name, first, last, begin in (
                ("references", text + picture, k.shape[2], 1),
                ("outside", text, text + picture, alone),
            ):
                chosen = outside if name == "outside" else slice(None)
                for which, tensor in (("k", k), ("v", v)):
                    part = tensor[:, :, first:last]
                    if len(steps) > begin:
                        part[:, :, chosen] = kept[name, block, which]
                    else:
                        kept[name, block, which] = part[:, :, chosen].clone()
            return function(q, k, v, *args, **kwargs)

        own = {**options, "optimized_attention_override": attend}
        return executor(x, t, context, *between, own, **more)

    clone.add_wrapper_with_key("diffusion_model", "qwen_vram.test", wrapper)
    return clone


@pytest.mark.parametrize("references", [REFERENCES, []], ids=["references", "text alone"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_inside_sees_what_the_outside_was(cache, model, references, batch) -> None:
    mask, given = mask_of(*INSIDE), {"references": references, "batch": batch}
    made = cache.patch(model, settings(cache))
    expected = sample(by_hand(model, mask, margin=2), mask, **given)
    found = sample(made, mask, **given)
    assert torch.allclose(found, expected, atol=1e-4)
    full = sample(model, mask, **given)
    assert (found - full).abs().max() > 1e-2  # or the test would show nothing
    outside = mask.expand_as(found) == 0
    assert torch.equal(found[outside], full[outside])


# ------------------------------------------------------------------------------ when it is reused
def patched(cache: ModuleType, model: Any, **more: Any) -> tuple[Any, Any]:
    """A clone with the cache, and the cache."""
    made = cache.ReferenceCache(settings(cache, **more))
    return made.patch(model), made


@pytest.mark.parametrize(
    ("changed", "same_as"),
    [
        ({"region_threshold": 0.0}, {"region": False}),
        ({"region_margin": 4096}, {"region": False}),
        ({"refresh_every": 1}, None),
        ({"drift_threshold": 0.0}, None),
    ],
)
def test_without_effect_it_changes_no_bit(cache, model, changed, same_as) -> None:
    """None: stock."""
    mask = mask_of(*INSIDE)
    other = model if same_as is None else cache.patch(model, settings(cache, **same_as))
    found = sample(cache.patch(model, settings(cache, **changed)), mask)
    assert torch.equal(found, sample(other, mask))


@pytest.mark.parametrize(
    "box",
    [(slice(0, 6), slice(None)), (slice(-6, None), slice(None)), (slice(None), slice(-5, None))],
    ids=["top", "bottom", "right"],
)
@pytest.mark.parametrize("references", [REFERENCES, []], ids=["references", "text alone"])
def test_whichever_edge_the_mask_lies_at(cache, model, references, box) -> None:
    mask, given = mask_of(*box), {"references": references, "cfg": 1.0}
    found = sample(cache.patch(model, settings(cache)), mask, **given)
    expected = sample(by_hand(model, mask, margin=2), mask, **given)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["index", "index_timestep_zero", "offset", "negative_index"])
def test_whatever_the_reference_method(cache, model, method) -> None:
    """With timestep zero the model tells references by how many tokens the picture has."""
    mask = mask_of(*INSIDE)
    found = sample(cache.patch(model, settings(cache)), mask, cfg=1.0, method=method)
    expected = sample(by_hand(model, mask, margin=2), mask, cfg=1.0, method=method)
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_has_not_settled_is_computed_and_full_steps_compute_all(cache, model) -> None:
    mask = mask_of(*INSIDE)
    steps = {"steps": 8, "cfg": 1.0}
    clone, made = patched(cache, model, refresh="every n steps", refresh_every=4)
    every = sample(clone, mask, **steps)
    assert "left out in 5 of 8 steps" in made.record.line()  # not 0 and 1, nor 5 = 1 + 4
    clone, made = patched(cache, model, region_threshold=1e-6)
    sample(clone, mask, **steps)
    assert "at least, and region_threshold is 1e-06" in made.record.line()
    assert "left out" not in made.record.line()
    clone, made = patched(cache, model, refresh="when drifted", drift_threshold=1e-6)
    full = sample(clone, mask, **steps)
    assert torch.equal(full, sample(model, mask, **steps))
    clone, made = patched(cache, model, full_last_steps=3)
    sample(clone, mask, **steps)
    assert "left out in 3 of 8 steps" in made.record.line()
    assert not torch.equal(full, every)


def test_causal_references_stay_while_the_outside_is_refreshed(cache, model) -> None:
    given = {"causal": True, "refresh": "every n steps", "refresh_every": 3}
    clone, made = patched(cache, model, **given)
    found = sample(clone, mask_of(*INSIDE), steps=8)
    assert "left out in 4 of 8 steps" in made.record.line()  # not 0, 1, 4, 7
    assert made.record.steps_full == 1
    again = sample(clone, mask_of(*INSIDE), steps=8)
    assert torch.equal(found, again)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "lcm"])
def test_other_samplers(cache, model, sampler) -> None:
    mask = mask_of(*INSIDE)
    clone, made = patched(cache, model)
    found = sample(clone, mask, sampler=sampler, cfg=1.0)
    assert found.isfinite().all() and "left out in" in made.record.line()
    stock = sample(model, mask, sampler=sampler, cfg=1.0)
    outside = mask.expand_as(found) == 0
    assert torch.equal(found[outside], stock[outside])


def test_what_is_predicted_outside_is_what_was_predicted_last(cache, model) -> None:
    """Samplers, and patches that rescale CFG, read it before ComfyUI replaces it."""
    seen: dict[str, list[Tensor]] = {"cache": [], "stock": []}
    for name, patcher in {"cache": cache.patch(model, settings(cache)), "stock": model}.items():
        watched = patcher.clone()

        def keep(args: dict[str, Any], kept: list[Tensor] = seen[name]) -> Tensor:
            kept.append(args["denoised"].clone())
            return args["denoised"]

        watched.set_model_sampler_post_cfg_function(keep)
        sample(watched, mask_of(*INSIDE), cfg=1.0)
    outside = (slice(None), slice(None), slice(None), slice(22, None))
    for step in (2, 3):
        own, stock, blank = seen["cache"][step], seen["stock"][step], seen["stock"][0]
        assert (own - stock)[outside].norm() < 0.5 * (blank - stock)[outside].norm()


# ------------------------------------------------------------------------------ what stays whole
def test_soft_edges_are_inside(cache, model) -> None:
    faint = mask_of(*INSIDE)
    faint[..., 20:30, 8:20] = 1e-6
    lines = []
    for mask in (faint, (faint != 0).float(), faint.clamp_min(1e-6)):
        clone, made = patched(cache, model, region_margin=0)
        sample(clone, mask, cfg=1.0)
        lines.append(made.record.line())
    assert "outside the mask" in lines[0] and lines[0] == lines[1]
    assert "cover the whole picture" in lines[2]


def differential(model: Any) -> Any:
    """As ComfyUI's node makes it."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    return DifferentialDiffusion.execute(model)[0]


@pytest.mark.parametrize(
    ("change", "mask", "said"),
    [
        (None, None, "the latent has no mask"),
        (None, mask_of(slice(0, 0), slice(0, 0)), "the mask is empty"),
        (differential, mask_of(*INSIDE), "Differential Diffusion"),
    ],
    ids=["no mask", "empty mask", "changing mask"],
)
def test_without_a_region_references_are_reused_all_the_same(
    cache, model, change, mask, said
) -> None:
    clone, made = patched(cache, change(model) if change else model)
    plain = cache.patch(change(model) if change else model, settings(cache, region=False))
    assert torch.equal(sample(clone, mask), sample(plain, mask))
    line = made.record.line()
    assert said in line and "left out" not in line and made.record.steps_reused == 3


def test_a_sampler_of_another_kind_computes_everything(cache, reuse) -> None:
    import comfy.samplers

    class Other(comfy.samplers.Sampler):
        """May do with the mask what it likes."""

    mask = mask_of(*INSIDE)
    region, why = reuse.region_of(mask, Other(), {}, 16, 0.1)
    assert region is None and "this sampler (Other)" in why
    region, why = reuse.region_of(mask, comfy.samplers.ksampler("euler"), {}, 16, 0.1)
    assert region.margin == 2 and why == ""


def test_parts_of_the_picture_are_not_mistaken_for_it(reuse) -> None:
    region = reuse.Region(mask_of(*INSIDE), 2, 0.1)
    assert region.outside(torch.zeros(1, 16, 1, 16, 16)) is None
    assert "the mask is for all of it" in region.told(4)[0]
    assert region.outside(torch.zeros(1, 16, 2, *SIDES)) is None
    assert "2 frames" in region.told(4)[1]
    assert region.outside(torch.zeros(2, 16, 1, *SIDES)).tolist()


# ------------------------------------------------------------------------------ a model that draws
@torch.inference_mode()
def pig_with_a_hat(host: Host, patch: Any, steps: int = 40) -> list[Tensor]:
    """(H, W, C) in 0..1 by ComfyUI alone, and by what each of `patch` makes of the model."""
    import comfy.sample

    draw(Scene("pig", "pink", background="snow", jitter=5), 256, 256).save(
        host.base / "input" / "pig.png"
    )
    graph = edit_graph("pig.png", "add a hat")
    wanted = {name: node("PreviewAny", source=[name, 0]) for name in ("shift", "reference", "vae")}
    host.restart()
    host.run(
        {**graph, **{f"out_{name}": out for name, out in wanted.items()}},
        list(map("out_{}".format, wanted)),
    )
    cached = host.executor.caches.outputs
    model, positive, vae = (cached.get_local(name).outputs[0][0] for name in wanted)
    latent = cached.get_local("encoded").outputs[0][0]["samples"]
    mask = mask_of(slice(2, 12), slice(8, 24), sides=(32, 32))
    made = []
    for patched in (model, *(each(model) for each in patch)):
        noise = comfy.sample.prepare_noise(latent, 0)
        given = (patched, noise, steps, 1.0, "euler", "simple", positive, positive, latent)
        samples = comfy.sample.sample(*given, noise_mask=mask, disable_pbar=True, seed=0)
        picture = vae.decode(samples)
        made.append(picture.reshape(256, 256, -1))
    return made


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of pictures in 0..1."""
    return float(-10 * torch.log10((one - other).square().mean()))


def test_the_defaults_keep_the_picture(host, cache) -> None:
    """Measured: 34.7 dB inside, where the references alone leave 35.0, and 71 outside."""
    own = cache.ReferenceCache(cache.Settings(region=True))
    stock, found = pig_with_a_hat(host, [own.patch])
    inside, outside = (slice(16, 96), slice(64, 192)), (slice(128, None), slice(None))
    assert "outside the mask: 96 of 256 tokens left out in 34 of 40 steps" in own.record.line()
    assert psnr(found[inside], stock[inside]) > 32.5
    assert psnr(found[outside], stock[outside]) > 60
