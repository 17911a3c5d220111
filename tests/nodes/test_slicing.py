"""A Qwen-Image transformer in slices computes what it computes whole, in less memory."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pack.demo.tiny_checkpoints import LAYERS, TEXT_HIDDEN
from pack.tests.graphs import LORA, UNET
from pack.tests.host import Host
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

QUARTERS = {"feed_forward": 4}
THIRDS = {"projections": 3}
QUERIES = {"projections": 3, "attention": 5}
EVERYTHING = {**QUARTERS, **QUERIES}


@pytest.fixture(scope="module")
def slicing(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.slicing")


def transformer(dtype: torch.dtype, heads: int = 4, head_dim: int = 32, ref: str = "index") -> Any:
    """A random Qwen-Image transformer of two blocks, with biases and norms that matter."""
    import comfy.ops
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    model = QwenImageTransformer2DModel(
        num_layers=LAYERS,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=axes,
        default_ref_method=ref,
        dtype=dtype,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.requires_grad_(False).eval()


def inputs(dtype: torch.dtype, batch: int, sides: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Arguments of one forward pass; `references` and `mask` on demand."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = {
        "x": random(batch, 16, 1, *sides),
        "timestep": torch.full((batch,), 0.7),
        "context": random(batch, 13, TEXT_HIDDEN),
    }
    if more.get("references"):
        found["ref_latents"] = [random(batch, 16, 1, 22, 18), random(batch, 16, 1, 10, 31)]
    if more.get("mask"):
        found["attention_mask"] = torch.tensor([[1] * 9 + [0] * 4] * batch)
    return found


@torch.inference_mode()
def run(slicing: ModuleType, model: Any, given: dict[str, Any], **plan: Any) -> Tensor:
    """The model's own forward pass with our wrapper, by a plan."""
    plans = slicing.Plans()
    plans.set(torch.device("cpu"), slicing.Plan(**plan))
    options = {
        "wrappers": {"diffusion_model": {slicing.KEY: [slicing.partial(slicing._run, plans)]}}
    }
    options.update(given.get("transformer_options", {}))
    result = model(**{**given, "transformer_options": options})
    run.reasons = plans.reasons()
    return result


SHAPES = {
    "one": (1, (40, 36), {}),
    "odd": (1, (41, 35), {}),
    "two": (2, (34, 30), {}),
    "references": (1, (30, 26), {"references": True}),
    "mask": (2, (34, 30), {"mask": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kind",
    [(4, 32, "index"), (2, 128, "index"), (4, 32, "index_timestep_zero")],
    ids=["narrow", "128", "t0"],
)
def test_slices_compute_the_same_bits_or_round_at_most(slicing, dtype, shape, kind) -> None:
    heads, head_dim, ref = kind
    batch, sides, more = SHAPES[shape]
    model, given = transformer(dtype, heads, head_dim, ref), inputs(dtype, batch, sides, **more)
    with torch.inference_mode():
        stock = model(**given)
    for plan in ({}, QUARTERS, THIRDS, QUERIES, EVERYTHING):
        out = run(slicing, model, given, **plan)
        err = (out.float() - stock.float()).abs().max().item()
        print(
            "\n",
            dtype,
            shape,
            kind,
            plan,
            torch.equal(out, stock),
            err,
            stock.float().abs().max().item(),
        )
