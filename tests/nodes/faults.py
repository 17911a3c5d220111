"""Out of memory where a test wants it, on tiny weights on the CPU."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pack.core.fallback_settings import DEFAULT
from pack.tests.graphs import node, text_to_image

OWN = {"policy": "exact only", "vram_limit": 0.0, "settings": DEFAULT}


_runs = itertools.count(1)


def within(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The same graph with our sampler in the place of ComfyUI's; no earlier run is like it."""
    asked = {**graph["sampler"]["inputs"], **OWN, **inputs}
    asked["settings"] += "\n" * next(_runs)
    return {**graph, "sampler": node("QwenVRAMSampler", **asked)}


def fitted(graph: dict[str, Any], model: str = "shift", **inputs: Any) -> dict[str, Any]:
    """The same graph with the model patch before its sampler."""
    patch = node("QwenVRAMFit", **{"model": [model, 0], "policy": "exact only", "vram_limit": 0.0})
    patch["inputs"].update(inputs)
    sampler = {**graph["sampler"], "inputs": {**graph["sampler"]["inputs"], "model": ["fit", 0]}}
    return {**graph, "fit": patch, "sampler": sampler}


def small(sampler_name: str = "euler", **inputs: Any) -> dict[str, Any]:
    """A picture of 32 px in two steps."""
    graph = text_to_image(size=32)
    graph["sampler"]["inputs"].update(sampler_name=sampler_name, **inputs)
    del graph["save"]
    graph["out"] = node("PreviewAny", source=["sampler", 0])
    return graph


def latent(run: Any) -> torch.Tensor:
    """What the sampler of a graph made."""
    return run.outputs["sampler"][0][0]["samples"]


class Faults:
    """Counts calls, and raises at some of them. `tensors` were alive when it did."""

    def __init__(self, at: Collection[int], act: Callable[[], None] | None = None) -> None:
        self.at, self.act, self.calls = at, act, 0
        self.raised = 0
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def call(self, *tensors: torch.Tensor) -> None:
        """One more call."""
        self.calls += 1
        if self.calls - 1 in self.at:
            self.raised += 1
            self.tensors += [weakref.ref(tensor) for tensor in tensors]
            if self.act is not None:
                self.act()
            raise torch.OutOfMemoryError("injected by a test")

    def hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """As a forward hook of a block."""
        self.call(kwargs["hidden_states"], kwargs["encoder_hidden_states"])


def transformer(host: Any, graph: dict[str, Any]) -> torch.nn.Module:
    """The model that a graph's loader gives: later runs in the same executor share it."""
    host.run({"unet": graph["unet"], "seen": node("PreviewAny", source=["unet", 0])})
    return host.executor.caches.outputs.get_local("unet").outputs[0][0].model.diffusion_model


@contextmanager
def blocks_fail(model: torch.nn.Module, faults: Faults) -> Iterator[Faults]:
    """At the beginning of a block of the transformer, in the order in which they run."""
    hooks = [
        block.register_forward_pre_hook(faults.hook, with_kwargs=True)
        for block in model.transformer_blocks
    ]
    try:
        yield faults
    finally:
        for hook in hooks:
            hook.remove()
