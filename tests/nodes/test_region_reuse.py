"""Masked edits: the outside keeps its keys and values, and nothing else changes."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import SIDES, conditioning, random
from torch import Tensor

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
