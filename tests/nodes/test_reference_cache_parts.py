"""The reference cache where the model sees parts: tiles, items of a batch, passes that failed."""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.core.budget import Plan
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.nodes.faults import Faults, blocks_fail
from pack.tests.nodes.slicing_models import conditioning, random, sample
from torch import Tensor

SIDES = (20, 18)  # latent pixels
TILE = 96  # pixels: 12 latent pixels; 4 tiles of SIDES
OF_THE_PICTURE = random(1, 16, 1, *SIDES, seed=11)  # which tiles see a part of
WHOLE = random(1, 16, 1, 8, 12, seed=12)
REUSED = {"refresh": "first step", "store_format": "model"}
EXACT = {"refresh_every": 1}


def part(host: Host, name: str) -> ModuleType:
    """A module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.{name}")


@pytest.fixture(scope="module")
def cache(host: Host) -> ModuleType:
    """The module of the node."""
    return part(host, "reference_cache")


@pytest.fixture(scope="module")
def tiled(host: Host) -> ModuleType:
    """The module of Tiled Diffusion."""
    return part(host, "tiled_diffusion")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def begun(request: pytest.FixtureRequest) -> None:
    """Begin here what test_reference_staleness.py waits for, where it is among the tests."""
    if any("fresh_pictures" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("fresh_pictures")


def settings(cache: ModuleType, **more: Any) -> Any:
    """Once recorded, exactly kept."""
    return replace(cache.Settings(**REUSED), **more)


def sides(**more: Any) -> tuple[list[Any], list[Any]]:
    """Two sides of CFG of different lengths, with two references; the first may be cropped."""
    both = {"reference_latents": [OF_THE_PICTURE, WHOLE], **more}
    return conditioning(**both), conditioning(9, seed=8, **both)


def edit(patcher: Any, batch: int = 1, steps: int = 3) -> Tensor:
    """By the host's own sampler."""
    return sample(patcher, *sides(), SIDES, batch=batch, steps=steps)


def by_hand(model: Any, steps: int) -> Any:
    """A clone that recognises a call by its place among those of a step, and from the second step
    on puts the references' keys and values of the first in the place of what it computes."""
    clone, kept, at = model.clone(), {}, {"sigma": None, "call": 0, "step": -1}

    def wrapper(executor: Any, x: Tensor, t: Tensor, context: Tensor, *rest: Any, **more: Any):
        *between, options = rest
        if float(t[0]) != at["sigma"]:
            at.update(sigma=float(t[0]), call=0, step=(at["step"] + 1) % steps)
        call, first = at["call"], at["step"] == 0
        at["call"] += 1
        start = context.shape[1] + -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)

        def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any):
            block = kwargs["transformer_options"]["block_index"]
            for which, tensor in (("k", k), ("v", v)):
                if first:
                    kept[call, block, which] = tensor[:, :, start:].clone()
                else:
                    tensor[:, :, start:] = kept[call, block, which]
            return function(q, k, v, *args, **kwargs)

        own = {**options, "optimized_attention_override": attend}
        return executor(x, t, context, *between, own, **more)

    clone.add_wrapper_with_key("diffusion_model", "qwen_vram.test", wrapper)
    return clone


# ------------------------------------------------------------------------------ tiled diffusion
def both_ways(cache: ModuleType, tiled: ModuleType, model: Any, **more: Any) -> list[Any]:
    """The two patches one after the other, and the other way round."""
    tiling, chosen = tiled.Tiling(TILE, 32, batch=1), settings(cache, **more)
    return [
        tiled.patch(cache.patch(model, chosen), tiling),
        cache.patch(tiled.patch(model, tiling), chosen),
    ]


def test_tiles_in_full_are_tiles_without_a_cache(cache, tiled, model) -> None:
    alone = edit(tiled.patch(model, tiled.Tiling(TILE, 32, batch=1)))
    for patched in both_ways(cache, tiled, model, **EXACT):
        assert torch.equal(edit(patched), alone)


@pytest.mark.parametrize("together", [1, 3])
def test_every_tile_has_its_own_references(cache, tiled, model, together) -> None:
    tiling = tiled.Tiling(TILE, 32, batch=together)
    alone = edit(tiled.patch(model, tiling))
    expected = edit(tiled.patch(by_hand(model, 3), tiling))
    own = cache.ReferenceCache(settings(cache))
    found = edit(tiled.patch(own.patch(model), tiling))
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - alone).abs().max() > 1e-2  # what is reused is not what is computed
    assert own.record.steps_reused == 2 and own.record.aside == []
    again = edit(cache.patch(tiled.patch(model, tiling), settings(cache)))
    assert torch.equal(again, found)


def test_room_is_made_for_the_stores_of_all_tiles(cache, tiled, model) -> None:
    for together in (1, 2):
        tiling = tiled.Tiling(TILE, 32, batch=together)
        for patched in (
            tiled.patch(cache.patch(model, settings(cache)), tiling),
            cache.patch(tiled.patch(model, tiling), settings(cache)),
        ):
            own = patched.wrappers["outer_sample"]["qwen_vram.reference_cache"][0].__self__
            edit(patched, steps=2)
            assert own.record.bytes_held["ram"] == own.record.bytes_expected > 0
    own = cache.ReferenceCache(settings(cache))
    edit(own.patch(model))
    assert own.record.bytes_expected == own.record.bytes_held["ram"]


def test_a_mask_of_the_whole_is_none_of_tiles(cache, tiled, model) -> None:
    """Region reuse leaves tiles alone and says so; their references are reused."""
    import comfy.sample

    mask = torch.zeros(1, 1, *SIDES)
    mask[..., :8, :8] = 1
    chosen = settings(cache, region=True, region_margin=0, region_threshold=1e9)
    own = cache.ReferenceCache(chosen)
    tiling = tiled.Tiling(TILE, 32, batch=1)
    with torch.inference_mode():
        pictures = [
            comfy.sample.sample(
                tiled.patch(patched, tiling),
                random(1, 16, 1, *SIDES),
                3,
                1.0,
                "euler",
                "simple",
                *sides(),
                OF_THE_PICTURE,
                noise_mask=mask,
                disable_pbar=True,
                seed=1,
            )
            for patched in (own.patch(model), cache.patch(model, settings(cache)))
        ]
    assert torch.equal(*pictures)
    assert "the mask is for all of it" in own.record.line() and own.record.steps_reused == 2


# ------------------------------------------------------------------------------ the ladder
PLANS = {
    "apart": Plan(apart=True),
    "slices": Plan(feed_forward=2, projections=3, attention=3),
    "tiles": Plan(tiles=2),
    "smaller references": Plan(reference_scale=0.5),
    "all": Plan(apart=True, tiles=2, reference_scale=0.5, feed_forward=2, attention=2),
}


def planned(host: Host, patcher: Any, plan: Plan) -> Any:
    """A clone whose forward passes go by a plan, as on a rung of the ladder."""
    slicing, reductions = part(host, "slicing"), part(host, "reductions")
    clone, plans = patcher.clone(), slicing.Plans()
    plans.set(torch.device("cpu"), plan)
    assert slicing.install(clone, plans) == ""

    def wrapper(executor: Any, *arguments: Any, **more: Any) -> Tensor:
        return reductions.forward(executor, plan, *arguments, **more)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.fit", wrapper)
    return clone


@pytest.mark.parametrize("name", PLANS)
def test_on_every_rung_parts_have_their_own(host, cache, model, name: str) -> None:
    plan, small = PLANS[name], {"batch": 2, "steps": 2}
    expected = edit(planned(host, by_hand(model, 2), plan), **small)
    full = edit(planned(host, model, plan), **small)
    own = cache.ReferenceCache(settings(cache))
    found = edit(planned(host, own.patch(model), plan), **small)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - full).abs().max() > 1e-3 and own.record.steps_reused == 1
    exact = cache.patch(planned(host, model, plan), settings(cache, **EXACT))
    assert torch.equal(edit(exact, **small), full)


def within(host: Host, patcher: Any) -> tuple[Any, Any]:
    """A clone with the ladder of our sampler, and its Fitting."""
    fitting = part(host, "fitting").Fitting("exact only")
    return fitting.patch(patcher), fitting


def blocks(steps: int, calls: int = 2) -> int:
    """How many blocks begin in so many steps."""
    from pack.demo.tiny_checkpoints import LAYERS

    return steps * calls * LAYERS


FAILING = [({}, at) for at in range(blocks(3))]
PROBED = {"refresh": "when drifted", "drift_threshold": 1e-6}  # it writes while it looks


@pytest.fixture(scope="module")
def without_a_failure(cache: ModuleType, model: Any) -> Callable[[Any], Tensor]:
    """The picture of such settings."""
    return functools.cache(lambda chosen: edit(cache.patch(model, chosen)))


@pytest.mark.parametrize(("more", "at"), [*FAILING, (PROBED, 5), (PROBED, 7)])
def test_a_pass_that_failed_leaves_nothing_half_recorded(
    host, cache, model, without_a_failure, more, at
) -> None:
    """Recording, reusing, either side of CFG, any block: the same picture as without a failure."""
    chosen = settings(cache, **more)
    usual = without_a_failure(chosen)
    own = cache.ReferenceCache(chosen)
    patched, fitting = within(host, own.patch(model))
    with blocks_fail(model.model.diffusion_model, Faults({at})) as faults:
        found = edit(patched)
    assert faults.raised == fitting.record.repeated == 1
    assert torch.equal(found, usual)
    assert own.record.steps_reused == (0 if more else 2)
    assert [ref for ref in faults.tensors if ref() is not None] == []


class NotTogether(Faults):
    """From the second step on there is memory for one picture in a pass only."""

    def __init__(self) -> None:
        super().__init__(range(1000))
        self.blocks = 0

    def hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """As a forward hook of a block."""
        self.blocks += 1
        if self.blocks > blocks(1) and kwargs["hidden_states"].shape[0] > 1:
            self.call()


def test_what_failed_is_recorded_anew_in_the_plan_that_succeeds(host, cache, model) -> None:
    """The batch goes on picture by picture: new parts, each in full at first, of which the stores
    take the place of the whole's."""
    own = cache.ReferenceCache(settings(cache))
    patched, fitting = within(host, own.patch(model))
    with blocks_fail(model.model.diffusion_model, NotTogether()) as faults:
        found = edit(patched, batch=2, steps=4)
    assert faults.raised == fitting.record.repeated and found.isfinite().all()
    assert "one at a time" in fitting.record.line()
    assert own.record.in_full == {0, 1} and own.record.reused == {2, 3}
    assert own.record.bytes_held["ram"] == own.record.bytes_expected


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ((), (("tiles", 3),), True),
        ((("tiles", 1, 2),), (("tiles", 2, 3),), True),
        ((("tiles", 1, 2),), (("tiles", 3, 4),), False),
        ((("items", 0, 2),), (("items", 1, 1),), True),
        ((("items", 0, 1),), (("items", 1, 1),), False),
        ((("tiles", 1), ("items", 0, 1)), (("tiles", 1),), True),
        ((("tiles", 1), ("items", 0, 1)), (("tiles", 1), ("items", 1, 1)), False),
        ((("items", 0, 1), ("tile", 0)), (("items", 0, 1), ("tile", 1)), False),
        ((("items", 0, 1),), (("tile", 1),), True),
    ],
)
def test_parts_that_share_something_supersede_each_other(host, one, other, shared) -> None:
    overlap = part(host, "reference_slots").overlap
    assert overlap(one, other) == overlap(other, one) == shared


# ------------------------------------------------------------------------------ ComfyUI's caches
def easy(patcher: Any, threshold: float) -> Any:
    """ComfyUI's cache of passes: skips the model in steps that change little."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(patcher, threshold, 0.0, 1.0, False)[0]


def lazy(patcher: Any, threshold: float) -> Any:
    """ComfyUI's cache of whole predictions."""
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(patcher, threshold, 0.0, 1.0, False)[0]


@pytest.mark.parametrize("other", [easy, lazy])
def test_comfyuis_caches_of_steps_go_with_it(cache, model, other) -> None:
    """In either order; where one of them skips the model, nothing is recorded or lost."""
    alone = edit(cache.patch(model, settings(cache)), steps=6)
    for threshold in (0.0, 3.0):
        found = []
        for turned in (False, True):
            own = cache.ReferenceCache(settings(cache))
            patched = own.patch(other(model, threshold) if turned else model)
            patched = patched if turned else other(patched, threshold)
            found.append(edit(patched, steps=6))
            assert own.record.aside == [] and own.record.steps_full == 1
            steps = len(own.record.reused)
            assert steps == 5 if threshold == 0 else 0 < steps < 5
        assert torch.equal(*found) and found[0].isfinite().all()
        assert torch.equal(found[0], alone) == (threshold == 0)
