"""Pictures on which tiles can be judged: flat, gradient, textured, text, and what moves them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor


def flat(height: int, width: int, seed: int = 0) -> Tensor:
    """One colour, (1, h, w, 3) as all of them."""
    return torch.tensor([0.62, 0.55, 0.44]).expand(1, height, width, 3).contiguous()


def gradient(height: int, width: int, seed: int = 0) -> Tensor:
    """Colours that change over the whole picture."""
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    right = torch.linspace(0, 1, width)[None].expand(height, width)
    return torch.stack([0.2 + 0.6 * right, 0.3 + 0.4 * down, 0.8 - 0.5 * right * down], -1)[None]


def textured(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise of three widths, as of cloth and plaster."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for sigma, share in ((1.2, 1.0), (4.0, 1.5), (16.0, 2.0)):
        noise = ndimage.gaussian_filter(
            rng.standard_normal((height, width, 3)), (sigma, sigma, 0), mode="wrap"
        )
        total += share * noise / noise.std()
    return torch.from_numpy(0.5 + 0.07 * total).float().clamp(0, 1)[None]


def text(
    height: int, width: int, seed: int = 0, sizes: tuple[int, ...] = (12, 16, 22, 30)
) -> Tensor:
    """Lines of letters in several sizes and dark colours on paper."""
    image, top = Image.new("RGB", (width, height), (245, 243, 238)), 6
    rng, draw = np.random.default_rng(seed), ImageDraw.Draw(image)
    while top < height:
        size = int(rng.choice(sizes))
        letters = "".join(chr(c) if c > 96 else " " for c in rng.integers(92, 123, width // 4))
        colour = tuple(int(c) for c in rng.integers(0, 110, 3))
        draw.text((6, top), letters, fill=colour, font=ImageFont.load_default(size))
        top += size + 6
    return _tensor(image)


def objects(height: int, width: int, seed: int = 0) -> Tensor:
    """A gradient with forty plain things on it."""
    image = Image.fromarray((gradient(height, width)[0].numpy() * 255).astype(np.uint8))
    rng, draw = np.random.default_rng(seed), ImageDraw.Draw(image)
    for _ in range(40):
        left, top, size = rng.integers(0, width), rng.integers(0, height), rng.integers(10, 60)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        draw.ellipse((left, top, left + size, top + size * 0.7), fill=colour)
    return _tensor(image)


PICTURES: dict[str, Callable[..., Tensor]] = {
    "flat": flat,
    "gradient": gradient,
    "textured": textured,
    "text": text,
}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def moved(picture: Tensor, down: float, right: float) -> Tensor:
    """Moved by parts of a pixel: splines of the fifth order, edges repeated."""
    channels = [
        ndimage.shift(c.numpy(), (down, right), order=5, mode="nearest")
        for c in picture[0].unbind(-1)
    ]
    return torch.from_numpy(np.stack(channels, -1))[None]


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """As a VAE or a model softens it; `sigma` in pixels."""
    return torch.from_numpy(ndimage.gaussian_filter(picture.numpy(), (0, sigma, sigma, 0)))


def noisy(picture: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """With noise of a standard deviation."""
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return (picture + deviation * noise).clamp(0, 1)
