"""A Qwen-Image transformer in slices computes what it computes whole, in less memory."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.graphs import LORA, UNET
from pack.tests.host import Host
from pack.tests.live_bytes import LiveBytes
from pack.tests.nodes.slicing_models import inputs, random, sample, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")
QUARTERS = {"feed_forward": 4}
THIRDS = {"projections": 3}
QUERIES = {"projections": 3, "attention": 5}
EVERYTHING = {**QUARTERS, **QUERIES}
SHAPES = {
    "one": {},
    "odd": {"sides": (41, 35)},
    "two": {"batch": 2, "sides": (34, 30)},
    "mask": {"batch": 2, "sides": (34, 30), "mask": True},
    "references": {"sides": (30, 26), "references": True},
}
NARROW, WIDE = (4, 32), (2, 128)


@pytest.fixture(scope="module")
def slicing(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.slicing")


@pytest.fixture
def load(host: Host) -> Iterator[Any]:
    """Loads a model of its own from a file; afterwards the host has forgotten it."""
    import comfy.model_management

    folder, architectures = host.models / "diffusion_models", host.part("nodes.architectures")
    loading = torch.inference_mode()(architectures.load_transformer)  # as the executor calls it
    yield lambda name=UNET: loading(str(folder / name), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def wrapped(slicing: ModuleType, plans: Any, **options: Any) -> dict[str, Any]:
    """Transformer options with our wrapper, as a patched model's sampler passes them."""
    wrapper = partial(slicing._run, plans)
    return {"wrappers": {"diffusion_model": {slicing.KEY: [wrapper]}}, **options}


@torch.inference_mode()
def run(slicing: ModuleType, model: Any, given: dict[str, Any], **plan: int) -> Tensor:
    """The transformer's forward pass by a plan."""
    plans = slicing.Plans()
    plans.set(CPU, slicing.Plan(**plan))
    return model(**given, transformer_options=wrapped(slicing, plans))


def patched(slicing: ModuleType, patcher: Any, **plan: int) -> tuple[Any, Any]:
    """A clone that runs by a plan, and its plans."""
    clone, plans = patcher.clone(), slicing.Plans()
    assert slicing.install(clone, plans) == ""
    plans.set(CPU, slicing.Plan(**plan))
    return clone, plans


# ------------------------------------------------------------------------------ the same picture
# Where the CPU has no bfloat16 it takes ten times as long: each kind of input once.
@pytest.mark.parametrize(
    ("dtype", "shape", "heads", "ref"),
    [
        *((torch.float32, shape, NARROW, "index") for shape in SHAPES),
        (torch.float32, "two", WIDE, "index"),
        (torch.float32, "references", WIDE, "index"),
        (torch.float32, "references", NARROW, "index_timestep_zero"),
        (torch.bfloat16, "odd", NARROW, "index"),
        (torch.bfloat16, "mask", NARROW, "index"),
        (torch.bfloat16, "references", WIDE, "index"),
    ],
)
def test_slices_give_the_same_bits_and_queries_in_slices_round(
    slicing: ModuleType, dtype: torch.dtype, shape: str, heads: tuple[int, int], ref: str
) -> None:
    model, given = transformer(dtype, *heads, ref), inputs(dtype, **SHAPES[shape])
    with torch.inference_mode():
        stock = model(**given)
    for plan in ({}, QUARTERS, THIRDS):
        assert torch.equal(run(slicing, model, given, **plan), stock), plan
    step = torch.finfo(dtype).eps * stock.abs().max()
    for plan in (QUERIES, EVERYTHING):
        difference = (run(slicing, model, given, **plan) - stock).abs().max()
        assert difference <= 3 * step, plan
    with torch.inference_mode():
        assert torch.equal(model(**given), stock)


def test_a_whole_sampling_run_gives_the_same_bits_also_with_a_lora(slicing, load, host) -> None:
    model = load()
    with_lora = host.nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)[0]
    results = []
    for patcher in (model, with_lora):
        stock = sample(patcher)
        clone, plans = patched(slicing, patcher, **QUARTERS, **THIRDS)
        assert torch.equal(sample(clone), stock)
        assert torch.equal(sample(patcher), stock)
        assert plans.reasons() == ()
        results.append(stock)
    assert not torch.equal(*results)


def test_a_scaled_fp8_file_gives_the_same_bits(slicing, load, host) -> None:
    from pack.tests.nodes.test_quantised_files import scaled_fp8

    folder = host.models / "diffusion_models"
    target = folder / "scaled_for_slices.safetensors"
    save_file(scaled_fp8(load_file(folder / UNET), "transformer_blocks."), target)
    model = load(target.name)
    clone, plans = patched(slicing, model, **QUARTERS, **THIRDS)
    assert torch.equal(sample(clone), sample(model))
    assert plans.reasons() == ()
    target.unlink()


# ------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({}, 11.0),  # 3 of the stream, 8 inside the feed-forward
        ({"feed_forward": 16}, 10.3),  # now attention is the peak
        ({"feed_forward": 16, "projections": 16}, 7.2),
        ({"feed_forward": 4, "projections": 4, "attention": 4}, 5.1),
        ({"feed_forward": 16, "projections": 16, "attention": 16}, 4.4),
    ],
)
def test_slices_lower_the_peak_of_a_block(slicing, plan: dict[str, int], expected: float) -> None:
    """In units of the image stream, the block's input included; 64 text tokens add 3 %."""
    model = transformer(torch.bfloat16, heads=8)
    sliced = slicing._sliced_model(model, slicing.Plan(**plan), {}, slicing.Plans())
    with torch.inference_mode():
        x, text, temb, pe = (
            random(*shape).bfloat16()
            for shape in ((1, 2048, 256), (1, 64, 256), (1, 256), (1, 1, 2112, 16, 2, 2))
        )
        with LiveBytes() as live:
            sliced.transformer_blocks[0](x, text, None, temb, pe)
    unit = x.numel() * x.element_size()
    assert 1 + live.peak / unit == pytest.approx(expected, abs=0.1)


# ------------------------------------------------------------------------------ clones and devices
def test_a_sliced_clone_leaves_nothing_behind(slicing, load) -> None:
    import comfy.model_management

    model = load()
    stock = sample(model)
    modules = list(model.model.modules())
    clone, plans = patched(slicing, model, **EVERYTHING)
    sample(clone)
    assert list(model.model.modules()) == modules
    gone = [weakref.ref(thing) for thing in (clone, plans)]
    comfy.model_management.unload_all_models()
    gc.collect()
    gc.disable()
    try:
        del clone, plans
        assert [ref() for ref in gone] == [None, None]
        assert torch.equal(sample(model), stock)
        assert list(model.model.modules()) == modules
        sample(patched(slicing, model, **EVERYTHING)[0])
        comfy.model_management.unload_all_models()
        gone = [weakref.ref(thing) for thing in (model.model, *modules)]
        del modules, model
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()


def test_a_failure_in_a_slice_leaves_nothing_behind(slicing, load) -> None:
    model = load()
    stock = sample(model)
    clone, plans = patched(slicing, model, **EVERYTHING)
    calls = []

    def fails(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("a test wants it")
        return function(*args, **kwargs)

    fails.sliceable = True
    clone.model_options["transformer_options"]["optimized_attention_override"] = fails
    with pytest.raises(torch.OutOfMemoryError):
        sample(clone)
    assert torch.equal(sample(model), stock)
    plans.reset()
    assert torch.equal(sample(clone), stock)


def test_a_clone_for_another_device_runs_its_own_model_in_slices(slicing, load) -> None:
    """A second device cannot be had on a CPU; what the host does for one is the same."""
    clone, plans = patched(slicing, load(), **QUARTERS)
    with torch.inference_mode():
        other = clone.deepclone_multigpu()
        assert other.model is not clone.model
        other.model.diffusion_model.proj_out.weight.mul_(2)
    seen = watch(other)
    doubled, stock = sample(other), sample(clone)
    assert not torch.equal(doubled, stock)
    assert len(seen) == 2 * 2 * 4 and all(rows < 360 for rows in seen)  # steps, blocks, slices
    clone.set_additional_models("multigpu", [other])
    clone.match_multigpu_clones()
    matched = clone.get_additional_models_with_key("multigpu")[0]
    assert torch.equal(sample(matched), doubled)


def watch(patcher: Any) -> list[int]:
    """The number of rows in each call of a feed-forward of this model's image stream."""
    seen: list[int] = []
    for block in patcher.model.diffusion_model.transformer_blocks:
        layer = block.img_mlp.net[2]
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def test_each_device_has_its_own_plan(slicing) -> None:
    plans = slicing.Plans()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    plans.set(first, slicing.Plan(attention=4))
    assert plans.of(torch.device("cuda")).attention == 4
    assert plans.of(second) == plans.of(CPU) == slicing.Plan()
    plans.reset()
    assert plans.of(first) == slicing.Plan()


# ------------------------------------------------------------------------------ other nodes
def test_only_a_qwen_image_can_be_sliced(slicing, load) -> None:
    model = load()
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    assert "not ComfyUI's own Qwen-Image (Linear)" in slicing.install(model, slicing.Plans())
    assert model.get_wrappers("diffusion_model", slicing.KEY) == []


def test_installing_twice_runs_by_the_last_plans(slicing, load) -> None:
    clone, _ = patched(slicing, load(), **QUARTERS)
    last, plans = patched(slicing, clone)
    assert len(last.get_wrappers("diffusion_model", slicing.KEY)) == 1
    seen = watch(last)
    sample(last, steps=1)
    assert seen == [360, 360]


def test_a_patch_of_whole_queries_gets_them(slicing, load) -> None:
    clone, plans = patched(slicing, load(), **EVERYTHING)
    tokens = []

    def patch(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        tokens.append((q.shape[2], k.shape[2]))
        return {"q": q * 0.9}

    clone.set_model_attn1_patch(patch)
    stock = clone.clone()
    stock.remove_wrappers_with_key("diffusion_model", slicing.KEY)
    seen = watch(clone)
    assert torch.equal(sample(clone), sample(stock))
    assert set(tokens) == {(373, 373)} and seen[:4] == [64, 64, 128, 104]
    assert plans.reasons() == (slicing.WHOLE_QUERIES,)


def test_an_override_of_attention_gets_slices_with_all_keys(slicing, load) -> None:
    clone, _ = patched(slicing, load(), **QUERIES)
    shapes = []

    def override(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append((q.shape[2], k.shape[2], v.shape[2]))
        return function(q, k, v, *args, **kwargs)

    override.sliceable = True
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(clone, steps=1)
    assert [q for q, _, _ in shapes[:6]] == [77, 64, 64, 64, 104, 77]
    assert {(k, v) for _, k, v in shapes} == {(373, 373)}


def test_a_module_that_another_node_patched_runs_whole_until_it_is_stock_again(
    slicing, load
) -> None:
    model = load()
    stock = sample(model)
    path = "diffusion_model.transformer_blocks.1.img_mlp"
    theirs = model.clone()
    theirs.add_object_patch(f"{path}.forward", lambda x: x * 0.5)
    expected = sample(theirs)
    clone, plans = patched(slicing, theirs, **QUARTERS)
    assert torch.equal(sample(clone), expected) and not torch.equal(expected, stock)
    assert plans.reasons() == (slicing.REPLACED.format("feed-forward"),)
    clone, plans = patched(slicing, model, **QUARTERS)  # the host leaves `forward` on the module
    seen = watch(clone)
    assert torch.equal(sample(clone), stock)
    assert plans.reasons() == () and max(seen) < 360


def test_a_transformer_that_another_node_patched_runs_whole_until_it_is_stock_again(
    slicing, load
) -> None:
    model = load()
    stock = sample(model)
    theirs = model.clone()
    own = type(model.model.diffusion_model)._forward
    halved = partial(own, model.model.diffusion_model)
    theirs.add_object_patch("diffusion_model._forward", lambda *a, **k: halved(*a, **k) * 0.5)
    expected = sample(theirs)
    clone, plans = patched(slicing, theirs, **QUARTERS)
    assert torch.equal(sample(clone), expected) and not torch.equal(expected, stock)
    assert plans.reasons() == (slicing.REPLACED.format("transformer"),)
    clone, plans = patched(slicing, model, **QUARTERS)
    seen = watch(clone)
    assert torch.equal(sample(clone), stock)
    assert plans.reasons() == () and max(seen) < 360


def test_a_patch_of_whole_blocks_goes_on(slicing, load) -> None:
    def patch(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        out = more["original_block"](args)
        return {**out, "img": out["img"] + 0.1 * args["img"]}

    theirs = load()
    theirs.set_model_patch_replace(patch, "dit", "double_block", 0)
    expected = sample(theirs)
    clone, plans = patched(slicing, theirs, **QUARTERS, **THIRDS)
    seen = watch(clone)
    assert torch.equal(sample(clone), expected)
    assert plans.reasons() == () and max(seen) < 360


def test_a_compiled_model_runs_whole(slicing, load, monkeypatch) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone, _ = patched(slicing, load(), **EVERYTHING)
    set_torch_compile_wrapper(clone, backend="eager")
    seen = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(slicing.compiled(args[5]))
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key("apply_model", "test", wrapper)
    stock = sample(load(), steps=1)
    monkeypatch.setattr(slicing, "_sliced_model", None)  # nobody may call it
    assert torch.allclose(sample(clone, steps=1), stock, atol=1e-2)
    assert seen == [True]


def test_layers_that_scale_their_input_by_its_largest_value_are_told(slicing) -> None:
    model, plans = transformer(torch.bfloat16), slicing.Plans()
    layer = model.transformer_blocks[1].img_mlp.net[2]
    layer.quant_format, layer._full_precision_mm = "nvfp4", False
    layer.input_scale = torch.ones(())
    plan = slicing.Plan(**QUARTERS)
    slicing._sliced_model(model, plan, {}, plans)
    assert plans.reasons() == ()
    layer.input_scale = None
    slicing._sliced_model(model, plan, {}, plans)
    assert plans.reasons() == (slicing.OWN_SCALES,)


def test_a_run_stops_in_the_middle_of_a_forward_pass(slicing, load) -> None:
    import comfy.model_management

    clone, _ = patched(slicing, load(), **QUERIES)
    calls = []

    def stops(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:  # the text's queries, and two slices
            comfy.model_management.interrupt_current_processing()
        return function(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = stops
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(clone)
    assert len(calls) == 3


def test_each_slice_looks_whether_the_user_stops_the_run(slicing) -> None:
    import comfy.model_management
    from comfy.ldm.qwen_image.model import FeedForward

    whole = FeedForward(8, operations=torch.nn)  # layers that do not look, unlike the host's own
    sliced = slicing._copy(whole, slicing.SlicedFeedForward)
    sliced.plan = slicing.Plan(**QUARTERS)
    rows = []

    def stops(_: Any, args: Any) -> None:
        rows.append(args[0].shape[1])
        if len(rows) == 2:
            comfy.model_management.interrupt_current_processing()

    whole.net[0].proj.register_forward_pre_hook(stops)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sliced(random(1, 256, 8))
    assert rows == [64, 64]


def test_training_runs_whole(slicing, monkeypatch) -> None:
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)
    model, given, plans = transformer(torch.float32), inputs(torch.float32), slicing.Plans()
    plans.set(CPU, slicing.Plan(**EVERYTHING))
    out = model(**given, transformer_options=wrapped(slicing, plans))
    assert torch.equal(out, model(**given)) and plans.reasons() == (slicing.TRAINING,)
