"""Random Qwen-Image transformers, their inputs, and runs through the host's own sampler."""

from __future__ import annotations

from typing import Any

import torch
from pack.demo.tiny_checkpoints import LAYERS, TEXT_HIDDEN
from torch import Tensor

SIDES = (40, 36)  # latent pixels: 360 tokens, up to 5 slices


def transformer(
    dtype: torch.dtype,
    heads: int = 4,
    head_dim: int = 32,
    ref: str = "index",
    layers: int = LAYERS,
) -> Any:
    """Blocks with biases and norms that matter; `ref` as the checkpoint would tell."""
    import comfy.ops
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
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


def random(*shape: int, seed: int = 6) -> Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    dtype: torch.dtype,
    batch: int = 1,
    sides: tuple[int, int] = SIDES,
    references: bool = False,
    mask: bool = False,
) -> dict[str, Any]:
    """Arguments of one forward pass of the transformer."""
    found: dict[str, Any] = {
        "x": random(batch, 16, 1, *sides).to(dtype),
        "timestep": torch.full((batch,), 0.7),
        "context": random(batch, 13, TEXT_HIDDEN).to(dtype),
    }
    if references:
        shapes = ((22, 18), (10, 31))
        found["ref_latents"] = [random(batch, 16, 1, *s).to(dtype) for s in shapes]
    if mask:
        found["attention_mask"] = torch.tensor([[1] * 9 + [0] * 4] * batch)
    return found


def conditioning(tokens: int = 13, seed: int = 7, **more: Any) -> list[Any]:
    """What an encoder node puts out."""
    return [[random(1, tokens, TEXT_HIDDEN, seed=seed), more]]


@torch.inference_mode()
def sample(
    patcher: Any,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    sides: tuple[int, int] = SIDES,
    batch: int = 1,
    steps: int = 2,
    sampler_name: str = "euler",
) -> Tensor:
    """The host's sampler with CFG; by default both sides of it have one shape, and are batched."""
    import comfy.sample

    latent = torch.zeros(batch, 16, 1, *sides)
    return comfy.sample.sample(
        patcher,
        random(*latent.shape),
        steps,
        2.5,
        sampler_name,
        "simple",
        positive or conditioning(),
        negative or conditioning(seed=8),
        latent,
        disable_pbar=True,
        seed=1,
    )
