"""Overrides of attention keep each other: all pairs, both ways round, on a real transformer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import permutations
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import inputs, random, transformer
from torch import Tensor

HEADS, WIDTH = 4, 32
Options = dict[str, Any]


@pytest.fixture(scope="module")
def chain(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.attention_override")


@pytest.fixture(scope="module")
def slicing(host: Host) -> ModuleType:
    """The module whose slices go through the chain."""
    return host.part("nodes.slicing")


@pytest.fixture(scope="module")
def model(host: Host) -> Any:
    """Two blocks."""
    return transformer(torch.float32)


# ------------------------------------------------------------------------- what stands in the slot
class Part:
    """An override that counts its calls; `apply(function, q, k, v, *rest)` is what it does."""

    sliceable = True

    def __init__(self, apply: Callable[..., Tensor]) -> None:
        self.apply, self.calls = apply, 0

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.apply(function, *args, **kwargs)


def more_keys(function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
    """As a reference cache: keys and values that were not computed in this pass."""
    extra = [random(k.shape[0], HEADS, 7, WIDTH, seed=s) for s in (31, 32)]
    return function(
        q, *(torch.cat([x, e], 2) for x, e in zip((k, v), extra, strict=True)), *rest, **more
    )


def by_hand(
    function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **more: Any
) -> Tensor:
    """As a backend: it computes attention itself. Its scores are 1 % off, so that it is seen."""
    assert more["skip_reshape"] and mask is None
    scores = q @ k.transpose(-1, -2) * 1.01 * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def louder(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Another node's: it works on what comes out."""
    return 1.2 * function(*args, **kwargs)


def stubborn(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Another node's, that computes attention itself and calls nobody."""
    return 0.9 * by_hand(None, *args, **kwargs)


def host_choice() -> Any:
    """What ComfyUI's node ModelAttentionBackend puts there."""
    from comfy.ldm.modules.attention import get_attention_function
    from comfy.model_patcher import ModelPatcher

    keeper = SimpleNamespace(model_options={"transformer_options": {}})
    ModelPatcher.set_model_optimized_attention(keeper, get_attention_function("split"))
    return keeper.model_options["transformer_options"]["optimized_attention_override"]


def with_container() -> Any:
    """Another node's that takes containers where the model makes them; Qwen's does not."""
    override = Part(louder)
    override.container_function = lambda *_, **__: pytest.fail("Qwen-Image makes no containers")
    return override


FOREIGN = {
    "louder": lambda: Part(louder),
    "stubborn": lambda: Part(stubborn),
    "ComfyUI's choice": host_choice,
    "with a container": with_container,
}
OURS = {"cache": more_keys, "backend": by_hand}


@torch.inference_mode()
def computed(model: Any, options: Options, **given: Any) -> Tensor:
    """One forward pass."""
    return model(**inputs(torch.float32, **given), transformer_options=options)


def nested(*parts: Any) -> Options:
    """Without the chain: one override that nests these by hand, outermost first."""

    def override(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        for part in reversed(parts):
            function = partial(part, function)
        return function(*args, **kwargs)

    return {"optimized_attention_override": override}


def sliced(slicing: ModuleType, options: Options) -> Options:
    """The same pass with queries in slices."""
    plans = slicing.Plans()
    plans.set(torch.device("cpu"), slicing.Plan(projections=3, attention=5))
    wrapper = partial(slicing._run, plans)
    return {**options, "wrappers": {"diffusion_model": {slicing.KEY: [wrapper]}}}


def filled(chain: ModuleType, order: tuple[str, ...], foreign: Any) -> tuple[Options, Options]:
    """transformer_options after nodes in this order, and our parts by name."""
    options: Options = {}
    parts = {name: Part(OURS[name]) for name in order if name in OURS}
    keys = {"cache": chain.REFERENCE_CACHE, "backend": chain.BACKEND}
    for name in order:
        if name in OURS:
            chain.put(options, keys[name], parts[name])
        elif name == "foreign":
            options[chain.SLOT] = foreign
    return options, parts


# ------------------------------------------------------------------------- pairs
def test_both_of_ours_work_in_their_order_whoever_comes_first(chain, model) -> None:
    wanted = computed(model, nested(more_keys, by_hand))
    assert not torch.allclose(wanted, computed(model, nested(by_hand)))
    for order in permutations(OURS):
        options, parts = filled(chain, order, None)
        assert computed(model, options).equal(wanted)
        assert {part.calls for part in parts.values()} == {2}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("ours", [("cache",), ("backend",), ("cache", "backend")], ids=str)
def test_what_stood_in_the_slot_is_kept(chain, model, kind: str, ours: tuple[str, ...]) -> None:
    """Between the cache and the backend, which it may ignore."""
    foreign = FOREIGN[kind]()
    options, parts = filled(chain, ("foreign", *ours), foreign)
    inside = [by_hand] if "backend" in ours else []
    around = [more_keys] if "cache" in ours else []
    assert computed(model, options).equal(computed(model, nested(*around, foreign, *inside)))
    ignored = kind in ("stubborn", "ComfyUI's choice")
    assert "backend" not in parts or parts["backend"].calls == (0 if ignored else 2)
    assert "cache" not in parts or parts["cache"].calls == 2
    assert chain.foreign_in(options) is foreign


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("ours", ["cache", "backend"])
def test_a_slot_that_another_node_fills_later_is_that_node_s(chain, model, kind, ours) -> None:
    """ComfyUI's way: it is seen, and what is put afterwards goes around or within it again."""
    foreign = FOREIGN[kind]()
    options, parts = filled(chain, (ours, "foreign"), foreign)
    key = {"cache": chain.REFERENCE_CACHE, "backend": chain.BACKEND}[ours]
    assert not chain.has(options, key) and chain.foreign_in(options) is foreign
    assert computed(model, options).equal(computed(model, nested(foreign)))
    assert parts[ours].calls == 0
    chain.put(options, key, parts[ours])
    assert chain.has(options, key) and chain.foreign_in(options) is foreign
    order = (more_keys, foreign) if ours == "cache" else (foreign, by_hand)
    assert computed(model, options).equal(computed(model, nested(*order)))


def test_a_node_that_keeps_the_slot_s_owner_keeps_the_chain(chain, model) -> None:
    options, parts = filled(chain, ("cache", "backend"), None)
    before = options[chain.SLOT]
    options[chain.SLOT] = lambda f, *a, **k: louder(partial(before, f), *a, **k)
    assert not chain.has(options, chain.BACKEND)  # as far as can be seen
    wanted = computed(model, nested(louder, more_keys, by_hand))
    assert computed(model, options).equal(wanted)


@pytest.mark.parametrize("given", [{}, {"references": True}, {"batch": 2}], ids=str)
@pytest.mark.parametrize(
    "order", [("cache",), ("backend",), ("cache", "backend"), ("foreign", "cache", "backend")]
)
def test_slices_go_through_all_of_it(chain, slicing, model, order, given) -> None:
    """Queries in slices come before the chain: in either order the same, up to rounding."""
    options, parts = filled(chain, order, Part(louder))
    whole = computed(model, options, **given)
    counts = {name: part.calls for name, part in parts.items()}
    pieces = computed(model, sliced(slicing, options), **given)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    assert all(part.calls > 2 * counts[name] for name, part in parts.items())


@pytest.mark.parametrize("order", list(permutations(("cache", "backend", "foreign"))), ids=str)
def test_one_part_that_wants_whole_queries_decides(chain, slicing, model, order) -> None:
    foreign = Part(louder)
    foreign.sliceable = False
    options, _ = filled(chain, order, foreign)
    assert chain.foreign_in(options) is foreign
    whole = computed(model, options)
    calls = foreign.calls
    assert computed(model, sliced(slicing, options)).equal(whole)
    assert foreign.calls == 2 * calls


# ------------------------------------------------------------------------- the slot itself
def test_taking_parts_out_leaves_what_was_there(chain) -> None:
    foreign = Part(louder)
    options: Options = {chain.SLOT: foreign}
    chain.put(options, chain.BACKEND, Part(by_hand))
    chain.put(options, chain.REFERENCE_CACHE, Part(more_keys))
    chain.put(options, chain.BACKEND, None)
    assert chain.has(options, chain.REFERENCE_CACHE) and not chain.has(options, chain.BACKEND)
    chain.put(options, chain.REFERENCE_CACHE, None)
    assert options == {chain.SLOT: foreign}
    chain.put(empty := {}, chain.BACKEND, Part(by_hand))
    chain.put(empty, chain.BACKEND, None)
    assert empty == {}


def test_a_clone_s_chain_is_its_own(chain) -> None:
    """Options are copied with the chain in them: putting another part changes one of the two."""
    first: Options = {}
    chain.put(first, chain.BACKEND, Part(by_hand))
    second = dict(first)
    chain.put(second, chain.REFERENCE_CACHE, Part(more_keys))
    assert not chain.has(first, chain.REFERENCE_CACHE) and chain.has(second, chain.BACKEND)


def test_a_part_takes_the_place_of_its_predecessor(chain, model) -> None:
    old, new = Part(by_hand), Part(by_hand)
    options: Options = {}
    chain.put(options, chain.BACKEND, old)
    chain.put(options, chain.BACKEND, new)
    computed(model, options)
    assert (old.calls, new.calls) == (0, 2)


def test_pictures_of_a_batch_may_share_a_pass_if_every_part_says_so(host, chain) -> None:
    """Tiles, and the ladder's smaller batches, ask this."""
    foreign = importlib.import_module(f"{host.pack.__name__}.nodes.foreign")
    backend = importlib.import_module(f"{host.pack.__name__}.nodes.attention").Attention("auto")
    options: Options = {}
    chain.put(options, chain.BACKEND, backend)
    assert not foreign.sees_the_batch(options)
    chain.put(options, chain.REFERENCE_CACHE, Part(more_keys))  # keeps something
    assert foreign.sees_the_batch(options)
    options = {chain.SLOT: Part(louder)}
    chain.put(options, chain.BACKEND, backend)
    assert foreign.sees_the_batch(options)


def test_an_unknown_key_has_no_place(chain) -> None:
    with pytest.raises(ValueError, match="no place in the order"):
        chain.put({}, "qwen_vram.other", Part(by_hand))


# ------------------------------------------------------------------------- containers
def test_containers_are_opened_once_and_reach_the_function_as_tensors(chain) -> None:
    """ComfyUI's way to let go of inputs early: a chain has none, so ComfyUI opens them itself."""
    from comfy.ldm.modules.attention import AttentionTensorContainer, attention_pytorch

    q = [random(1, HEADS, 9, WIDTH, seed=s) for s in (1, 2, 3)]
    options, parts = filled(chain, ("foreign", "backend"), with_container())
    boxes = [AttentionTensorContainer(x) for x in q]
    found = attention_pytorch(*boxes, HEADS, skip_reshape=True, transformer_options=options)
    assert found.equal(1.2 * by_hand(None, *q, HEADS, skip_reshape=True))
    assert [box.tensor for box in boxes] == [None] * 3  # not kept alive by the caller
    assert parts["backend"].calls == 1


def test_no_transformer_of_qwen_makes_containers(monkeypatch, model) -> None:
    """So opening them costs it nothing."""
    from comfy.ldm.modules.attention import AttentionTensorContainer

    def made(*_: Any) -> None:
        pytest.fail("a container")

    monkeypatch.setattr(AttentionTensorContainer, "__init__", made)
    computed(model, {}, references=True)
