"""Trains the VAE and the classifier, both straight from pictures."""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

from .. import classifier
from ..animals import Scene
from . import networks
from .networks import wan
from .world import Pictures


def pixels(batch: np.ndarray | torch.Tensor, device: str) -> torch.Tensor:
    """(B, H, W, 3) bytes to (B, 3, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch
    return tensor.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) bytes."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def encode(vae: wan.WanVAE, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to latents as the transformer sees them, (B, 16, 1, h, w)."""
    return networks.to_model(vae.encode(images.unsqueeze(2)))


def decode(vae: wan.WanVAE, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`."""
    return vae.decode(networks.from_model(latents.float())).squeeze(2)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbours, downwards and to the right."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def _loss(vae: wan.WanVAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What training makes small, and the mean error alone; `x` is (B, 3, 1, H, W)."""
    z = vae.encode(x)
    # The decoder meets latents that a few sampling steps have not quite cleaned.
    y = vae.decode(z + 0.07 * z.detach().std() * torch.randn_like(z))
    error = (y - x).abs().mean()
    slopes = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
    square = (y - x).square().mean()
    return error + 0.5 * slopes + square + 1e-4 * z.square().mean(), error.detach()


def train_vae(
    sheets: list[Pictures], steps: int, batch: int, device: str
) -> tuple[wan.WanVAE, dict[str, float]]:
    """A VAE whose latents have Wan 2.1's statistics, from `steps` batches of `batch` pictures."""
    wan.CausalConv3d.forward = networks.flat_convolution
    torch.manual_seed(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    vae = networks.new_vae().to(device)
    average = copy.deepcopy(vae)
    pools = [torch.from_numpy(sheet.wait()).to(device) for sheet in sheets]
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4, fused=device == "cuda"
    )
    start, errors = time.time(), []
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        optimizer.param_groups[0]["lr"] = 2.5e-3 * min(1, (step + 1) / 100) * cosine
        pool = pools[0 if step % 6 else 1 + step // 6 % (len(pools) - 1)]
        count = max(1, batch * pools[0][0].numel() // pool[0].numel())
        x = pixels(pool[torch.randint(len(pool), (count,), device=device)], device)
        loss, error = _loss(vae, x.to(memory_format=torch.channels_last).unsqueeze(2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            share = max(0.002, 9 / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), share)
        errors.append(error)
        if (step + 1) % 500 == 0:
            mean = torch.stack(errors[-100:]).mean().item()
            print(f"vae {step + 1} {time.time() - start:.0f}s L1 {mean:.4f}", flush=True)
    _fold(average, pools[0], device)
    return average, {"vae_seconds": time.time() - start, **_measured(average, pools, device)}


@torch.no_grad()
def _fold(vae: wan.WanVAE, pool: torch.Tensor, device: str) -> None:
    parts = [pool[i : i + 32] for i in range(0, min(1024, len(pool)), 32)]
    z = torch.cat([vae.encode(pixels(part, device).unsqueeze(2)) for part in parts])
    networks.fold_statistics(vae, z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)) + 1e-4)


@torch.no_grad()
def _measured(vae: wan.WanVAE, pools: list[torch.Tensor], device: str) -> dict[str, float]:
    figures = {}
    for pool in pools:
        x = pixels(pool[:32], device)
        error = (x - decode(vae, encode(vae, x)).clamp(-1, 1)) / 2
        key = f"vae_psnr_{x.shape[-1]}x{x.shape[-2]}"
        figures[key] = round(-10 * math.log10(error.square().mean()), 2)
    return figures


@torch.no_grad()
def _small(sheet: Pictures, vae: wan.WanVAE, device: str) -> torch.Tensor:
    """The classifier's pictures; half went through the VAE, for it is to judge content alone."""
    pool, small = torch.from_numpy(sheet.wait()), []
    for i in range(0, len(pool), 64):
        x = pixels(pool[i : i + 64], device)
        if i // 64 % 2:
            x = decode(vae, encode(vae, x)).clamp(-1, 1)
        small.append(F.interpolate(x, (classifier.SIDE, classifier.SIDE), mode="area").half())
    return torch.cat(small)


def train_classifier(
    sheet: Pictures, vae: wan.WanVAE, steps: int, device: str
) -> tuple[classifier.Classifier, dict[str, float]]:
    """The judge of the embedded model, tested on pictures that it has not seen."""
    torch.manual_seed(2)
    images, total = _small(sheet, vae, device), len(sheet.scenes)
    wanted = {k: v.to(device) for k, v in classifier.labels(sheet.scenes).items()}
    order = torch.randperm(total)  # pictures with a watermark come last in the sheet
    held, rest = order[: max(64, total // 16)], order[max(64, total // 16) :].to(device)
    model = classifier.Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        index = rest[torch.randint(len(rest), (256,), device=device)]
        x = images[index].float()
        x = x + 0.05 * torch.randn_like(x) * torch.rand(256, 1, 1, 1, device=device)
        logits = model(torch.roll(x, torch.randint(-8, 9, (2,)).tolist(), (2, 3)))
        loss = sum(F.cross_entropy(logits[k], v[index]) for k, v in wanted.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    scenes: list[Scene] = [sheet.scenes[i] for i in held.tolist()]
    hits = classifier.right(model, images[held.to(device)].float(), scenes)
    return model, {f"classifier_{k}": v.float().mean().item() for k, v in hits.items()}
