"""Edits whose references are reused: what is computed, when, and what is told."""

from __future__ import annotations

import gc
import importlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET, node, text_to_image
from pack.tests.host import Host
from pack.tests.nodes import plain_transformer as plain
from pack.tests.nodes.slicing_models import conditioning, random, sample
from torch import Tensor

SIDES = (12, 10)


@pytest.fixture(scope="module")
def cache(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.reference_cache")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def settings(cache: ModuleType, **more: Any) -> Any:
    """Once recorded, exactly kept."""
    return replace(cache.Settings(refresh="first step", store_format="model"), **more)


def references(*seeds: int) -> list[Tensor]:
    """Pictures of different sizes."""
    sides = ((10, 12), (8, 7), (6, 6))
    return [random(1, 16, 1, *side, seed=seed) for side, seed in zip(sides, seeds, strict=False)]


def edit(patcher: Any, steps: int = 4, **more: Any) -> Tensor:
    """Two sides of CFG with texts of different lengths, and two references."""
    both = {"reference_latents": references(3, 4)}
    positive, negative = conditioning(**both), conditioning(9, seed=8, **both)
    return sample(patcher, positive, negative, SIDES, steps=steps, **more)


@pytest.mark.parametrize("exact", [{"refresh_every": 1}, {"drift_threshold": 0.0}])
@pytest.mark.parametrize("refresh", ["auto", "first step", "every n steps", "when drifted"])
def test_every_step_in_full_is_stock(
    cache: ModuleType, model: Any, exact: dict[str, Any], refresh: str
) -> None:
    own = cache.ReferenceCache(settings(cache, refresh=refresh, **exact))
    assert torch.equal(edit(own.patch(model)), edit(model))
    assert (own.record.steps_full, own.record.steps_reused) == (4, 0)


def test_references_are_computed_once(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache))
    found, expected = edit(own.patch(model)), edit(model)
    assert (own.record.steps_full, own.record.steps_reused) == (1, 3)
    assert not torch.equal(found, expected)


# ------------------------------------------------------------------------- an independent cache
def oracle(patcher: Any, refresh: Callable[[int], bool]) -> Any:
    """A clone whose forward passes are written out in plain_transformer.py, with the keys and
    values of the last step that `refresh` wants, for each condition by itself."""
    clone, kept, counts = patcher.clone(), {}, {}

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        names = ("x", "timestep", "context", "attention_mask", "ref_latents")
        call = dict(zip(names, args, strict=False))
        found = []
        for item, uuid in enumerate(args[6]["uuids"]):  # each condition apart
            part = {name: _item(value, item, args[6]) for name, value in call.items()}
            part.update(more)  # the reference method
            step = counts.get(uuid, 0)
            counts[uuid] = step + 1
            known = None if refresh(step) else kept[uuid]
            output, pairs = plain.forward(executor.class_obj, part, known)
            if known is None:
                kept[uuid] = pairs
            found.append(output)
        return torch.cat(found)

    clone.add_wrapper_with_key("diffusion_model", "qwen_vram.oracle", wrapper)
    return clone


def _item(value: Any, item: int, options: dict[str, Any]) -> Any:
    """The part of a batch that belongs to one condition."""
    if isinstance(value, list):
        return [_item(each, item, options) for each in value]
    return None if value is None else value.chunk(len(options["uuids"]))[item]


@pytest.mark.parametrize("batch, together", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("method", ["index", "index_timestep_zero"])
def test_each_condition_has_its_own(
    cache: ModuleType, model: Any, method: str, batch: int, together: bool
) -> None:
    own = cache.ReferenceCache(settings(cache, refresh="every n steps", refresh_every=2))
    more = {"reference_latents_method": method}
    positive = conditioning(reference_latents=references(3, 4), **more)
    # The same shapes go through the model together; other references and texts apart.
    negative = conditioning(13 if together else 9, seed=8, reference_latents=references(5, 6))
    negative[0][1].update(more)
    arguments = (positive, negative, SIDES, batch, 4)
    found = sample(own.patch(model), *arguments)
    expected = sample(oracle(model, lambda step: step % 2 == 0), *arguments)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)
    assert (own.record.steps_full, own.record.steps_reused) == (2, 2)
    error = (found - expected).norm() / (sample(model, *arguments) - expected).norm()
    assert error < 0.2


# ------------------------------------------------------------------------------ refresh
def steps_in_full(cache: ModuleType, model: Any, steps: int, **more: Any) -> set[int]:
    """Which steps were."""
    own = cache.ReferenceCache(settings(cache, **more))
    edit(own.patch(model), steps)
    assert own.record.in_full | own.record.reused == set(range(steps))
    return own.record.in_full


def test_refresh(cache: ModuleType, model: Any) -> None:
    every = {"refresh": "every n steps", "refresh_every": 3}
    assert steps_in_full(cache, model, 7, **every) == {0, 3, 6}
    assert steps_in_full(cache, model, 7, **every, full_last_steps=2) == {0, 3, 5, 6}
    assert steps_in_full(cache, model, 5, full_last_steps=1) == {0, 4}
    assert steps_in_full(cache, model, 5, full_last_steps=9) == set(range(5))
    drifted = {"refresh": "when drifted"}
    assert steps_in_full(cache, model, 5, **drifted, drift_threshold=1e-6) == set(range(5))
    assert steps_in_full(cache, model, 5, **drifted, drift_threshold=5.0) == {0}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "uni_pc", "lcm"])
def test_steps_are_those_of_the_schedule(cache: ModuleType, model: Any, sampler: str) -> None:
    own = cache.ReferenceCache(settings(cache, refresh="every n steps", refresh_every=2))
    edit(own.patch(model), 5, sampler_name=sampler)
    assert own.record.in_full == {0, 2, 4}
    # A second call in the step of a refresh, at another sigma, reuses what the first recorded.
    assert own.record.reused >= {1, 3}


def test_drift_is_told(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache, refresh="every n steps", refresh_every=2))
    edit(own.patch(model))
    assert 0 < own.record.drift < 1
    once = cache.ReferenceCache(settings(cache))
    edit(once.patch(model))
    assert once.record.drift is None
    assert once.record.facts()["drift"].startswith("not measurable")


# ------------------------------------------------------------------------------ stepping aside
def patched(kind: str) -> Callable[[Any], None]:
    """A patch of another node that does nothing, in this place."""
    return lambda clone: clone.set_model_patch(lambda *args, **more: args[0] if args else {}, kind)


def attention_patch(clone: Any) -> None:
    """As Flux KV Cache, PAG and others put."""
    clone.set_model_attn1_patch(lambda q, k, v, **more: {})


def block_replaced(clone: Any) -> None:
    """As Skip Layer Guidance does."""
    clone.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 1
    )


def flux_cache(clone: Any) -> None:
    """ComfyUI's own."""
    from comfy_extras.nodes_flux import KV_Attn_Input

    clone.set_model_attn1_patch(
        type(
            "KV_Attn_Input",
            (KV_Attn_Input,),
            {"__call__": lambda self, q, k, v, extra_options, **more: {}},
        )()
    )


def stranger(clone: Any) -> None:
    """A wrapper around the model of which nobody knows what it does."""
    clone.add_wrapper_with_key(
        "diffusion_model", "another.pack", lambda executor, *args, **more: executor(*args, **more)
    )


def compiled(clone: Any) -> None:
    """By ComfyUI's key for it."""
    clone.add_wrapper_with_key(
        "apply_model", "torch.compile", lambda executor, *args, **more: executor(*args, **more)
    )


def windows(clone: Any) -> None:
    """Context windows, of which none applies here."""
    clone.model_options["context_handler"] = SimpleNamespace(should_use_context=lambda *args: False)


ASIDE = {
    "attn1_patch": (attention_patch, "patch looks at the tokens (attention_patch.<locals>"),
    "double_block": (patched("double_block"), "patch looks at the tokens"),
    "post_input": (patched("post_input"), "patch looks at the tokens"),
    "a block": (block_replaced, "another node replaced blocks of the model"),
    "Flux KV Cache": (flux_cache, "ComfyUI's Flux KV Cache is on the model"),
    "a stranger": (stranger, "another node wraps the model (another.pack)"),
    "torch.compile": (compiled, "the model runs under torch.compile"),
    "context windows": (windows, "context windows cut the picture's frames"),
}


@pytest.mark.parametrize("name", ASIDE)
def test_it_steps_aside_for(cache: ModuleType, model: Any, name: str) -> None:
    act, reason = ASIDE[name]
    other = model.clone()
    act(other)
    own = cache.ReferenceCache(settings(cache))
    assert torch.equal(edit(own.patch(other)), edit(other))
    assert len(own.record.aside) == 1 and reason in own.record.aside[0]
    assert own.record.steps_reused == 0 and reason in own.record.line()
    assert own.record.bytes_held == {}


class Control:
    """Makes a ControlNet of ComfyUI's kind that adds to the tokens of the picture."""

    def __new__(cls) -> Any:
        import comfy.controlnet

        class Fake(comfy.controlnet.ControlBase):
            def get_control(self, x: Tensor, *_: Any) -> dict[str, Any]:
                return {"input": [torch.full((len(x), 30, 128), 0.1)]}

        return Fake()


def test_it_steps_aside_for_a_controlnet(cache: ModuleType, model: Any) -> None:
    both = {"reference_latents": references(3), "control": Control()}
    arguments = (conditioning(**both), conditioning(9, seed=8, **both), SIDES)
    own = cache.ReferenceCache(settings(cache))
    assert torch.equal(sample(own.patch(model), *arguments), sample(model, *arguments))
    assert own.record.aside == ["a ControlNet adds to the tokens"]


def test_it_steps_aside_for_keyframes_and_not_for_hooks(cache: ModuleType, model: Any) -> None:
    import comfy.hooks

    hook = comfy.hooks.WeightHook()
    group, frames = comfy.hooks.HookGroup(), comfy.hooks.HookKeyframeGroup()
    group.add(hook)
    obstacles = importlib.import_module(
        cache.__name__.replace("reference_cache", "cache_obstacles")
    )
    conds = {"positive": [{"hooks": group, "reference_latents": references(3)}]}
    assert obstacles.of_run(model, {}, conds, False) == ""
    frames.add(comfy.hooks.HookKeyframe(1.0))
    group.set_keyframes_on_hooks(frames)
    assert obstacles.of_run(model, {}, conds, False) == ""
    frames.add(comfy.hooks.HookKeyframe(0.5, start_percent=0.5))
    group.set_keyframes_on_hooks(frames)
    assert obstacles.of_run(model, {}, conds, False) == obstacles.KEYFRAMES


def test_it_steps_aside_in_training(
    cache: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management

    own = cache.ReferenceCache(settings(cache))
    expected = edit(model)
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    assert torch.equal(edit(own.patch(model)), expected)
    assert own.record.aside == ["the model is being trained"]


def test_without_references_it_is_stock(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache))
    assert torch.equal(sample(own.patch(model), sides=SIDES), sample(model, sides=SIDES))
    assert own.record.line().startswith("computed in full: there are no reference pictures")


def test_one_side_without_references_is_computed_as_ever(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache))
    positive = conditioning(reference_latents=references(3))
    sample(own.patch(model), positive, None, SIDES, steps=4)
    assert (own.record.steps_reused, own.record.aside) == (3, [])


def test_another_pack_s_parts_of_the_picture_are_computed_in_full(
    cache: ModuleType, model: Any
) -> None:
    """Two halves of one shape, of which nobody says which is which."""
    other = model.clone()

    def halves(apply: Any, given: dict[str, Any]) -> Tensor:
        parts = given["input"].chunk(2, -1)
        return torch.cat([apply(part, given["timestep"], **given["c"]) for part in parts], -1)

    other.set_model_unet_function_wrapper(halves)
    own = cache.ReferenceCache(settings(cache))
    assert torch.equal(edit(own.patch(other)), edit(other))
    assert own.record.aside == [
        "another node (model_function_wrapper) shows the model a part of the picture and does not "
        "say which"
    ]


def test_another_model_is_left_alone(cache: ModuleType, model: Any) -> None:
    obstacles = importlib.import_module(
        cache.__name__.replace("reference_cache", "cache_obstacles")
    )
    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    assert (
        obstacles.of_run(other, {}, {}, False)
        == "the model is not ComfyUI's own Qwen-Image (Linear)"
    )


# ------------------------------------------------------------------------------ causal
def causal(cache: ModuleType, patcher: Any, **conditions: Any) -> tuple[Tensor, Any]:
    """An edit whose references are computed once, whatever the other settings say, which is the
    same as in every step; and the cache's record."""
    given = {"causal": True, "refresh": "every n steps", "full_last_steps": 1}
    once, every = (
        cache.ReferenceCache(settings(cache, **given, refresh_every=count)) for count in (2, 1)
    )
    found, expected = (
        sample(own.patch(patcher), sides=SIDES, steps=4, **conditions) for own in (once, every)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert once.record.in_full == {0} and every.record.in_full == {0, 1, 2, 3}
    assert once.record.bytes_held["ram"] == once.record.bytes_expected > 0
    return found, once.record


@pytest.mark.parametrize("method", ["index", "index_timestep_zero", "negative_index", "offset"])
def test_causal_references_are_recorded_once(cache: ModuleType, model: Any, method: str) -> None:
    """Whatever the method says, they are placed and modulated as such checkpoints know them."""
    both = {"reference_latents": references(3, 4), "reference_latents_method": method}
    given = {"positive": conditioning(**both), "negative": conditioning(9, seed=8, **both)}
    found, record = causal(cache, model, **given)
    told = "causal takes the reference method {} for index_timestep_zero"
    assert (told.format(method) in record.notes) == (not method.startswith("index"))
    both["reference_latents_method"] = "index_timestep_zero"
    zero = {"positive": conditioning(**both), "negative": conditioning(9, seed=8, **both)}
    full = cache.ReferenceCache(settings(cache, causal=True, refresh_every=1)).patch(model)
    expected = sample(full, sides=SIDES, steps=4, **zero)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(found, sample(model, sides=SIDES, steps=4, **zero), atol=1e-2)


def test_causal_conditions_share_nothing(cache: ModuleType, model: Any) -> None:
    """Two that go together, as their texts are of one length, and one with another reference."""
    positive = conditioning(reference_latents=references(3, 4))
    positive += conditioning(seed=31, reference_latents=references(3, 4))
    negative = conditioning(9, seed=8, reference_latents=references(5))
    _, record = causal(cache, model, positive=positive, negative=negative)
    assert record.steps_reused == 3


def test_causal_references_under_other_weights_are_others(cache: ModuleType, model: Any) -> None:
    """A LoRA by a hook, on one side of CFG alone."""
    import comfy.hooks

    both = {"reference_latents": references(3, 4)}
    hook, hooks = comfy.hooks.WeightHook(1.0, 1.0), comfy.hooks.HookGroup()
    names = [
        name for name in model.model.state_dict() if name.endswith(("to_k.weight", "to_v.weight"))
    ]
    sizes = {name: model.model.state_dict()[name].shape for name in names}
    hook.weights = {name: ("diff", (0.2 * random(*sizes[name]),)) for name in names}
    hook.need_weight_init = False
    hooks.add(hook)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(**both), hooks)
    found, _ = causal(cache, model, positive=positive, negative=conditioning(9, seed=8, **both))
    without = {"positive": conditioning(**both), "negative": conditioning(9, seed=8, **both)}
    assert not torch.allclose(found, causal(cache, model, **without)[0], atol=1e-2)


# ------------------------------------------------------------------------------ the end of runs
class Stop(Exception):
    """In the middle of a run."""


def stopping(patcher: Any, at: int, error: BaseException) -> Any:
    """A clone whose forward pass number `at` fails behind its second block."""
    clone, calls = patcher.clone(), []

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        calls.append(args)
        output = executor(*args, **more)
        if len(calls) == at:
            raise error
        return output

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    return clone


@pytest.mark.parametrize("kind", ["error", "interrupt"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_after_a_failure_nothing_is_left(cache: ModuleType, model: Any, kind: str, at: int) -> None:
    import comfy.model_management

    interrupt = comfy.model_management.InterruptProcessingException
    error = Stop() if kind == "error" else interrupt()
    own = cache.ReferenceCache(settings(cache))
    patcher = own.patch(model)
    runs = kept_runs(own)
    with pytest.raises(type(error)):
        edit(stopping(patcher, at, error))
    assert own._run is None and runs[-1].slots.bytes_held() == {}
    assert own.record.ended == ("failed" if kind == "error" else "cancelled")
    assert own.record.line().startswith(own.record.ended)
    again = cache.ReferenceCache(settings(cache))
    assert torch.equal(edit(patcher), edit(again.patch(model)))


def kept_runs(own: Any) -> list[Any]:
    """The runs that it begins from now on."""
    runs, begin = [], own._begin
    own._begin = lambda *args: runs.append(begin(*args)) or runs[-1]
    return runs


def test_two_samplers_share_a_model_and_nothing_else(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache))
    patcher, runs = own.patch(model), kept_runs(own)
    first, second = edit(patcher), edit(patcher, seed=2)
    for seed, found in ((1, first), (2, second)):
        fresh = cache.ReferenceCache(settings(cache)).patch(model)
        assert torch.equal(edit(fresh, seed=seed), found)
    assert len(runs) == 2 and all(run.slots.bytes_held() == {} for run in runs)


def test_a_run_within_a_run_has_its_own(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache))
    patcher, inner = own.patch(model), []
    outer = patcher.clone()

    def nested(executor: Any, *args: Any, **more: Any) -> Any:
        if not inner:
            inner.append(edit(patcher, seed=5))
        return executor(*args, **more)

    outer.add_wrapper_with_key("outer_sample", "qwen_vram.test", nested)
    found = edit(outer)
    assert torch.equal(inner[0], edit(cache.ReferenceCache(settings(cache)).patch(model), seed=5))
    assert torch.equal(found, edit(cache.ReferenceCache(settings(cache)).patch(model)))
    assert own.record.steps_reused == 3


def test_it_keeps_no_model_alive(cache: ModuleType, model: Any) -> None:
    clone = cache.ReferenceCache(settings(cache)).patch(model)
    edit(clone)
    gone = weakref.ref(clone)
    del clone
    gc.collect()
    assert gone() is None


def test_a_second_one_replaces_the_first(cache: ModuleType, model: Any) -> None:
    first, second = (cache.ReferenceCache(settings(cache)) for _ in range(2))
    edit(second.patch(first.patch(model)))
    assert (first.record.steps, second.record.steps_reused) == (0, 3)


# ------------------------------------------------------------------------------ together with
@pytest.mark.parametrize("outside", [True, False])
def test_with_easycache(cache: ModuleType, model: Any, outside: bool) -> None:
    """Steps that it skips are neither recorded nor reused."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    def skipping(patcher: Any) -> Any:
        return EasyCacheNode.execute(patcher, 5.0, 0.15, 0.95, False)[0]

    own = cache.ReferenceCache(settings(cache))
    found = edit(own.patch(skipping(model)) if outside else skipping(own.patch(model)), 8)
    computed = own.record.in_full | own.record.reused
    assert own.record.in_full == {0} and 0 < len(computed) < 8
    assert found.isfinite().all() and own.record.aside == []


def test_what_is_released_is_recorded_again(cache: ModuleType, model: Any) -> None:
    """As the sampler's ladder does when memory is short."""
    own = cache.ReferenceCache(settings(cache))
    clone, calls = own.patch(model), []

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 5:  # the third step
            held = [part for part in args[5]["qwen_vram.holdings"]]
            assert [type(part).__name__ for part in held] == ["Run"]
            held[0].slots.clear()
        return executor(*args, **more)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    edit(clone)
    assert own.record.in_full == {0, 2} and own.record.reused == {1, 3}


# ------------------------------------------------------------------------------ the node
def graph_of(**inputs: Any) -> dict[str, Any]:
    """An edit with the node, on a tiny model."""
    graph = text_to_image(size=64)
    asked = {**asdict_of(), **inputs}
    graph["reference"] = node("EmptySD3LatentImage", width=64, height=96, batch_size=1)
    for side in ("positive", "negative"):
        before = graph["sampler"]["inputs"][side]
        graph[f"{side}_edit"] = node(
            "ReferenceLatent", conditioning=before, latent=["reference", 0]
        )
        graph["sampler"]["inputs"][side] = [f"{side}_edit", 0]
    graph["cache"] = node(
        "QwenVRAMReferenceCache", model=graph["sampler"]["inputs"]["model"], **asked
    )
    graph["sampler"]["inputs"]["model"] = ["cache", 0]
    return graph


def asdict_of() -> dict[str, Any]:
    """The node's defaults."""
    from pack.core.refresh_policy import MODES

    own = {"refresh": MODES[0], "refresh_every": 10, "drift_threshold": 0.2, "full_last_steps": 0}
    own |= {"store_format": "int8", "store_place": "auto", "causal": False, "region": False}
    return own | {"region_margin": 64, "region_threshold": 0.05}


def test_the_node_tells_on_itself_and_in_the_picture(
    host: Host, cache: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(cache.outcome, "tell", lambda text, *nodes: told.append((text, nodes)))
    info = {"workflow": {"nodes": []}}
    monkeypatch.setattr(cache.outcome._Info, "info", info)
    run = host.run(graph_of())
    assert run.status("cache")["text"] == cache.WAITS
    ((line, nodes),) = told
    assert nodes == ("cache",)
    assert line.startswith("reused in ") and "in RAM (int8)" in line


def test_the_defaults_are_those_of_the_schema(cache: ModuleType) -> None:
    inputs = {i.id: i.default for i in cache.ReferenceCacheNode.GET_SCHEMA().inputs[1:]}
    assert inputs == cache.asdict(cache.Settings()) == asdict_of()


def test_facts_for_the_metadata(cache: ModuleType, model: Any) -> None:
    own = cache.ReferenceCache(settings(cache, refresh="every n steps", refresh_every=2))
    edit(own.patch(model))
    facts = own.record.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["steps_full"] == [1, 3] and facts["steps_reused"] == 2
    assert facts["bytes"]["ram"] > 0 and facts["settings"]["refresh"] == "every n steps"


# ------------------------------------------------------------------------------ slots
def test_a_slot_gives_way_to_what_takes_its_place(cache: ModuleType) -> None:
    """ComfyUI calls both sides together or apart, as the free memory is: never kept twice."""
    slots = importlib.import_module(cache.__name__.replace("reference_cache", "reference_slots"))
    cpu, content = torch.device("cpu"), [random(2, 3)]
    both, one, other, tile = (
        slots.Key(cpu, part, conditions, (1,))
        for part, conditions in (
            ((), ("a", "b")),
            ((), ("a",)),
            ((), ("c",)),
            ((("tile", 1),), ("c",)),
        )
    )
    kept, released = slots.Slots(), []

    class Slot(slots.Slot):
        def release(self) -> None:
            released.append(self)

    first = kept.find(both, content, lambda: Slot([]), 0.9)
    assert kept.find(both, [content[0].clone()], lambda: Slot([]), 0.8) is first
    second = kept.find(one, content, lambda: Slot([]), 0.7)
    third = kept.find(other, content, lambda: Slot([]), 0.6)
    assert released == [first]
    content[0][0, 0] += 1  # written over in place: what was recorded with it is stale
    assert kept.find(one, content, lambda: Slot([]), 0.5) is not second
    assert released == [first, second]
    assert kept.find(tile, content, lambda: Slot([]), 0.4) is not third
    assert released == [first, second, third]  # the whole contains its tiles
