"""Trains the transformer: text to image and editing, several sizes, one file."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import networks
from .networks import qwen_vl
from .world import TAIL, VISION_END, Tokens

Groups = dict[int, tuple[torch.Tensor, torch.Tensor]]
PEAK_RATE = 2e-3
WARM_UP = 400
SHIFT = 3.1  # of ModelSamplingAuraFlow in the official workflows


@dataclass
class Bucket:
    """Latents of one size, (N, 16, h, w), with their prompts; `before` for edits."""

    name: str
    weight: float
    latents: torch.Tensor
    groups: Groups
    before: torch.Tensor | None = None
    lengths: list[int] = field(init=False)
    shares: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = list(self.groups)
        self.shares = [len(index) for index, _ in self.groups.values()]


class Text:
    """Turns token numbers into what the text encoder gives, and keeps some encoded pictures."""

    def __init__(self, encoder: networks.TextEncoder, device: str) -> None:
        with torch.no_grad():
            codes = networks.sign_codes().to(device)
            self.encoder = encoder.to(device)
            self.table = torch.cat([encoder.features(part) for part in codes.split(8192)])
        self.device = device
        self.prefix = torch.tensor(Tokens().picture, device=device)
        self.pictures: dict[tuple[int, int], torch.Tensor] = {}

    def remember(self, images: torch.Tensor, width: int, height: int) -> None:
        """Encode pictures (B, H, W, 3) in [0, 1] at 384x384 pixels, as the edit node does."""
        scale = math.sqrt(384 * 384 / (width * height))
        size = (round(height * scale), round(width * scale))
        kept = []
        with torch.no_grad():
            for image in images:
                x = torch.nn.functional.interpolate(
                    image.permute(2, 0, 1)[None].to(self.device), size, mode="area"
                )
                patches, grid = qwen_vl.process_qwen2vl_images(x.permute(0, 2, 3, 1))
                vision = self.encoder.visual(patches.to(self.device), grid.to(self.device))
                kept.append(self.encoder.features(vision.reshape(1, -1, vision.shape[-1])))
        self.pictures[width, height] = torch.cat(kept)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) to (B, L, channels), a little uncertain as attention in the encoder makes it."""
        values = self.table[tokens.to(self.device)]
        return values + 0.02 * torch.randn_like(values)

    def with_picture(self, text: torch.Tensor, size: tuple[int, int], plus: bool) -> torch.Tensor:
        """Puts an encoded picture before the text as the edit template does."""
        bank = self.pictures[size]
        picture = bank[torch.randint(len(bank), (len(text),), device=self.device)]
        prefix = self.table[self.prefix if plus else self.prefix[-1:]]
        end = self.table[VISION_END].expand(len(text), 1, -1)
        return torch.cat((prefix.expand(len(text), -1, -1), picture, end, text), 1)


class Trainer:
    """Weights in full precision, work in bfloat16, and an average of the weights as the result."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = networks.new_transformer()
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
        """One step of AdamW with the gradients of the working copy."""
        # The last block ends without a text stream, so a few weights of it have no gradient.
        gradients = [
            torch.zeros_like(m) if p.grad is None else p.grad.float()
            for p, m in zip(self.working, self.master, strict=True)
        ]
        norms = torch._foreach_norm(gradients)
        factor = (1.0 / torch.stack(norms).norm().clamp(min=1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        self.step += 1
        torch._foreach_lerp_(self.first, gradients, 0.1)
        torch._foreach_mul_(self.second, 0.98)
        torch._foreach_addcmul_(self.second, gradients, gradients, 0.02)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_div_(scale, math.sqrt(1 - 0.98**self.step))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(self.master, 1 - rate * 0.01)
        torch._foreach_addcdiv_(self.master, self.first, scale, value=-rate / (1 - 0.9**self.step))
        torch._foreach_copy_(self.working, self.master)
        decay = min(0.999, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.average, self.master, 1 - decay)
        for p in self.working:
            p.grad = None

    def save(self, folder: Path) -> None:
        """Four files, each under 16 MiB; the moments need no full precision."""
        parts = {
            "master": self.master,
            "average": self.average,
            "first": [p.bfloat16() for p in self.first],
            "second": [p.bfloat16() for p in self.second],
        }
        for name, tensors in parts.items():
            state = dict(zip(self.names, tensors, strict=True))
            networks.save(state, folder / f"{name}.safetensors", {"step": str(self.step)})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        from safetensors import safe_open

        for name in ("master", "average", "first", "second"):
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                self.step = int(file.metadata()["step"])
                for key, tensor in zip(self.names, getattr(self, name), strict=True):
                    tensor.copy_(file.get_tensor(key))
        with torch.no_grad():
            torch._foreach_copy_(self.working, self.master)

    def export(self, path: Path) -> None:
        """The average, as a checkpoint of Qwen-Image-Edit-2511's kind in bfloat16."""
        state = {k: v.bfloat16() for k, v in zip(self.names, self.average, strict=True)}
        state["__index_timestep_zero__"] = torch.tensor([], dtype=torch.bfloat16)
        networks.save(state, path, {})


def fused() -> Callable[[], None]:
    """Compiles the blocks for every batch and length at once; call the result to undo it."""
    block = networks.QwenImageTransformerBlock
    plain = block.forward

    def forward(
        self: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: None,
        temb: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        timestep_zero_index: int | None = None,
        transformer_options: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The options hold the number of the block, for which it would be compiled again.
        image, text = hidden_states, encoder_hidden_states
        return plain(self, image, text, None, temb, image_rotary_emb, timestep_zero_index, {})

    def undo() -> None:
        block.forward = plain

    block.forward = torch.compile(forward, dynamic=True)
    return undo


def sigmas(count: int, device: str) -> torch.Tensor:
    """Noise levels: mostly in the middle, some everywhere, then ComfyUI's shift."""
    t = torch.sigmoid(torch.randn(count, device=device) * 1.2)
    t = torch.where(torch.rand(count, device=device) < 0.3, torch.rand_like(t), t)
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def train(
    trainer: Trainer,
    buckets: list[Bucket],
    text: Text,
    steps: int,
    seconds: float,
    budget: int,
    start_progress: float,
    checkpoint: Callable[[float], None],
    every: float = 60.0,
    stop_at: float = 1e9,
) -> dict[str, float]:
    """Trains until `steps`, or until `seconds` of a schedule that began at `start_progress`."""
    device = trainer.device
    rng = random.Random(1000 + trainer.step)
    torch.manual_seed(1000 + trainer.step)
    start = saved = time.time()
    losses: dict[str, list[torch.Tensor]] = {bucket.name: [] for bucket in buckets}
    first_step, seen = trainer.step, 0
    null = torch.tensor(TAIL).view(1, -1)
    undo = fused() if device == "cuda" else lambda: None
    while True:
        passed = start_progress + (1 - start_progress) * (time.time() - start) / seconds
        progress = max(trainer.step / steps, passed)
        if progress >= 1 or time.time() - start > stop_at:
            break
        bucket = rng.choices(buckets, [b.weight for b in buckets])[0]
        length = rng.choices(bucket.lengths, bucket.shares)[0]
        index, tokens = bucket.groups[length]
        h, w = bucket.latents.shape[-2:]
        picture = bucket.before is not None and rng.random() < 0.65
        area = h * w // 4 * (1 if bucket.before is None else 2) + length + 210 * picture
        count = min(512, max(4, budget // area))
        pick = torch.randint(len(index), (count,))
        owner = index[pick].to(device)
        x0 = bucket.latents[owner].float().unsqueeze(2)
        with torch.no_grad():
            words = tokens[pick] if rng.random() > 0.08 else null.expand(count, -1)
            context = text(words)
            references = None
            if bucket.before is not None:
                references = [bucket.before[owner].unsqueeze(2).to(trainer.dtype)]
                if picture:
                    context = text.with_picture(context, (w * 8, h * 8), rng.random() < 0.8)
            t = sigmas(count, device)
            noise = torch.randn_like(x0)
            level = t.view(-1, 1, 1, 1, 1)
            x = (level * noise + (1 - level) * x0).to(trainer.dtype)
        v = trainer.model(x, t, context.to(trainer.dtype), ref_latents=references)
        loss = (v.float() - (noise - x0)).square().mean()
        loss.backward()
        rate = PEAK_RATE * min(1, (trainer.step + 1) / WARM_UP)
        trainer.update(rate * (0.5 * (1 + math.cos(math.pi * progress)) + 0.002))
        losses[bucket.name].append(loss.detach())
        seen += count
        if trainer.step % 500 == 0 or trainer.step - first_step in (20, 100):
            means = {k: f"{torch.stack(v[-100:]).mean():.4f}" for k, v in losses.items() if v}
            print(
                f"step {trainer.step} {time.time() - start:.0f}s p {progress:.3f} {means}",
                flush=True,
            )
        if time.time() - saved > every:
            saved = time.time()
            checkpoint(progress)
    undo()
    checkpoint(progress)
    result = {f"loss_{k}": torch.stack(v[-200:]).mean().item() for k, v in losses.items() if v}
    spent = time.time() - start
    rate = (trainer.step - first_step) / max(spent, 1e-3)
    return {
        **result,
        "steps": trainer.step,
        "steps_per_second": rate,
        "samples": seen,
        "seconds": spent,
    }


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    shape: tuple[int, ...],
    context: torch.Tensor,
    seed: int,
    steps: int = 8,
    guidance: float = 1.0,
    negative: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Euler with ComfyUI's "simple" schedule and ModelSamplingAuraFlow 3.1."""
    device, dtype = context.device, next(model.parameters()).dtype
    table = np.arange(1, 1001) / 1000
    table = SHIFT * table / (1 + (SHIFT - 1) * table)
    levels = [float(table[-(1 + int(i * 1000 / steps))]) for i in range(steps)] + [0.0]
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    references = None if reference is None else [reference.to(dtype)]
    for now, then in zip(levels, levels[1:], strict=False):
        t = torch.full((shape[0],), now, device=device)
        v = model(x.to(dtype), t, context.to(dtype), mask, ref_latents=references).float()
        if guidance != 1 and negative is not None:
            low = model(x.to(dtype), t, negative.to(dtype), ref_latents=references).float()
            v = low + guidance * (v - low)
        x = x + (then - now) * v
    return x
