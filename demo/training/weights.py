"""The weights of a transformer in training: AdamW, a moving average, checkpoints, the result."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from . import networks

AVERAGED_STEPS = 1000
BETAS = (0.9, 0.98)
DECAY = 0.01
LARGEST_GRADIENT = 1.0
KEPT = ("master", "average", "first", "second")


class Weights:
    """Full precision beside a bfloat16 model that works, and an average that is the result."""

    def __init__(self, text_width: int, device: str) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = networks.new_transformer(text_width)
        self.names = [name for name, _ in model.named_parameters()]
        self.master = [p.detach().clone().to(device) for p in model.parameters()]
        self.average = [p.clone() for p in self.master]
        self.first = [torch.zeros_like(p) for p in self.master]
        self.second = [torch.zeros_like(p) for p in self.master]
        self.model = model.to(device, self.dtype)
        self.working = list(self.model.parameters())
        self.step = 0

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step of AdamW (arXiv 1711.05101) with the gradients of the working copy."""
        # The last block ends without a text stream, so a few weights of it have no gradient.
        gradients = [
            torch.zeros_like(m) if p.grad is None else p.grad.float()
            for p, m in zip(self.working, self.master, strict=True)
        ]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (LARGEST_GRADIENT / norm.clamp(min=1e-6)).clamp(max=1.0))
        self.step += 1
        one, two = BETAS
        torch._foreach_lerp_(self.first, gradients, 1 - one)
        torch._foreach_mul_(self.second, two)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - two)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_div_(scale, math.sqrt(1 - two**self.step))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(self.master, 1 - rate * DECAY)
        stride = -rate / (1 - one**self.step)
        torch._foreach_addcdiv_(self.master, self.first, scale, value=stride)
        torch._foreach_copy_(self.working, self.master)
        share = max(1 / AVERAGED_STEPS, 9 / (self.step + 10))
        torch._foreach_lerp_(self.average, self.master, share)
        for p in self.working:
            p.grad = None

    def save(self, path: Path) -> None:
        """One file, replaced as a whole; the moments need no full precision."""
        state = {}
        for part in KEPT:
            tensors = getattr(self, part)
            if part in ("first", "second"):
                tensors = [p.bfloat16() for p in tensors]
            state |= {f"{part}.{n}": p for n, p in zip(self.names, tensors, strict=True)}
        networks.save(state, path, {"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote."""
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
            for part in KEPT:
                for name, tensor in zip(self.names, getattr(self, part), strict=True):
                    tensor.copy_(file.get_tensor(f"{part}.{name}"))
        with torch.no_grad():
            torch._foreach_copy_(self.working, self.master)

    def result(self) -> torch.nn.Module:
        """The model with the average for weights, as it is shipped."""
        with torch.no_grad():
            for p, average in zip(self.working, self.average, strict=True):
                p.copy_(average.bfloat16())
        return self.model.eval()

    def export(self, path: Path) -> None:
        """The average, as a checkpoint of Qwen-Image-Edit-2511's kind in bfloat16."""
        state = {k: v.bfloat16() for k, v in zip(self.names, self.average, strict=True)}
        state["__index_timestep_zero__"] = torch.tensor([], dtype=torch.bfloat16)
        networks.save(state, path, {})
