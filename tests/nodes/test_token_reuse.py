"""Forward passes that record and reuse groups of tokens, against passes written out here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.tests.host import Host
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
