"""One forward pass as several smaller ones: apart, with smaller references, by tiles."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import SIDES, conditioning, random, sample, transformer
from torch import Tensor

BATCH = 2


@pytest.fixture(scope="module")
def reductions(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.reductions")


@pytest.fixture
def model(host: Host) -> Iterator[Any]:
    """A model of its own; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


class Recorder:
    """Stands for the rest of the forward pass: keeps what it gets, and answers with a function."""

    def __init__(self, answer: Any = lambda x, *_, **__: x) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return self.answer(*args, **kwargs)


def patched(reductions: ModuleType, model: Any, **plan: Any) -> tuple[Any, list[Any]]:
    """A clone whose forward passes run by a plan, and the arguments of each of its calls."""
    clone, calls = model.clone(), []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        def noting(*args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return executor(*args, **kwargs)

        noting.class_obj = executor.class_obj
        return reductions.forward(noting, reductions.Plan(**plan), *args, **kwargs)

    clone.add_wrapper_with_key("apply_model", "qwen_vram.test", wrapper)
    return clone, calls


def close(a: Tensor, b: Tensor, steps: float = 8) -> bool:
    """Equal up to some roundings of bfloat16, in which the tiny model computes."""
    return bool((a - b).abs().max() <= steps * 2**-8 * b.abs().max())


# ------------------------------------------------------------------------------ as asked
def test_no_plan_is_one_plain_call(reductions) -> None:
    recorder = Recorder()
    given = [random(2, 4, 8, 8), torch.ones(2), None, random(2, 3, 5), {"output": []}, {"a": 1}]
    out = reductions.forward(recorder, reductions.Plan(attention=8), *given, y=3)
    assert out is given[0]
    (args, kwargs), *others = recorder.calls
    assert all(a is b for a, b in zip(args, given, strict=True)) and kwargs == {"y": 3}
    assert not others


# ------------------------------------------------------------------------------ apart
def test_apart_computes_what_it_computes_together(reductions, model) -> None:
    references = {"reference_latents": [random(1, 16, 1, 12, 10)]}
    both = conditioning(**references), conditioning(seed=8, **references)
    clone, calls = patched(reductions, model, apart=True)
    assert close(sample(clone, *both, batch=BATCH), sample(model, *both, batch=BATCH))
    first = calls[:4]
    assert [args[0].shape[0] for args, _ in first] == [1] * 4
    options = [args[5] for args, _ in first]
    assert [o["cond_or_uncond"] for o in options] == [[1], [1], [0], [0]]
    assert options[0]["uuids"] == options[1]["uuids"] != options[2]["uuids"]
    assert all(o["sigmas"].shape == (1,) for o in options)
    assert {kwargs["ref_latents"][0].shape for _, kwargs in first} == {(1, 16, 1, 12, 10)}


QWEN_WITH = {
    "nothing else": {},
    "a recording attention": {"optimized_attention_override": lambda attend, *a, **k: attend(*a)},
    "a patch": {"patches": {"double_block": [print]}},
    "a replaced block": {"patches_replace": {"dit": {("double_block", 0): print}}},
    "EasyCache": {"wrappers": {"diffusion_model": {"easycache": [print]}}},
    "another wrapper": {"wrappers": {"apply_model": {"another's": [print]}}},
}


@pytest.mark.parametrize("what", [*QWEN_WITH, "no Qwen-Image"])
def test_apart_cuts_whatever_has_the_batch_first(reductions, what: str) -> None:
    """A batch of three on two sides of CFG: within a side only for a Qwen-Image of nobody else.

    Elsewhere the batch may be the frames of a video, or what a cache keeps for a side.
    """
    recorder = Recorder()
    inner = torch.nn.Linear(2, 2) if what not in QWEN_WITH else transformer(torch.float32)
    recorder.class_obj = SimpleNamespace(diffusion_model=inner)
    batch, hint = 6, random(6, 5, 4)
    size = 1 if what == "nothing else" else 3
    x, t, text = random(batch, 4, 8, 8), torch.arange(6.0), random(batch, 3, 5)
    options = {
        "cond_or_uncond": [1, 0],
        "uuids": ["u", "c"],
        "sigmas": torch.tensor([3.0, 3.0, 3.0]),
        "sample_sigmas": torch.arange(6.0),
        **QWEN_WITH.get(what, {}),
    }
    whole = random(1, 5, 4)
    out = reductions.forward(
        recorder,
        reductions.Plan(apart=True),
        x,
        t,
        None,
        text,
        {"input": [hint, None, whole]},
        options,
        ref_latents=[random(batch, 4, 2, 2)],
        method="index",
    )
    assert torch.equal(out, x)
    for index, (args, kwargs) in zip(range(0, batch, size), recorder.calls, strict=True):
        part = slice(index, index + size)
        assert torch.equal(args[0], x[part]) and torch.equal(args[1], t[part])
        assert torch.equal(args[3], text[part])
        assert torch.equal(args[4]["input"][0], hint[part])
        assert args[4]["input"][1] is None and args[4]["input"][2] is whole
        assert args[5]["cond_or_uncond"] == [1 if index < 3 else 0]
        assert args[5]["uuids"] == ["u" if index < 3 else "c"]
        assert args[5]["sigmas"].shape == (size,)
        assert kwargs["ref_latents"][0].shape == (size, 4, 2, 2) and kwargs["method"] == "index"
    assert options["cond_or_uncond"] == [1, 0]


def test_frames_that_are_one_side_stay_together(reductions) -> None:
    recorder, x = Recorder(), random(4, 4, 8, 8)
    reductions.forward(recorder, reductions.Plan(apart=True), x, torch.ones(4))
    assert [args[0] is x for args, _ in recorder.calls] == [True]
    odd = {"cond_or_uncond": [1, 0, 0]}
    assert reductions.together(None, x, odd) == 4


def test_no_tiles_where_easycache_compares_passes(reductions) -> None:
    options = QWEN_WITH["EasyCache"]
    plan, why = reductions.possible(reductions.Plan(tiles=2), random(1, 4, 8, 8), None, options)
    assert plan == reductions.Plan() and "EasyCache" in why


def test_areas_and_masks_of_prompts_go_on(reductions, model) -> None:
    mask = torch.zeros(1, SIDES[0] * 8, SIDES[1] * 8)
    mask[:, :100] = 1
    regions = [
        *conditioning(area=(20, 36, 0, 0), strength=1.0),
        *conditioning(seed=9, area=(24, 36, 16, 0), strength=0.7),
        *conditioning(seed=10, mask=mask, mask_strength=0.5),
    ]
    stock = sample(model, regions)
    clone, calls = patched(reductions, model, apart=True, reference_scale=0.5)
    assert close(sample(clone, regions), stock)
    assert {args[0].shape[-2:] for args, _ in calls} == {(20, 36), (24, 36), SIDES}
    assert not close(sample(model), stock)


# ------------------------------------------------------------------------------ references
def test_references_become_smaller_in_this_call_only(reductions, model) -> None:
    given = [random(1, 16, 1, 22, 18), random(1, 16, 1, 10, 7), random(1, 16, 1, 2, 2)]
    references = {"reference_latents": given}
    both = conditioning(**references), conditioning(seed=8, **references)
    clone, calls = patched(reductions, model, reference_scale=0.5)
    out = sample(clone, *both, steps=1)
    shapes = [tuple(latent.shape[-2:]) for latent in calls[0][1]["ref_latents"]]
    assert shapes == [(12, 8), (4, 4), (2, 2)]
    assert [tuple(latent.shape[-2:]) for latent in given] == [(22, 18), (10, 7), (2, 2)]
    assert not torch.equal(out, sample(model, *both, steps=1))


def test_a_smaller_reference_is_the_mean_of_its_areas(reductions) -> None:
    latent = random(1, 16, 1, 8, 12)
    smaller = reductions._smaller(latent, 0.5)
    means = latent.unflatten(-2, (4, 2)).unflatten(-1, (6, 2)).mean((-1, -3))
    torch.testing.assert_close(smaller, means)
    assert torch.equal(reductions._smaller(latent, 1.0), latent)


# ------------------------------------------------------------------------------ tiles
@pytest.mark.parametrize("shape", [(1, 16, 1, 40, 36), (2, 4, 33, 50)])
@pytest.mark.parametrize("tiles", [2, 3])
def test_tiles_of_what_looks_at_no_neighbour_blend_to_the_whole(
    reductions, shape: tuple[int, ...], tiles: int
) -> None:
    recorder = Recorder(lambda x, *_, **__: x * 3 + 1)
    x, concat, mask = random(*shape), random(*shape, seed=1), random(2, 7)
    out = reductions.forward(
        recorder, reductions.Plan(tiles=tiles), x, torch.ones(1), concat, None, mask=mask
    )
    torch.testing.assert_close(out, x * 3 + 1, rtol=1e-4, atol=1e-5)
    assert len(recorder.calls) >= tiles
    for args, kwargs in recorder.calls:
        assert args[0].shape == args[2].shape and kwargs["mask"] is mask
        side = torch.tensor(args[0].shape[-2:])
        assert (side < torch.tensor(shape[-2:])).any()


def test_one_tile_is_one_plain_call(reductions) -> None:
    recorder, x = Recorder(), random(1, 16, 1, 8, 8)
    assert reductions.forward(recorder, reductions.Plan(tiles=2), x, torch.ones(1)) is x


def test_tiles_of_the_model_see_whole_references(reductions, model) -> None:
    references = {"reference_latents": [random(1, 16, 1, 12, 10)]}
    both = conditioning(**references), conditioning(seed=8, **references)
    clone, calls = patched(reductions, model, tiles=2)
    out = sample(clone, *both, steps=1)
    assert torch.isfinite(out).all() and not torch.equal(out, sample(model, *both, steps=1))
    assert {tuple(args[0].shape[-2:]) for args, _ in calls} == {(28, 28)}
    assert {tuple(kwargs["ref_latents"][0].shape[-2:]) for _, kwargs in calls} == {(12, 10)}


def test_hints_of_a_controlnet_are_cut_to_the_tile(reductions) -> None:
    height, width = 40, 36
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(18.0), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(1, 360, 2)

    def answer(x: Tensor, t: Any, c: Any, text: Any, control: Any, options: Any) -> Tensor:
        hint = control["input"][0].unflatten(1, (x.shape[-2] // 2, x.shape[-1] // 2))
        assert control["input"][1] is None
        return hint.movedim(-1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    out = reductions.forward(
        Recorder(answer),
        reductions.Plan(tiles=2),
        random(1, 2, height, width),
        torch.ones(1),
        control={"input": [places, None], "output": []},
    )
    whole = places.unflatten(1, (20, 18)).movedim(-1, 1)
    whole = whole.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "control", "patches", "reason"),
    [
        ((1, 16, 1, 40, 36), None, {"double_block": [print], "post_input": []}, "(double_block)"),
        ((1, 16, 5, 40, 36), None, {}, "no single picture"),
        ((1, 16, 99), None, {}, "no single picture"),
        ((1, 16, 1, 40, 36), {"input": [random(1, 90, 8)]}, {}, "grid"),
        ((1, 16, 1, 41, 36), {"input": [random(1, 378, 8)]}, {}, "grid"),
    ],
)
def test_what_cannot_be_tiled_runs_whole_and_says_so(
    reductions, shape: tuple[int, ...], control: Any, patches: Any, reason: str
) -> None:
    plan, options, x = reductions.Plan(tiles=2, apart=True), {"patches": patches}, random(*shape)
    left, told = reductions.possible(plan, x, control, options)
    assert left == reductions.Plan(apart=True) and reason in told
    recorder = Recorder()
    reductions.forward(recorder, plan, x, torch.ones(1), None, None, control, options)
    assert [args[0] is x for args, _ in recorder.calls] == [True]


def test_slices_of_a_compiled_model_are_left_out_and_it_says_so(reductions) -> None:
    options = {"wrappers": {"apply_model": {"torch.compile": [print]}}}
    plan, x = reductions.Plan(feed_forward=4, tiles=2, attention=2, projections=2), random(1, 4, 9)
    left, told = reductions.possible(plan, x, None, options)
    assert left == reductions.Plan()
    assert told == f"{reductions.COMPILED} {reductions.NO_PICTURE}"
    assert reductions.possible(left, x, None, options) == (left, "")
