"""Runs of the reference cache: what memory it asks for, gives back, and does without."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.nodes.slicing_models import conditioning, random
from torch import Tensor

SIDES = (12, 10)
ZERO = "index_timestep_zero"


@pytest.fixture(scope="module")
def cache(host) -> ModuleType:
    """The module of the loaded pack."""
    return host.part("nodes.reference_cache")


@pytest.fixture(scope="module")
def model(host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def cache_of(cache: ModuleType, **more: Any) -> Any:
    """That records once, exactly."""
    return cache.ReferenceCache(
        replace(cache.Settings(refresh="first step", store_format="model"), **more)
    )


@torch.inference_mode()
def edit(patcher: Any, steps: int = 4, cfg: float = 2.5, method: str | None = None) -> Tensor:
    """Two sides of CFG with texts of different lengths, and two references."""
    import comfy.sample

    both = {"reference_latents": [random(1, 16, 1, *side, seed=3) for side in ((10, 12), (8, 7))]}
    both |= {"reference_latents_method": method} if method else {}
    sides = conditioning(**both), conditioning(9, seed=8, **both)
    noise, latent = random(1, 16, 1, *SIDES), torch.zeros(1, 16, 1, *SIDES)
    given = (steps, cfg, "euler", "simple", *sides, latent)
    return comfy.sample.sample(patcher, noise, *given, disable_pbar=True, seed=1)


def kept_runs(own: Any) -> list[Any]:
    """The runs that it begins from now on."""
    runs, begin = [], own._begin
    own._begin = lambda *args: runs.append(begin(*args)) or runs[-1]
    return runs


# ------------------------------------------------------------------------------ giving back
@pytest.mark.parametrize(("place", "in_full"), [("gpu", {0, 2}), ("ram", {0})])
def test_what_lies_on_the_gpu_can_be_given_back_between_two_passes(
    cache, model, monkeypatch, place: str, in_full: set[int]
) -> None:
    """As the sampler's ladder does when memory is short. What lies in RAM stays."""
    monkeypatch.setattr(cache, "place_for", lambda *_: (place, ""))
    own = cache_of(cache)
    clone, held = own.patch(model), []

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        (run,) = args[5]["qwen_vram.holdings"]
        held.append(run.bytes_held())
        if len(held) == 5:  # the third step
            run.release()
            assert run.bytes_held() == 0
        return executor(*args, **more)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    edit(clone)
    assert (own.record.in_full, own.record.reused) == (in_full, {0, 1, 2, 3} - in_full)
    assert (held[4] > 0) == (place == "gpu")


def test_what_a_pass_uses_stays(cache, model, monkeypatch) -> None:
    """Another GPU's thread may find no memory meanwhile."""
    monkeypatch.setattr(cache, "place_for", lambda *_: ("gpu", ""))
    own = cache_of(cache)
    clone, runs = own.patch(model), kept_runs(own)
    usual = edit(clone, cfg=1.0)
    second = model.model.diffusion_model.transformer_blocks[1]
    seen: list[int] = []

    def release(*_: Any) -> None:
        runs[-1].release()
        seen.append(runs[-1].bytes_held())

    handle = second.register_forward_pre_hook(release)
    try:
        assert torch.equal(edit(clone, cfg=1.0), usual)
    finally:
        handle.remove()
    assert len(seen) == 4 and min(seen) > 0 and own.record.in_full == {0}


@pytest.mark.parametrize("fails", [False, True])
def test_no_copy_buffer_outlives_a_pass(cache, model, monkeypatch, fails: bool) -> None:
    """Also a pass that ran out of memory: the repeated one finds in RAM what was recorded."""
    import comfy.model_management

    store_module = cache.__package__.rpartition(".")[0] + ".core.reference_store"
    stores = __import__(store_module, fromlist=["KVStore"])
    usual = edit(cache_of(cache).patch(model))
    make = stores.KVStore.__init__

    def with_ring(self: Any, *args: Any) -> None:
        make(self, *args)
        self._ring = stores._Ring(torch.device("cpu"))

    monkeypatch.setattr(stores.KVStore, "__init__", with_ring)
    own = cache_of(cache)
    clone, left = own.patch(model), []
    second = model.model.diffusion_model.transformer_blocks[1]
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 5:
            raise comfy.model_management.OOM_EXCEPTION("short of memory")

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        (run,) = args[5]["qwen_vram.holdings"]
        try:
            return executor(*args, **more)
        except comfy.model_management.OOM_EXCEPTION:
            left.append(run.bytes_held())
            run.release()
            return executor(*args, **more)
        finally:
            left.append(run.bytes_held())

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    handle = second.register_forward_pre_hook(fail if fails else lambda *_: None)
    try:
        assert torch.equal(edit(clone), usual)
    finally:
        handle.remove()
    assert left == [0] * (9 if fails else 8) and own.record.in_full == {0}
    assert own.record.bytes_held.get("gpu", 0) == 0


# ------------------------------------------------------------------------------ room
def test_without_room_every_step_is_computed_in_full_and_it_says_why(
    cache, model, monkeypatch
) -> None:
    monkeypatch.setattr(cache, "place_for", lambda *_: ("", "no room here"))
    own = cache_of(cache)
    assert torch.equal(edit(own.patch(model)), edit(model))
    assert own.record.aside == ["no room here"] and own.record.in_full == {0, 1, 2, 3}
    assert own.record.bytes_held == {} and own.record.bytes_expected == 0
    assert own.record.line().startswith("computed in full: no room here")


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_load_is_planned_with_what_will_be_held(cache, model, cfg: float) -> None:
    """At a CFG of 1 that is one side's."""
    own = cache_of(cache)
    clone, shapes = own.patch(model), []

    def wrapper(executor: Any, patcher: Any, shape: Any, *args: Any, **more: Any) -> Any:
        shapes.append(shape)
        return executor(patcher, shape, *args, **more)

    clone.add_wrapper_with_key("prepare_sampling", "qwen_vram.test", wrapper)
    edit(clone, cfg=cfg)
    held = sum(own.record.bytes_held.values())
    assert own.record.bytes_expected == held > 0
    needed = [model.model.memory_required(each) for each in (*shapes, [1, 16, 1, *SIDES])]
    assert needed[0] - needed[1] == pytest.approx(held, rel=0.01)  # both of two blocks are staged


# ------------------------------------------------------------------------------ refresh
@pytest.mark.parametrize(
    ("default", "method", "full"),
    [("index", None, 4), ("index", ZERO, 2), (ZERO, None, 2), (ZERO, "index", 4)],
)
def test_auto_goes_by_the_method_of_the_run(
    cache, model, monkeypatch, default: str, method: str | None, full: int
) -> None:
    """The prompt's, or else the model's own."""
    monkeypatch.setattr(model.model.diffusion_model, "default_ref_method", default)
    own = cache_of(cache, refresh="auto")
    edit(own.patch(model), steps=8, cfg=1.0, method=method)
    assert own.record.steps_full == full
