"""Which calls of the model share what a reference cache keeps, and which must not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import conditioning, random, sample
from torch import Tensor

SIDES = (12, 10)
REFERENCES = (random(1, 16, 1, 10, 12, seed=3), random(1, 16, 1, 8, 7, seed=4))


@pytest.fixture(scope="module")
def cache(host: Host) -> ModuleType:
    """The module of the node."""
    return host.part("nodes.reference_cache")


@pytest.fixture(scope="module")
def runs(host: Host) -> ModuleType:
    """The module of what happens in a run."""
    return host.part("nodes.reference_run")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def cached(cache: ModuleType, **more: Any) -> Any:
    """Recorded once, exactly kept."""
    wanted = {"refresh": "first step", "store_format": "model", **more}
    return cache.ReferenceCache(cache.Settings(**wanted))


def edit(patcher: Any, negative: int = 9, steps: int = 3, **more: Any) -> Tensor:
    """Two sides of CFG; `negative`: how many tokens of text the second one has, the first has 13."""
    both = {"reference_latents": list(REFERENCES)}
    both["reference_latents_method"] = "index_timestep_zero"  # which causal wants
    sides = conditioning(**both), conditioning(negative, seed=8, **both)
    return sample(patcher, *sides, SIDES, steps=steps, **more)


# ------------------------------------------------------------------------------ identity
CALL = {
    "x": random(1, 16, 1, *SIDES),
    "context": random(1, 13, 8),
    "mask": torch.ones(1, 13),
    "references": list(REFERENCES),
    "condition": torch.tensor([0.5]),
    "method": "index",
    "attention": print,
    "uuids": ("a",),
    "sides": (0,),
    "part": (),
}
OTHER = {
    "x": random(1, 16, 1, *SIDES).to("meta"),
    "context": random(1, 13, 8, seed=7),
    "mask": torch.zeros(1, 13),
    "references": [REFERENCES[0], REFERENCES[1] + 1],
    "condition": torch.tensor([0.6]),
    "method": "index_timestep_zero",
    "attention": repr,
    "uuids": ("b",),
    "sides": (1,),
    "part": (("tile", 1),),
}


def slot_of(run: Any, slots: Any, sigma: float, **changed: Any) -> Any:
    """The one that such a call of the model has at a sigma."""
    call = {**CALL, **changed}
    options = {
        "uuids": call["uuids"],
        "cond_or_uncond": call["sides"],
        "optimized_attention_override": call["attention"],
        "qwen_vram.part": call["part"],
    }
    names = ("x", "x", "context", "mask", "references", "condition")
    arguments = [call[name] for name in names]
    return slots.find(*run._identity(arguments, options, call["method"]), run.make, sigma)


@pytest.fixture
def run(host: Host, runs: ModuleType) -> Any:
    """As far as `slot_of` needs one."""
    own = SimpleNamespace(make=lambda: host.part("nodes.reference_slots").Slot([]))
    own._identity = lambda *args: runs.Run._identity(own, *args)
    return own


@pytest.mark.parametrize("name", [*CALL, "size", "dtype"])
def test_what_differs_in_anything_has_a_slot_of_its_own(host, run, name: str) -> None:
    slots = host.part("nodes.reference_slots").Slots()
    first = slot_of(run, slots, 1.0)
    assert slot_of(run, slots, 0.9) is first
    more = {"size": CALL["x"][..., :8], "dtype": CALL["x"].half()}
    changed = {"x": more[name]} if name in more else {name: OTHER[name]}
    assert slot_of(run, slots, 0.8, **changed) is not first
    found = [slot_of(run, slots, 0.7), slot_of(run, slots, 0.6)]
    # Other devices, conditions and sides of CFG stand beside the first; the rest took its place.
    assert found == [first] * 2 if name in ("x", "uuids", "sides") else first not in found
    shown = ("context", "mask", "references", "condition", "method", "attention", "dtype")
    assert slots.changed == (name in shown)


def test_a_call_at_the_same_sigma_takes_no_slot_away(host, run) -> None:
    slots = host.part("nodes.reference_slots").Slots()
    both = {"uuids": ("a", "b"), "sides": (1, 0)}
    first = slot_of(run, slots, 1.0, **both)
    assert slot_of(run, slots, 1.0, uuids=("b",)) is not first  # no pass has succeeded with it yet
    first = slot_of(run, slots, 1.0, **both)
    first.sigma = 1.0
    for other in ({"uuids": ("b",)}, {**both, "attention": repr}):
        assert slot_of(run, slots, 1.0, **other) is None
    assert slot_of(run, slots, 1.0, **both) is first
    assert slot_of(run, slots, 0.9, uuids=("b",)) not in (None, first)


# ------------------------------------------------------------------------------ other attention
def perturbed(patcher: Any, found: list[Tensor]) -> Any:
    """As perturbed guidance does: the positive side once more, with other attention."""
    import comfy.samplers

    def other(function: Any, q: Tensor, *args: Any, **more: Any) -> Tensor:
        return function(q * 0.2, *args, **more)

    def act(args: dict[str, Any]) -> Tensor:
        options = dict(args["model_options"])
        inner = {**options["transformer_options"], "optimized_attention_override": other}
        options["transformer_options"] = inner
        given = args["model"], [args["cond"]], args["input"], args["sigma"], options
        found.extend(comfy.samplers.calc_cond_batch(*given))
        return args["denoised"]

    clone = patcher.clone()
    clone.set_model_sampler_post_cfg_function(act)
    return clone


@pytest.mark.parametrize("negative", [9, 13])  # apart, or together
def test_two_calculations_of_one_condition_share_nothing(cache, runs, model, negative) -> None:
    own, found, expected = cached(cache), [], []
    with_it = edit(perturbed(own.patch(model), found), negative)
    edit(perturbed(model, expected), negative)
    assert torch.equal(with_it, edit(cached(cache).patch(model), negative))
    assert torch.equal(found[0], expected[0])  # later the picture is a little different
    assert own.record.steps_reused == 2 and own.record.aside == [runs.TWICE]


def test_attention_that_changes_in_a_run_is_never_mixed(cache, runs, model) -> None:
    """Another function in each pass: nothing can be reused, and the node says why."""
    own = cached(cache)
    clone = own.patch(model)

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        other = lambda function, *given, **named: function(*given, **named)  # noqa: E731
        *before, options = args
        return executor(*before, {**options, "optimized_attention_override": other}, **more)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    assert torch.equal(edit(clone), edit(model))
    assert own.record.in_full == {0, 1, 2} and runs.CHANGED in own.record.line()


def bypassing(model: Any, when: Callable[[], bool], blocks: int = 2) -> Any:
    """A clone of which so many blocks compute attention without what stands in ComfyUI's slot."""
    from comfy.ldm.qwen_image.model import Attention

    def forward_of(module: Any) -> Any:
        def forward(*args: Any, transformer_options: dict[str, Any], **more: Any) -> Any:
            options = dict(transformer_options)
            if when():
                options.pop("optimized_attention_override", None)
            return Attention.forward(module, *args, transformer_options=options, **more)

        return forward

    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks[:blocks]):
        name = f"diffusion_model.transformer_blocks.{index}.attn.forward"
        clone.add_object_patch(name, forward_of(block.attn))
    return clone


def watched(own: Any, model: Any) -> tuple[Any, list[tuple[str, int]]]:
    """A cache's clone, and after each step why nothing is reused any more and what is held."""
    clone, found = own.patch(model), []

    def look(args: dict[str, Any]) -> Tensor:
        found.append((own._run.off, sum(own._run.slots.bytes_held().values())))
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(look)
    return clone, found


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"causal": True, "refresh_every": 1}])
def test_it_steps_aside_for_attention_that_does_not_come_by(
    cache, runs, model, more: dict[str, Any], blocks: int
) -> None:
    other = bypassing(model, lambda: True, blocks)
    own = cached(cache, **more)
    patched, left = watched(own, other)
    found = edit(patched)
    assert left == [(runs.NO_ATTENTION, 0)] * 3
    assert own.record.aside == [runs.NO_ATTENTION] and own.record.bytes_held == {}
    assert (runs.NOT_CAUSAL in own.record.line()) == bool(more)
    assert own.record.in_full | own.record.reused == set()
    if blocks == 2 or not more:  # else a part of the very first pass was causal
        assert torch.equal(found, edit(other))


def test_what_one_side_recorded_goes_when_the_other_side_cannot(cache, runs, model) -> None:
    own = cached(cache)
    patched, left = watched(own, bypassing(model, lambda: bool(own.record.in_full)))
    assert torch.equal(edit(patched), edit(model))
    assert left == [(runs.NO_ATTENTION, 0)] * 3


def test_attention_that_goes_in_the_middle_of_a_run_ends_it(cache, runs, model) -> None:
    own = cached(cache)
    other = bypassing(model, lambda: bool(own.record.in_full))
    with pytest.raises(RuntimeError, match="took the reference cache's attention away"):
        edit(own.patch(other), negative=13)
    assert own.record.ended == "failed"


def test_an_obstacle_is_told_once_and_that_causal_is_off(cache, runs, model) -> None:
    other = model.clone()
    other.model_options["context_handler"] = SimpleNamespace(should_use_context=lambda *_: False)
    own = cached(cache, causal=True)
    edit(own.patch(other), steps=1)
    told = f"computed in full: context windows cut the picture's frames · {runs.NOT_CAUSAL} ·"
    assert own.record.line().startswith(told)


# ------------------------------------------------------------------------------ areas, LoRA hooks
def test_prompts_for_areas_are_reused_on_both_sides_of_cfg(host, cache, model) -> None:
    """ComfyUI gives the negative side a copy of each, with the id of the positive one."""
    expected_bytes = host.part("nodes.reference_memory").expected_bytes
    both = {"reference_latents": list(REFERENCES)}
    first, second = ({"area": (8, 8, *corner), "strength": 1.0} for corner in ((0, 0), (8, 6)))
    positive = [*conditioning(**both, **first), *conditioning(seed=4, **both, **second)]
    negative = conditioning(9, seed=8, reference_latents=[REFERENCES[0]])
    own = cached(cache)
    sample(own.patch(model), positive, negative, (16, 16), steps=2)
    assert (own.record.in_full, own.record.reused, own.record.aside) == ({0}, {1}, [])
    conds = {"positive": [each[1] for each in positive], "negative": [negative[0][1]]}
    need = expected_bytes(model, conds, (1, 16, 1, 16, 16), "model")
    assert own.record.bytes_held["ram"] == own.record.bytes_expected == need


def test_causal_with_other_weights_on_one_side(cache, model) -> None:
    """A LoRA of the positive prompt alone makes other keys and values of the same references."""
    import comfy.hooks

    weights = model.model.state_dict()
    names = [name for name in weights if name.endswith("attn.to_k.weight")]

    def hooked(patcher: Any) -> Tensor:
        hook = comfy.hooks.WeightHook(1.0, 1.0)
        hook.weights = {name: ("diff", (random(*weights[name].shape) * 0.2,)) for name in names}
        hook.need_weight_init = False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        both = {"reference_latents": list(REFERENCES)}
        positive = comfy.hooks.set_hooks_for_conditioning(conditioning(**both), group)
        return sample(patcher, positive, conditioning(9, seed=8, **both), SIDES, steps=3)

    own = cached(cache, causal=True)
    found = hooked(own.patch(model))
    expected = hooked(cached(cache, causal=True, refresh_every=1).patch(model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert own.record.steps_reused == 2


# ------------------------------------------------------------------------------ the schedule
def test_a_sampler_that_walks_its_schedule_twice_begins_anew(cache, runs, model) -> None:
    own, found = cached(cache), []
    clone = own.patch(model)

    def twice(executor: Any, *args: Any, **more: Any) -> Tensor:
        found.extend(executor(*args, **more) for _ in range(2))
        return found[-1]

    clone.add_wrapper_with_key("outer_sample", "qwen_vram.test", twice)
    edit(clone, steps=4, seed=2)
    assert torch.equal(*found) and runs.BACK in own.record.notes
    assert own.record.in_full == {0}


def test_steps_that_were_not_computed_do_not_count(cache, model) -> None:
    early_exit = model.clone()

    class Enough(Exception):
        pass

    def stop(executor: Any, *args: Any, **more: Any) -> Any:
        try:
            return executor(*args, **more)
        except Enough:
            return args[4]

    def step(executor: Any, *args: Any, **more: Any) -> Tensor:
        if len(own.record.computed) == 2:
            raise Enough
        return executor(*args, **more)

    early_exit.add_wrapper_with_key("sampler_sample", "qwen_vram.test", stop)
    early_exit.add_wrapper_with_key("predict_noise", "qwen_vram.test", step)
    own = cached(cache)
    edit(own.patch(early_exit), steps=5)
    line = own.record.line()
    assert line.startswith(
        "reused in 1 of 2 steps · 3 of the 5 steps of the schedule were not comp"
    )
    assert own.record.facts()["steps_computed"] == 2


def test_where_all_steps_are_last_steps_nothing_is_kept(cache, model) -> None:
    own = cached(cache, full_last_steps=3)
    assert torch.equal(edit(own.patch(model)), edit(model))
    assert own.record.bytes_held == {} and own.record.in_full == {0, 1, 2}
