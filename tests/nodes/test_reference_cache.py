"""Edits whose references are reused: what is computed, when, and what is told."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.host import Host
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
