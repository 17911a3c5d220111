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


def train_vae(
    sheets: list[Pictures], steps: int, seconds: float, batch: int, device: str
) -> tuple[wan.WanVAE, dict[str, float]]:
    """A VAE whose latents have Wan 2.1's statistics; stops at `steps` or after `seconds`."""
    wan.CausalConv3d.forward = networks.flat_convolution
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    vae = networks.new_vae().to(device)
    average = copy.deepcopy(vae)
    pools = [torch.from_numpy(sheet.wait()).to(device) for sheet in sheets]
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4, fused=device == "cuda"
    )
    start, step, losses = time.time(), 0, []
    while True:
        progress = max(step / steps, (time.time() - start) / seconds)
        if progress >= 1:
            break
        rate = 2.5e-3 * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        optimizer.param_groups[0]["lr"] = rate
        which = 0 if step % 6 else 1 + step // 6 % (len(pools) - 1)
        pool = pools[which]
        count = max(1, batch * pools[0][0].numel() // pool[0].numel())
        x = pixels(pool[torch.randint(len(pool), (count,), device=device)], device)
        x = x.to(memory_format=torch.channels_last).unsqueeze(2)
        z = vae.encode(x)
        y = vae.decode(z + 0.07 * z.detach().std() * torch.randn_like(z))
        error = (y - x).abs().mean()
        slopes = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        loss = error + 0.5 * slopes + (y - x).square().mean() + 1e-4 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        step += 1
        if step % 50 == 0:
            losses.append(error.item())
        if step % 500 == 0:
            print(
                f"vae {step} {time.time() - start:.0f}s L1 {np.mean(losses[-10:]):.4f}", flush=True
            )
    figures = {"vae_steps": step, "vae_seconds": time.time() - start}
    with torch.no_grad():
        z = torch.cat(
            [
                average.encode(pixels(pools[0][i : i + 32], device).unsqueeze(2))
                for i in range(0, min(1024, len(pools[0])), 32)
            ]
        )
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)) + 1e-4
        networks.fold_statistics(average, mean, std)
        for pool, sheet in zip(pools, sheets, strict=True):
            x = pixels(pool[:32], device)
            y = decode(average, encode(average, x))
            key = f"vae_{sheet.width}x{sheet.height}"
            figures[f"{key}_l1"] = (x - y).abs().mean().item()
            figures[f"{key}_psnr"] = -10 * math.log10(((x - y.clamp(-1, 1)) / 2).square().mean())
    return average, figures


def train_classifier(
    sheet: Pictures, vae: wan.WanVAE, steps: int, device: str
) -> tuple[classifier.Classifier, dict[str, float]]:
    """Half of its pictures went through the VAE, so that it judges content and not sharpness."""
    torch.manual_seed(2)
    total = len(sheet.scenes)
    pixels_ = torch.from_numpy(sheet.wait())
    small = []
    with torch.no_grad():
        for i in range(0, total, 64):
            x = pixels(pixels_[i : i + 64], device)
            if i // 64 % 2:
                x = decode(vae, encode(vae, x)).clamp(-1, 1)
            side = (classifier.SIDE, classifier.SIDE)
            small.append(F.interpolate(x, side, mode="area").half())
    images = torch.cat(small)
    wanted = {k: v.to(device) for k, v in classifier.labels(sheet.scenes).items()}
    held = max(64, total // 16)
    model = classifier.Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        index = torch.randint(held, total, (256,), device=device)
        x = images[index].float()
        x = x + 0.05 * torch.randn_like(x) * torch.rand(256, 1, 1, 1, device=device)
        shift = torch.randint(-8, 9, (2,)).tolist()
        logits = model(torch.roll(x, shift, (2, 3)))
        loss = sum(F.cross_entropy(logits[k], v[index]) for k, v in wanted.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    scenes: list[Scene] = list(sheet.scenes[:held])
    hits = classifier.right(model, images[:held].float(), scenes)
    return model, {f"classifier_{k}": v.float().mean().item() for k, v in hits.items()}
