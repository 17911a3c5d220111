"""Euler steps as ComfyUI takes them, for large batches of figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SHIFT = 3.1  # of ModelSamplingAuraFlow in the official workflows
TABLE = 1000


@dataclass(frozen=True)
class Request:
    """What a batch is drawn from; `reference` (B, 16, 1, h, w) makes it an edit."""

    context: torch.Tensor
    mask: torch.Tensor | None = None  # (B, L), 0 where the context is padding
    negative: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    guidance: float = 1.0


def simple_schedule(steps: int) -> list[float]:
    """ComfyUI's "simple" noise levels under ModelSamplingAuraFlow, ending in 0."""
    t = np.arange(1, TABLE + 1) / TABLE
    table = SHIFT * t / (1 + (SHIFT - 1) * t)
    return [float(table[-(1 + int(i * TABLE / steps))]) for i in range(steps)] + [0.0]


@torch.no_grad()
def sample(
    model: torch.nn.Module, shape: tuple[int, ...], request: Request, seed: int, steps: int = 8
) -> torch.Tensor:
    """Latents of `shape`, (B, 16, 1, h, w)."""
    context, dtype = request.context, next(model.parameters()).dtype
    generator = torch.Generator(context.device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=context.device)
    references = None if request.reference is None else [request.reference.to(dtype)]

    def velocity(text: torch.Tensor, mask: torch.Tensor | None, level: float) -> torch.Tensor:
        t = torch.full((shape[0],), level, device=x.device)
        return model(x.to(dtype), t, text.to(dtype), mask, ref_latents=references).float()

    levels = simple_schedule(steps)
    for now, then in zip(levels, levels[1:], strict=False):
        v = velocity(context, request.mask, now)
        if request.guidance != 1 and request.negative is not None:
            low = velocity(request.negative, None, now)
            v = low + request.guidance * (v - low)
        x = x + (then - now) * v
    return x
