"""Samplers that are left early: when, with what picture, and what is said of it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.tests.examples import examples
from pack.tests.graphs import UNET, node, text_to_image
from pack.tests.host import Host, RunError
from pack.tests.nodes.faults import Faults, blocks_fail, small, transformer, within
from pack.tests.nodes.slicing_models import conditioning, random
from pack.tests.nodes.test_fitting import queued
from pack.tests.nodes.test_tiled_diffusion import by_position, predicting
from PIL import Image
from torch import Tensor

SHAPE = (1, 16, 1, 8, 8)
ANY = 1e9  # a threshold that every change is under
STEPS = 8
OWN_STEPS = ("dpm_fast", "dpm_adaptive")  # they take fewer than they are asked for
SAMPLERS = 44  # names that ComfyUI offers; the test of their number tells when there are more


@pytest.fixture(scope="module")
def early(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.early_exit")


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


class Made(NamedTuple):
    """What a sampler gave; `steps`: what its callback was told, as (step, x0, x, total)."""

    latent: Tensor
    steps: list[tuple[int, Tensor, Tensor, int]]


@torch.inference_mode()
def sampled(
    model: Any,
    sampler: str | Any = "euler",
    scheduler: str = "simple",
    steps: int = STEPS,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    sigmas: Tensor | None = None,
    callback: Callable[..., None] | None = None,
    denoise: float = 1.0,
    bar: bool = False,
) -> Made:
    """ComfyUI's own way from a KSampler, or with a sampler of one's own."""
    import comfy.sample
    import comfy.samplers

    told: list[tuple[int, Tensor, Tensor, int]] = []

    def tell(*told_now: Any) -> None:
        told.append(told_now)
        if callback is not None:
            callback(*told_now)

    clean = torch.zeros(SHAPE) if latent is None else latent
    if sigmas is None:
        own = comfy.samplers.KSampler(
            model, steps, model.load_device, str(sampler), scheduler, denoise
        )
        sigmas = own.sigmas
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    made = comfy.sample.sample_custom(
        model,
        random(*clean.shape),
        2.0,
        sampler,
        sigmas,
        conditioning(),
        conditioning(seed=8),
        clean,
        noise_mask=mask,
        callback=tell,
        disable_pbar=not bar,
        seed=1,
    )
    return Made(made, told)


def leaving(
    early: ModuleType,
    model: Any,
    threshold: float = ANY,
    patience: int = 3,
    min_steps: int = 4,
    keep: bool = True,
) -> tuple[Any, Any]:
    """A clone that stops early, and what tells of its runs."""
    criterion = early.Criterion(threshold, patience, min_steps)
    patch = early.EarlyExit(early.Settings(criterion, keep))
    return patch.patch(model), patch


def out(model: Any, x0: Tensor) -> Tensor:
    """A prediction as a sampler's result."""
    return model.model.process_latent_out(x0.float())


def nearest(sigmas: Tensor, sigma: Tensor) -> int:
    """Which step of the schedule a sigma belongs to, from 1."""
    return int((sigmas - sigma.flatten()[0]).abs().argmin()) + 1


def converging(model: Any, at: int, batch: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
    """A model whose prediction moves up to this step, and not after it; of each of a batch."""
    clean = random(*SHAPE[1:], seed=3)

    def predict(x: Tensor, t: Tensor, transformer_options: Any = None, **more: Any) -> Tensor:
        step = nearest(transformer_options["sample_sigmas"], transformer_options["sigmas"])
        moving = [max(end - step, 0) / 10 for end in (batch or (at,) * x.shape[0])]
        moving = (moving * x.shape[0])[: x.shape[0]]
        return clean * (1 + torch.tensor(moving)).reshape(-1, *[1] * (x.ndim - 1))

    return predicting(model, predict)


# --------------------------------------------------------------------------- where it stops
@settings(max_examples=examples(15))
@given(at=st.integers(1, 10), patience=st.integers(1, 4), least=st.integers(1, 12))
def test_a_model_that_converges_at_a_known_step_is_left_there(
    early, model, at, patience, least
) -> None:
    steps = 16
    known, calls = converging(model, at)
    patched, patch = leaving(early, known, 1e-4, patience, least)
    made = sampled(patched, steps=steps)
    stop = max(at + patience, least)
    assert patch.record.stopped == stop and patch.record.saved == steps - stop - 1
    assert [step for step, *_ in made.steps] == [*range(stop), steps - 1]
    assert len(calls) == stop + 1  # both sides of CFG are one call; the last step is one more
    assert torch.equal(made.latent, out(model, made.steps[-1][1]))
    assert torch.allclose(made.latent, out(model, random(*SHAPE, seed=3)), atol=1e-4)


def test_all_of_a_batch_have_to_converge(early, model) -> None:
    for batch in ((3, 7), (7, 3)):
        known, _ = converging(model, 0, batch)
        patched, patch = leaving(early, known, 1e-4)
        sampled(patched, steps=16, latent=torch.zeros(2, *SHAPE[1:]))
        assert patch.record.stopped == 10


def test_there_are_as_many_samplers_as_are_tried_here(host) -> None:
    import comfy.samplers

    assert len(comfy.samplers.KSampler.SAMPLERS) == SAMPLERS


@pytest.mark.parametrize("number", range(SAMPLERS))
def test_every_sampler_is_left_with_its_last_prediction(early, model, number: int) -> None:
    import comfy.samplers

    name = comfy.samplers.KSampler.SAMPLERS[number]
    schedulers = comfy.samplers.KSampler.SCHEDULERS
    scheduler = schedulers[number % len(schedulers)]
    steps = 40 if name in OWN_STEPS else STEPS
    fast, calls = predicting(model, by_position)
    stock = sampled(fast, name, scheduler, steps)
    all_calls = len(calls)
    assert torch.isfinite(stock.latent).all()

    patched, patch = leaving(early, fast, threshold=0.0)
    assert torch.equal(sampled(patched, name, scheduler, steps).latent, stock.latent)
    assert patch.record.stopped is None and len(patch.record.points) == len(stock.steps)

    for keep in (True, False):
        calls.clear()
        patched, patch = leaving(early, fast, keep=keep)
        made, record = sampled(patched, name, scheduler, steps), patch.record
        assert record.stopped == 4 and len(calls) < all_calls
        for (step, x0, *_), (wanted_step, wanted, *_) in zip(
            made.steps[:4], stock.steps, strict=False
        ):
            assert step == wanted_step and torch.equal(x0, wanted)
        step, x0, _, total = made.steps[-1]
        assert step == total - 1 and len(made.steps) == 5
        assert torch.equal(made.latent, out(model, x0))
        assert keep or torch.equal(x0, made.steps[3][1])
        assert record.own_steps == (name in OWN_STEPS)
        if record.own_steps:
            assert record.saved is None and "steps saved not measurable" in record.line()
        else:
            assert record.saved == total - 4 - keep


def test_a_sampler_that_takes_more_steps_than_it_is_asked_for_is_left_too(early, model) -> None:
    fast, calls = predicting(model, by_position)
    sigmas = torch.tensor([1.0, 0.3, 1e-4, 0.0])
    taken = len(sampled(fast, "dpm_adaptive", sigmas=sigmas).steps)
    assert taken > 7
    all_calls = len(calls)
    calls.clear()
    patched, patch = leaving(early, fast, min_steps=6)
    sampled(patched, "dpm_adaptive", sigmas=sigmas)
    assert patch.record.stopped == 6 and patch.record.saved is None and len(calls) < all_calls


SEVERAL_CALLS = ("heun", "dpm_2", "dpm_fast", "dpm_adaptive", "seeds_3", "sa_solver_pece")


@pytest.mark.parametrize("name", [*SEVERAL_CALLS, "uni_pc", "euler_cfg_pp"])
def test_each_prediction_has_the_sigma_that_it_was_made_at(early, model, name: str) -> None:
    """Of several calls in a step; here a prediction tells its sigma by its size."""
    clean = random(*SHAPE, seed=3)
    telling, _ = predicting(model, lambda x, t, **more: clean * (1 + t.reshape(-1, 1, 1, 1, 1)))
    patched, patch = leaving(early, telling, threshold=0.0)
    made = sampled(patched, name, steps=14)
    told = [float(x0.norm() / clean.norm()) - 1 for _, x0, *_ in made.steps]
    assert [point.sigma for point in patch.record.points] == pytest.approx(told, abs=1e-4)
    assert len(told) > 3


def test_a_mask_does_not_hide_which_call_a_prediction_came_from(early, model) -> None:
    """Outside of it is the original, which the prediction of another call may be nearer to."""
    clean, mask = random(*SHAPE, seed=3), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    inside = mask.unsqueeze(2)

    def predict(x: Tensor, t: Tensor, **more: Any) -> Tensor:
        t = t.reshape(-1, 1, 1, 1, 1)
        return clean * ((1 + t) * inside + 100 * (1 - t) * (1 - inside))

    patched, patch = leaving(early, predicting(model, predict)[0], threshold=0.0)
    made = sampled(patched, "dpm_2", latent=torch.zeros(SHAPE), mask=mask)
    size = (clean * inside).norm()
    told = [float((x0 * inside).norm() / size) - 1 for _, x0, *_ in made.steps]
    assert [point.sigma for point in patch.record.points] == pytest.approx(told, abs=1e-3)


@pytest.mark.parametrize("number", range(9))
def test_every_schedule_ends_with_its_last_step(early, model, number: int) -> None:
    import comfy.samplers

    names = comfy.samplers.KSampler.SCHEDULERS
    assert len(names) == 9
    fast, calls = predicting(model, by_position)
    stock = sampled(fast, "euler", names[number], steps=12)
    last = calls[-1]["t"][0]
    calls.clear()
    patched, patch = leaving(early, fast)
    made = sampled(patched, "euler", names[number], steps=12)
    assert calls[-1]["t"][0] == last and patch.record.stopped == 4
    assert made.steps[-1][0] == stock.steps[-1][0] == stock.steps[-1][3] - 1


# --------------------------------------------------------------------------- the last step
def test_the_last_step_is_on_the_way_from_the_noise_to_the_picture(early, model) -> None:
    """To a model that always predicts the same picture the state of any step is on a line."""
    known, calls = converging(model, 0)
    patched, _ = leaving(early, known, 1e-4)
    made = sampled(patched, "heun", steps=20)
    sigma, clean = calls[-1]["t"][0], random(*SHAPE, seed=3)
    assert 0 < sigma < 0.2
    wanted = sigma * random(*SHAPE) + (1 - sigma) * clean
    assert torch.allclose(calls[-1]["x"][:1], wanted, atol=1e-5)
    assert torch.allclose(made.steps[-1][2], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "ddim", "uni_pc", "dpmpp_2m_sde"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_outside_of_a_mask_the_original_stays(early, model, name, soft, keep) -> None:
    original, mask = random(*SHAPE, seed=4), torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:7] = 1.0
    if soft:
        mask[..., 5, 3:7] = 0.4
    fast, calls = predicting(model, by_position)
    sampled(fast, name, latent=original, mask=mask)
    wanted = calls[-1]["x"]  # of the last step as ComfyUI takes it
    patched, _ = leaving(early, fast, keep=keep)
    made = sampled(patched, name, latent=original, mask=mask)
    outside = (mask == 0).unsqueeze(2).expand(SHAPE)
    assert torch.allclose(made.latent[outside], original[outside], atol=1e-5)
    assert not torch.allclose(made.latent[~outside], original[~outside], atol=1e-2)
    if keep:  # there the model is given the original with the sampler's own noise, as ever
        given = calls[-1]["x"]
        both = outside.expand_as(given)
        assert torch.allclose(given[both], wanted[both], atol=1e-5)


def test_the_mask_alone_decides(early, model) -> None:
    """A small mask in a picture that is full of contrast: all of its change counts."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2, :2] = 1
    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast, threshold=0.0)
    sampled(patched, latent=random(*SHAPE) * 100, mask=mask)
    inside = patch.record.changes()
    sampled(patched, latent=random(*SHAPE) * 10_000, mask=mask)
    assert patch.record.changes() == pytest.approx(inside, rel=0.05)


@pytest.mark.parametrize("denoise", [0.3, 0.7])
def test_an_image_that_is_denoised_in_part_is_left_too(early, model, denoise: float) -> None:
    fast, calls = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    made = sampled(patched, latent=random(*SHAPE, seed=4), denoise=denoise)
    assert patch.record.stopped == 4 and patch.record.saved == 3
    assert torch.equal(made.latent, out(model, made.steps[-1][1]))
    assert calls[0]["t"][0] < 1


# --------------------------------------------------------------------------- not stopping
def test_a_latent_that_goes_on_with_noise_is_never_left(early, model) -> None:
    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    sigmas = torch.linspace(1.0, 0.3, 9)
    made, stock = sampled(patched, sigmas=sigmas), sampled(fast, sigmas=sigmas)
    assert torch.equal(made.latent, stock.latent)
    assert "nothing stops early: the schedule ends at sigma 0.3" in patch.record.line()
    assert len(patch.record.points) == 8 and patch.record.saved == 0


def test_nothing_stops_where_no_step_is_left_to_save(early, model) -> None:
    fast, _ = predicting(model, by_position)
    stock = sampled(fast, steps=5)
    for keep, least in ((True, 4), (False, 5)):
        patched, patch = leaving(early, fast, min_steps=least, keep=keep)
        assert torch.equal(sampled(patched, steps=5).latent, stock.latent)
        assert patch.record.stopped is None
        assert patch.record.line().endswith("small enough only when no step was left to save")
    patched, patch = leaving(early, fast, min_steps=4, keep=False)
    sampled(patched, steps=5)
    assert patch.record.stopped == 4 and patch.record.saved == 1


def test_one_step_is_sampled_as_ever(early, model) -> None:
    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    assert torch.equal(sampled(patched, steps=1).latent, sampled(fast, steps=1).latent)
    assert patch.record.line() == "all 1 steps · change not measurable: it takes two steps"


# --------------------------------------------------------------------------- what goes wrong
def test_an_interruption_is_one(early, model) -> None:
    from comfy.model_management import InterruptProcessingException

    def interrupt(step: int, *_: Any) -> None:
        if step == 2:
            raise InterruptProcessingException

    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    with pytest.raises(InterruptProcessingException):
        sampled(patched, callback=interrupt)
    assert patch.record.line() == "cancelled" and patch._run is None
    sampled(patched)
    assert patch.record.stopped == 4 and not patch.record.ended


@pytest.mark.parametrize("kind, line", [("interrupt", "cancelled"), ("error", "failed")])
def test_a_run_without_a_picture_is_told_in_the_place_of_an_earlier_one(host, kind, line) -> None:
    import comfy.model_management

    def fail() -> None:
        if kind == "interrupt":
            raise comfy.model_management.InterruptProcessingException
        raise KeyError("injected by a test")

    graph = exiting(small(seed=74))
    host.run(graph)
    assert told(host, "exit")[-1].startswith("stopped after")
    graph["sampler"]["inputs"]["seed"] = 75
    with (
        transformer(host, graph).register_forward_pre_hook(lambda *_: fail()),
        pytest.raises(RunError),
    ):
        host.run(graph)
    assert told(host, "exit")[-1] == line


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "dpm_fast"])
def test_the_console_has_a_whole_line_of_the_bar_and_then_why_it_ends(
    early, model, capfd, sampler: str
) -> None:
    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    log, written = logging.getLogger("qwen_vram"), logging.StreamHandler()
    log.addHandler(written)
    level = log.level
    log.setLevel(logging.INFO)  # as ComfyUI has it
    try:
        sampled(patched, sampler, steps=24, bar=True)
    finally:
        log.removeHandler(written)
        log.setLevel(level)
    *bars, last = capfd.readouterr().err.splitlines()
    assert last == f"Early Exit: {patch.record.line()}"
    assert "/24 [" in bars[-1] and "Error" not in "".join(bars)


def test_a_threshold_that_is_no_number_is_refused(host) -> None:
    """ComfyUI's own check lets NaN pass from the API, and anything from a link."""
    graph = exiting(small(), threshold=math.nan)
    with pytest.raises(RunError, match="threshold is nan: give a number from 0 up"):
        host.run(graph)
    graph = exiting(small(), threshold=["number", 0])
    graph["number"] = node("PrimitiveFloat", value=-1.0)
    with pytest.raises(RunError, match="threshold is -1.0: give a number from 0 up"):
        host.run(graph)


def test_a_full_disk_takes_the_curve_and_not_the_latent(host) -> None:
    graph = exiting(small(seed=76))
    whole = host.run(graph).outputs["sampler"][0][0]["samples"]
    temp = host.folder_paths.get_temp_directory()
    in_the_way = host.base / "no_folder"
    in_the_way.touch()
    host.restart()
    host.folder_paths.set_temp_directory(str(in_the_way))
    try:
        run = host.run(graph)
    finally:
        host.folder_paths.set_temp_directory(temp)
    assert torch.equal(run.outputs["sampler"][0][0]["samples"], whole)
    line = told(host, "exit")[-1]
    assert line.startswith("stopped after step 4 of 8")
    assert " · the curve is not shown: " in line


NEVER = {
    math.nan: "the prediction is not a finite number",
    0.0: "the prediction is zero",
}


@pytest.mark.parametrize("value", NEVER)
def test_why_no_change_is_measurable_is_said(early, model, value: float) -> None:
    constant, _ = predicting(model, lambda x, t, **more: torch.full_like(x, value))
    patched, patch = leaving(early, constant)
    sampled(patched)
    assert patch.record.line() == f"all 8 steps · change not measurable: {NEVER[value]}"
    assert patch.record.facts()["changes_not_measurable_because"] == [NEVER[value]]


def test_a_sampler_that_swallows_errors_is_left_too(early, model) -> None:
    import comfy.samplers

    def stubborn(model: Any, x: Tensor, sigmas: Tensor, callback: Any, **more: Any) -> Tensor:
        for i, sigma in enumerate(sigmas[:-1]):
            x0 = model(x, sigma * x.new_ones([1]), **more["extra_args"])
            with contextlib.suppress(Exception):
                callback({"i": i, "denoised": x0, "x": x})
        return x

    fast, calls = predicting(model, by_position)
    patched, patch = leaving(early, fast, keep=False)
    sampled(patched, comfy.samplers.KSAMPLER(stubborn))
    assert patch.record.stopped == 4 and len(calls) == 4


def test_a_sampler_of_another_kind_has_no_last_step(early, model) -> None:
    """What its states are is its own affair."""
    from comfy_extras.nodes_void import VOID_DDIM

    fast, calls = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    made = sampled(patched, VOID_DDIM(), sigmas=torch.linspace(1, 0, 9))
    assert patch.record.stopped == 4 and len(calls) == 4 and patch.record.saved == 4
    assert torch.equal(made.latent, out(model, made.steps[-1][1]))
    assert "no last step: this sampler or model" in patch.record.line()


def test_a_run_inside_of_another_is_left_alone(host, early, model) -> None:
    """A sampler that lets another model with the same patch sample a draft first."""
    import comfy.samplers

    path = host.models / "diffusion_models" / UNET
    other = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    outer, patch = leaving(early, predicting(model, by_position)[0])
    inner = patch.patch(predicting(other(str(path), {}), by_position)[0])
    euler = comfy.samplers.sampler_object("euler").sampler_function
    drafts: list[tuple[Tensor, Any]] = []

    def with_a_draft(model: Any, x: Tensor, sigmas: Tensor, **more: Any) -> Tensor:
        drafts.append((sampled(inner, steps=12).latent, patch.record))
        return euler(model, x, sigmas, **more)

    made = sampled(outer, comfy.samplers.KSAMPLER(with_a_draft))
    ((draft, record),) = drafts
    assert record.saved == 7 and patch.record.saved == 3  # of 12 steps, and of 8
    assert torch.equal(draft, sampled(inner, steps=12).latent)
    assert torch.equal(made.latent, sampled(outer).latent)


def test_a_freed_model_goes(early, model) -> None:
    patched, patch = leaving(early, predicting(model, by_position)[0])
    sampled(patched)
    gone = weakref.ref(patched)
    del patched
    gc.collect()
    assert gone() is None and patch.record is not None


def test_a_second_patch_replaces_the_first(early, model) -> None:
    fast, _ = predicting(model, by_position)
    once, first = leaving(early, fast)
    twice, second = leaving(early, once, min_steps=6)
    sampled(twice)
    assert first.record is None and second.record.stopped == 6


# --------------------------------------------------------------------------- with other nodes
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("first", [True, False])
def test_caches_of_steps_go_with_it(host, early, model, name: str, first: bool) -> None:
    """Skipped steps are seen too, and the last state is what a sampler would have gone on with."""
    cache = host.nodes.NODE_CLASS_MAPPINGS[name]

    def cached(patched: Any) -> Any:
        return cache.execute(patched, 100.0, 0.1, 0.95, False)[0]

    patched, patch = leaving(early, cached(model) if first else model)
    made = sampled(patched if first else cached(patched), steps=12)
    assert patch.record.stopped == 4 and len(patch.record.points) == 4
    assert torch.equal(made.latent, out(model, made.steps[-1][1]))


@pytest.mark.parametrize("first", [True, False])
def test_tiles_go_with_it(host, early, model, first: bool) -> None:
    tiled = importlib.import_module(f"{host.pack.__name__}.nodes.tiled_diffusion")
    passes = importlib.import_module(f"{host.pack.__name__}.nodes.tile_passes")
    tiling = passes.Tiling(128, 16, "hann", ("auto", "keep whole", "keep whole"), 1)
    fast, calls = predicting(model, by_position)
    latent = torch.zeros(1, 16, 1, 24, 24)
    patched, patch = leaving(early, tiled.patch(fast, tiling) if first else fast)
    made = sampled(patched if first else tiled.patch(patched, tiling), latent=latent)
    assert patch.record.stopped == 4 and len(calls) == 5 * 4  # tiles
    assert made.latent.shape == latent.shape
    assert torch.equal(made.latent, out(model, made.steps[-1][1]))


def exiting(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The same graph with our node before its sampler."""
    given = {"threshold": 100.0, "patience": 3, "min_steps": 4, "keep_last_step": True, **inputs}
    patch = node("QwenVRAMEarlyExit", **{"model": ["shift", 0], **given})
    asked = {**graph["sampler"]["inputs"], "model": ["exit", 0], "steps": STEPS}
    return {**graph, "exit": patch, "sampler": {**graph["sampler"], "inputs": asked}}


def told(host: Host, node_id: str) -> list[str]:
    """The lines that a node showed."""
    head = len(node_id).to_bytes(4, "big") + node_id.encode()
    texts = (data for _, data in host.events if isinstance(data, bytes))
    return [text.removeprefix(head).decode() for text in texts if text.startswith(head)]


def test_the_sampler_within_vram_may_repeat_the_run(host) -> None:
    """Out of memory between two passes starts the run anew: told once, and the same latent."""
    graph = exiting(small(seed=41))
    calm = host.run(within(graph)).outputs["sampler"][0][0]["samples"]
    with blocks_fail(transformer(host, graph), Faults({4})) as faults:
        run = host.run(within(graph))
    assert faults.raised == 1
    assert torch.allclose(run.outputs["sampler"][0][0]["samples"], calm, atol=1e-4)


def test_what_is_between_two_passes_may_be_repeated(host, early, model) -> None:
    fitting = importlib.import_module(f"{host.pack.__name__}.nodes.fitting")
    fast, _ = predicting(model, by_position)
    once: list[int] = []

    def failing(*_: Any, **__: Any) -> None:
        if not once:
            once.append(1)
            raise torch.OutOfMemoryError("injected by a test")

    patched, patch = leaving(early, fast)
    tells: list[Any] = []
    patch._tell = tells.append
    plain = sampled(patched)
    patched.add_wrapper_with_key("predict_noise", "fails", lambda e, *a: (failing(), e(*a))[1])
    fitted = fitting.Fitting("exact only").patch(patched)
    made = sampled(fitted)
    assert once and torch.equal(made.latent, plain.latent)
    assert [record.stopped for record in tells] == [4, 4]


# --------------------------------------------------------------------------- what is shown
def test_the_node_shows_line_curve_and_table_and_so_does_the_picture(host) -> None:
    graph = exiting(text_to_image(size=32, seed=71), patience=2)  # no earlier run has it
    host.events.clear()
    (path,) = queued(host, graph, extra_pnginfo={"workflow": {"nodes": [{"id": 1}]}})
    first, last = told(host, "exit")
    assert first == "watches the prediction when a sampler runs with it"
    assert last.startswith("stopped after step 4 of 8 and the last one · steps saved: 3 · change")
    shown = [d for e, d in host.events if e == "executed" and d["node"] == "exit"]
    (image,) = shown[-1]["output"]["images"]
    assert image["type"] == "temp" and shown[-1]["output"]["qwen_vram"] == [{"text": last}]
    curve = Image.open(f"{host.folder_paths.get_temp_directory()}/{image['filename']}")
    assert curve.size[0] == 640 and curve.format == "PNG"
    said = json.loads(Image.open(path).info["qwen_vram"])["exit"]
    assert said["stopped_after_step"] == 4 and said["steps_saved"] == 3 and said["last_step_run"]
    assert [point["change"] is None for point in said["curve"]] == [True, False, False, False]
    assert said["would_have_saved"][-1] == {"threshold": 100.0, "steps": 4, "saved": 3}


def test_the_node_in_the_cache_still_shows_what_the_next_run_did(host) -> None:
    graph = exiting(small(seed=72))
    host.run(graph)
    graph["sampler"]["inputs"]["seed"] = 73
    run = host.run(graph)
    assert "exit" in run.cached
    assert told(host, "exit")[-1].startswith("stopped after step 4 of 8")
    assert any(e == "executed" and "images" in (d["output"] or {}) for e, d in host.events)


def test_custom_samplers_give_the_same_picture_from_both_outputs(host) -> None:
    graph = exiting(small())
    del graph["sampler"], graph["out"]
    graph |= {
        "noise": node("RandomNoise", noise_seed=3),
        "guider": node("CFGGuider", model=["exit", 0], positive=["positive", 0],
                       negative=["negative", 0], cfg=2.0),
        "kind": node("KSamplerSelect", sampler_name="dpmpp_2m"),
        "sigmas": node("BasicScheduler", model=["exit", 0], scheduler="beta", steps=9, denoise=1.0),
        "custom": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
                       sampler=["kind", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]),
        "out": node("PreviewAny", source=["custom", 0]),
    }  # fmt: skip
    made, clean = (one[0]["samples"] for one in host.run(graph).outputs["custom"])
    assert torch.allclose(made, clean, atol=1e-6)
    assert told(host, "exit")[-1].startswith("stopped after step 4 of 9 and the last one")


@pytest.mark.parametrize("leftover", ["enable", "disable"])
def test_the_advanced_ksampler_is_left_where_its_latent_is_a_picture(host, leftover: str) -> None:
    graph = exiting(small())
    asked = {**graph["sampler"]["inputs"], "steps": 12, "end_at_step": 8, "start_at_step": 1}
    asked |= {"noise_seed": asked.pop("seed"), "add_noise": "enable"}
    del asked["denoise"]
    graph["sampler"] = node("KSamplerAdvanced", **asked, return_with_leftover_noise=leftover)
    host.run(graph)
    line = told(host, "exit")[-1]
    if leftover == "enable":
        assert line.startswith("all 7 steps") and "nothing stops early" in line
    else:
        assert line.startswith("stopped after step 4 of 7 and the last one")


def test_a_change_that_nobody_sees_is_not_measurable(early, model) -> None:
    """A sampler that asks the model itself, past the guider."""
    import comfy.samplers

    def direct(model: Any, x: Tensor, sigmas: Tensor, callback: Any, **more: Any) -> Tensor:
        for i in range(len(sigmas) - 1):
            callback({"i": i, "denoised": x, "x": x})
        return x

    fast, _ = predicting(model, by_position)
    patched, patch = leaving(early, fast)
    sampled(patched, comfy.samplers.KSAMPLER(direct))
    assert patch.record.line() == (
        "all 8 steps · change not measurable: the sampler calls the model past ComfyUI's wrappers"
    )
    silent = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **more: x)
    sampled(patched, silent)
    why = "the sampler tells of no step"
    assert patch.record.line() == f"all 8 steps · change not measurable: {why}"
    assert patch.record.facts()["curve"] == [] and math.isfinite(patch.record.picture.width)
