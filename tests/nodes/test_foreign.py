"""What other nodes put around the model: repeated passes must not change what it remembers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import node
from pack.tests.nodes.faults import Faults, blocks_fail, latent, small, transformer, within

STEPS = 8


@pytest.fixture(autouse=True)
def nothing_stays(host) -> Iterator[None]:
    """Clones of a model that a test patched would be cached for the tests that follow."""
    yield
    transformer(host, small())


def cached(kind: str = "EasyCache", threshold: float = 1.0, batch: int = 1) -> dict[str, Any]:
    """A picture of 32 px in eight steps, some of which ComfyUI's cache skips."""
    graph = small(steps=STEPS)
    graph["latent"]["inputs"]["batch_size"] = batch
    given = {"model": ["shift", 0], "reuse_threshold": threshold}
    more = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    graph["cache"] = node(kind, **given, **more)
    graph["sampler"]["inputs"]["model"] = ["cache", 0]
    return graph


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("where", ["in a block", "beside the model", "between two passes"])
def test_a_repeated_pass_finds_comfyui_s_cache_as_it_was(host, monkeypatch, where, kind) -> None:
    """It decides by what it saw before whether a step is skipped."""
    import comfy.samplers

    graph = cached(kind)
    model = transformer(host, graph)
    every = Faults(())
    with blocks_fail(model, every):
        stock = latent(host.run(graph))
    assert 4 <= every.calls < 4 * STEPS  # it does skip
    for at in range(1, every.calls, 3) if where == "in a block" else (3, 8, 9, 15):
        faults = Faults({at} if where != "between two passes" else {at // 2})
        with monkeypatch.context() as patch:
            name = {"beside the model": "cond_cat", "between two passes": "cfg_function"}
            if where in name:
                whole = getattr(comfy.samplers, name[where])
                failing = lambda *a, f=faults, w=whole, **k: (f.call(), w(*a, **k))[1]  # noqa: E731
                patch.setattr(comfy.samplers, name[where], failing)
            hooks = blocks_fail(model, faults if where not in name else Faults(()))
            with hooks:
                run = host.run(within(graph))
        assert latent(run).equal(stock), (at, (latent(run) - stock).abs().max())
        assert faults.raised == 1 or where in name
        assert run.status("sampler")["exactness"] == "exact"


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_a_batch_with_comfyui_s_cache_stays_together(host, kind: str) -> None:
    graph = cached(kind, threshold=0.5, batch=2)
    graph["positive"]["inputs"]["text"] = "blurry!"  # as long as the other: one batch
    graph["negative"]["inputs"]["text"] = "blurry?"
    graph["latent"]["inputs"].update(width=96, height=96)
    model = transformer(host, graph)
    stock = latent(host.run(graph))
    with blocks_fail(model, Faults(range(4))):
        run = host.run(within(graph))
    assert "one at a time" in run.status("sampler")["done"]
    pictures = "" if kind == "EasyCache" else "pictures and "
    assert f", {pictures}sides of CFG one at a time" in run.status("sampler")["done"]
    assert torch.allclose(latent(run), stock, atol=0.05), (latent(run) - stock).abs().max()


class Counting:
    """A wrapper of another node that lets every third call of the model change the picture."""

    calls = 0

    def __call__(self, executor: Any, *arguments: Any, **more: Any) -> torch.Tensor:
        self.calls += 1
        factor = 1.1 if self.calls % 3 == 0 else 1.0
        return executor(*arguments, **more) * factor


@pytest.mark.parametrize("kind", ["diffusion_model", "apply_model"])
def test_what_an_unknown_wrapper_remembers_is_not_called_exact(host, kind: str) -> None:
    model = transformer(host, small())
    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    patcher.add_wrapper_with_key(kind, "another's", Counting())
    try:
        usual = host.run(within(small())).status("sampler")
        assert usual["exactness"] == "exact" and "another node's" not in usual["text"]
        with blocks_fail(model, Faults({1})):
            said = host.run(within(small())).status("sampler")
    finally:
        patcher.remove_wrappers_with_key(kind, "another's")
    assert said["exactness"] == "not known" and said["forward_passes_repeated"] == 1
    assert "another node's patch (another's) may have seen the failed pass" in said["text"]


def test_what_easycache_writes_over_is_put_back(host) -> None:
    """It adds to its input in place, and to its sum."""
    foreign = host.part("nodes.foreign")
    cache = SimpleNamespace(total=torch.tensor(1.0), diffs={"a": 1}, rates=[1])
    x = torch.ones(3)
    restore = foreign.kept({"easycache": cache}, x)
    cache.total += 5
    cache.diffs["b"] = 2
    cache.rates.append(2)
    cache.new = True
    x += 7
    restore()
    assert vars(cache) == {"total": 1.0, "diffs": {"a": 1}, "rates": [1]} and x.tolist() == [1] * 3
    foreign.kept({}, x)()


def attention(calls: list[int], **marks: Any) -> Any:
    """An attention of another node that looks at the queries: how many there are."""

    def override(attend: Any, query: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return attend(query, *rest, **more) * (1 + 1e-3 * query.shape[2])

    for name, value in marks.items():
        setattr(override, name, value)
    return override


@pytest.mark.parametrize("sliceable", [False, True])
def test_another_node_s_attention_gets_whole_queries(host, sliceable: bool) -> None:
    """What it makes of them may depend on how many there are."""
    graph = small(steps=1)
    graph["latent"]["inputs"].update(width=256, height=256)
    model, calls = transformer(host, graph), []
    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = attention(calls, sliceable=sliceable)
    try:
        stock, whole = latent(host.run(graph)), set(calls)
        calls.clear()
        with blocks_fail(model, Faults(range(3))):
            run = host.run(within(graph))
    finally:
        del options["optimized_attention_override"]
    said = run.status("sampler")
    assert "attention in" in said["done"]
    assert ("Another node's attention wants whole queries" in said["text"]) is not sliceable
    assert (set(calls) == whole) is not sliceable
    assert torch.allclose(latent(run), stock, atol=1e-2) is not sliceable
