"""Forward passes that record and reuse groups of tokens, against passes written out here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.host import Host
from pack.tests.nodes import plain_transformer as plain
from pack.tests.nodes.slicing_models import inputs, random, transformer
from torch import Tensor

NAMES = ("x", "timestep", "context", "attention_mask", "ref_latents", "additional_t_cond")


@pytest.fixture(scope="module")
def reuse(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.token_reuse")


def positional(call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As the host's wrappers get them."""
    more = {name: value for name, value in call.items() if name not in NAMES}
    return tuple(call.get(name) for name in NAMES), more


def run(
    reuse: ModuleType, model: Any, call: dict[str, Any], groups: list[Any], **how: Any
) -> Tensor:
    """One forward pass with a wrapper that works on these groups."""

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        return reuse.forward(executor, args[:6], args[6], groups, more, **how)

    options = {"wrappers": {"diffusion_model": {"qwen_vram.test": [wrapper]}}}
    with torch.inference_mode():
        return model(**call, transformer_options=options)


def stock(model: Any, call: dict[str, Any]) -> Tensor:
    """ComfyUI's own."""
    with torch.inference_mode():
        return model(**call, transformer_options={})


def store(reuse: ModuleType, format: str = "model") -> Any:
    """In RAM."""
    return reuse.KVStore(format, "ram", torch.device("cpu"))


def group(reuse: ModuleType, call: dict[str, Any], format: str = "model") -> Any:
    """The references of a call."""
    return reuse.Group("references", reuse.references_of(positional(call)[0]), store(reuse, format))


@pytest.mark.parametrize("ref", ["index", "index_timestep_zero", "negative_index", "offset"])
@pytest.mark.parametrize("batch, mask, sides", [(1, False, (40, 36)), (2, True, (23, 31))])
def test_recording_is_stock_and_reuse_at_the_same_step_is_the_same(
    reuse: ModuleType, ref: str, batch: int, mask: bool, sides: tuple[int, int]
) -> None:
    model = transformer(torch.float32, ref=ref)
    call = inputs(torch.float32, batch, sides, references=True, mask=mask)
    own, expected = group(reuse, call), stock(model, call)
    assert torch.equal(run(reuse, model, call, [own]), expected)
    assert own.blocks == 2 and own.drift is None
    own.reuse = True
    torch.testing.assert_close(run(reuse, model, call, [own]), expected, atol=2e-5, rtol=1e-5)


def other(call: dict[str, Any], time: float = 0.3) -> dict[str, Any]:
    """The same condition in another step: other noise, another time."""
    noise = random(*call["x"].shape, seed=77)
    return {**call, "x": noise, "timestep": torch.full_like(call["timestep"], time)}


@pytest.mark.parametrize("ref", ["index", "index_timestep_zero", "negative_index", "offset"])
@pytest.mark.parametrize("batch, mask, sides", [(1, False, (40, 36)), (2, True, (23, 31))])
def test_reuse_is_a_pass_with_the_keys_and_values_of_an_earlier_one(
    reuse: ModuleType, ref: str, batch: int, mask: bool, sides: tuple[int, int]
) -> None:
    model = transformer(torch.float32, ref=ref)
    call = inputs(torch.float32, batch, sides, references=True, mask=mask)
    with torch.inference_mode():
        plainly, known = plain.forward(model, call)
        expected, now = plain.forward(model, other(call), known)
        fresh, _ = plain.forward(model, other(call))
    own = group(reuse, call)
    torch.testing.assert_close(run(reuse, model, call, [own]), plainly, atol=2e-5, rtol=1e-5)
    for index, (key, value) in enumerate(known):
        torch.testing.assert_close(own.store.get(index), (key, value), atol=1e-5, rtol=1e-5)
    own.reuse = True
    found = run(reuse, model, other(call), [own])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - fresh).abs().max() > 1e-3  # what was kept is not what would be computed


@pytest.mark.parametrize("format, bound", [("model", 1e-5), ("int8", 0.02), ("int4", 0.3)])
def test_smaller_formats_cost_little(reuse: ModuleType, format: str, bound: float) -> None:
    model, call = transformer(torch.float32), inputs(torch.float32, references=True)
    own, expected = group(reuse, call, format), stock(model, call)
    run(reuse, model, call, [own])
    own.reuse = True
    error = (run(reuse, model, call, [own]) - expected).norm() / expected.norm()
    assert bound / 1000 < error < bound or format == "model" and error < bound


# ------------------------------------------------------------------------------------ causal
@pytest.mark.parametrize("ref", ["index", "index_timestep_zero"])
def test_causal_references_see_themselves_alone(reuse: ModuleType, ref: str) -> None:
    model, call = transformer(torch.float32, ref=ref), inputs(torch.float32, 2, references=True)
    with torch.inference_mode():
        expected, known = plain.forward(model, call, causal=True)
    own = group(reuse, call)
    found = run(reuse, model, call, [own], causal=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - stock(model, call)).abs().max() > 1e-3
    for index, pair in enumerate(known):
        torch.testing.assert_close(own.store.get(index), pair, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", [0, 1])
def test_a_causal_reference_knows_of_no_other(reuse: ModuleType, other: int) -> None:
    """As Qwen-Image-Edit-Causal, which shows the model one after the other."""
    model = transformer(torch.float32, ref="index_timestep_zero", layers=3)
    call = inputs(torch.float32, 2, references=True)
    changed = list(call["ref_latents"])
    changed[other] = random(*changed[other].shape, seed=31)
    edge, own, now = reuse.tokens_of(changed[0]), *(group(reuse, call) for _ in range(2))
    run(reuse, model, call, [own], causal=True)
    run(reuse, model, {**call, "ref_latents": changed}, [now], causal=True)
    for index in range(3):
        for before, after in zip(own.store.get(index), now.store.get(index), strict=True):
            halves = (pair.tensor_split([edge], 2) for pair in (before, after))
            assert list(map(torch.equal, *halves)) == [other == 1, other == 0]


def test_causal_reuse_is_exact_whatever_noise_step_and_prompt(reuse: ModuleType) -> None:
    model = transformer(torch.float32, ref="index_timestep_zero", layers=4)
    first = inputs(torch.float32, references=True, mask=True)
    own = group(reuse, first)
    run(reuse, model, first, [own], causal=True)
    own.reuse = True
    later = {**other(first), "context": random(1, 7, first["context"].shape[2], seed=9)}
    later["attention_mask"] = torch.tensor([[1] * 5 + [0] * 2])
    expected = run(reuse, model, later, [group(reuse, later)], causal=True)
    assert torch.equal(run(reuse, model, later, [own], causal=True), expected)


# ------------------------------------------------------------------------------------ probes
def test_a_probe_below_the_threshold_reuses(reuse: ModuleType) -> None:
    model, call = transformer(torch.float32, layers=5), inputs(torch.float32, references=True)
    own = group(reuse, call)
    run(reuse, model, call, [own])
    with torch.inference_mode():
        known, now = (plain.forward(model, each)[1] for each in (call, other(call)))
        expected = plain.forward(model, other(call), [*now[:3], *known[3:]])[0]
    own.reuse, own.threshold = True, 10.0
    found = run(reuse, model, other(call), [own])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    changes = [
        (after - before).norm() / before.norm()
        for index in range(3)
        for before, after in zip(known[index], now[index], strict=True)
    ]
    assert own.reuse and own.blocks == 5
    torch.testing.assert_close(own.drift, torch.stack(changes).mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own.store.get(1), known[1], atol=1e-5, rtol=1e-5)  # not the new ones


def test_a_probe_above_the_threshold_is_a_full_pass_that_records(reuse: ModuleType) -> None:
    model, call = transformer(torch.float32, layers=5), inputs(torch.float32, references=True)
    own, again = group(reuse, call), group(reuse, call)
    run(reuse, model, call, [own])
    own.reuse, own.threshold = True, 1e-6
    assert torch.equal(run(reuse, model, other(call), [own]), stock(model, other(call)))
    assert not own.reuse and own.drift > 1e-6 and own.blocks == 5
    run(reuse, model, other(call), [again])
    for index in range(5):
        assert all(map(torch.equal, own.store.get(index), again.store.get(index)))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_drift_does_not_count_the_stores_own_error(reuse: ModuleType, format: str) -> None:
    model, call = transformer(torch.float32, layers=5), inputs(torch.float32, references=True)
    own = group(reuse, call, format)
    run(reuse, model, call, [own])
    own.known = True
    run(reuse, model, call, [own])
    assert own.drift < 1e-3  # int4 alone is a tenth


# ------------------------------------------------------------------------------------ slices
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_in_slices(host: Host, reuse: ModuleType, inside: bool, causal: bool) -> None:
    slicing = importlib.import_module(f"{host.pack.__name__}.nodes.slicing")
    budget = importlib.import_module(f"{host.pack.__name__}.core.budget")
    plans = slicing.Plans()
    plans.set(torch.device("cpu"), budget.Plan(feed_forward=3, projections=2, attention=3))
    model, call = transformer(torch.float32), inputs(torch.float32, 2, references=True, mask=True)
    own = group(reuse, call)
    expected = run(reuse, model, call, [group(reuse, call)], causal=causal)

    def wrapper(executor: Any, *args: Any, **more: Any) -> Tensor:
        return reuse.forward(executor, args[:6], args[6], [own], more, causal)

    sliced = slicing.partial(slicing._run, plans)
    order = [wrapper, sliced] if inside else [sliced, wrapper]
    options = {"wrappers": {"diffusion_model": {"qwen_vram.test": order}}}
    for own.reuse in (False, True):
        with torch.inference_mode():
            found = model(**call, transformer_options=options)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert plans.reasons() == ()


def test_the_picture_is_not_left_out_beside_references_that_stay(reuse: ModuleType) -> None:
    model, call = transformer(torch.float32), inputs(torch.float32, references=True)
    outside = reuse.Group("outside", torch.tensor([1, 5]), store(reuse), reuse=True)
    with pytest.raises(ValueError, match="only where all groups are"):
        run(reuse, model, call, [group(reuse, call), outside])
