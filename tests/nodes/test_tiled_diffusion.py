"""A sampler that works in tiles."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.nodes.slicing_models import SIDES, conditioning, random, sample
from torch import Tensor


@pytest.fixture(scope="module")
def tiled(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.tiled_diffusion")


@pytest.fixture
def model(host: Host) -> Iterator[Any]:
    """A model of its own; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


def test_one_tile_is_the_stock_sampler(tiled, model) -> None:
    references = {"reference_latents": [random(1, 16, 1, *SIDES)]}
    both = conditioning(**references), conditioning(tokens=9, seed=8, **references)
    clone = tiled.patch(model, tiled.Tiling(512, 64))
    assert torch.equal(sample(clone, *both), sample(model, *both))


def test_tiles(tiled, model) -> None:
    references = {"reference_latents": [random(1, 16, 1, *SIDES), random(1, 16, 1, 30, 8)]}
    both = conditioning(**references), conditioning(tokens=9, seed=8, **references)
    clone = tiled.patch(model, tiled.Tiling(128, 32))
    one = sample(clone, *both)
    assert not torch.equal(one, sample(model, *both))
    clone = tiled.patch(model, tiled.Tiling(128, 32, batch=3))
    two = sample(clone, *both)
    print((one - two).abs().max(), one.abs().max())
