"""Pictures and latents through Wan 2.1's VAE as ComfyUI's `VAE.decode` and `VAE.encode` do it."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy import model_management
from comfy.utils import ProgressBar
from torch import Tensor

from ..core.vae_tiles import Load
from .vae_layers import Layers, Outcome, why_unknown
from .vae_passes import Pass


class Silent(ProgressBar):
    """A progress bar that nobody sees: for pictures within work that has one of its own."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.hook = None


def why_stock_decodes(vae: Any, latents: Tensor) -> str:
    """Why ComfyUI's own way decodes this; nothing if ours does."""
    if why := why_unknown(vae):
        return why
    if latents.ndim != 5:
        return f"latents of {latents.ndim} dimensions are not of this VAE"
    if latents.shape[2] != 1:
        return f"{latents.shape[2]} frames are a video"
    return ""


def why_stock_encodes(vae: Any, pixels: Tensor) -> str:
    """Why ComfyUI's own way encodes this; nothing if ours does."""
    if why := why_unknown(vae):
        return why
    if pixels.ndim != 4:
        return f"pictures of {pixels.ndim} dimensions"
    if vae.not_video:
        return "another node has changed that a batch is a video to it"
    if pixels.shape[0] != 1:
        return f"to this VAE {pixels.shape[0]} pictures are a video"
    if min(pixels.shape[1:3]) < vae.spacial_compression_encode():
        return "the picture is smaller than one latent pixel"
    return ""


def _run(
    vae: comfy.sd.VAE,
    layers: Layers,
    source: Tensor,
    shape: tuple[int, ...],
    load: Load,
    estimate: int,
    limit: int | None,
    bar: type[ProgressBar],
) -> tuple[Tensor, Outcome]:
    """All pictures of a source [b, c, 1, h, w]. Arguments as of Pass and of its `run`."""
    with model_management.cuda_device_context(vae.device):
        work = Pass(vae, layers, tuple(source.shape[-2:]), limit, bar)
        return work.run(source, shape, load, estimate)


def decode(
    vae: comfy.sd.VAE, latents: Tensor, limit: int | None, bar: type[ProgressBar] = ProgressBar
) -> tuple[Tensor, Outcome]:
    """Pictures [b, 1, h, w, c], as `VAE.decode` gives them."""
    layers = Layers.decoding(vae)
    batch, _, _, height, width = latents.shape
    scale = vae.spacial_compression_decode()
    shape = (batch, layers.channels, 1, height * scale, width * scale)

    def load(part: Tensor) -> Tensor:
        """Latents, to the device."""
        return part.to(device=vae.device, dtype=vae.vae_dtype)

    estimate = vae.memory_used_decode(latents.shape, vae.vae_dtype)
    pixels, outcome = _run(vae, layers, latents, shape, load, estimate, limit, bar)
    vae.process_output(pixels)
    return pixels.movedim(1, -1), outcome


def encode(
    vae: comfy.sd.VAE, pixels: Tensor, limit: int | None, bar: type[ProgressBar] = ProgressBar
) -> tuple[Tensor, Outcome]:
    """Latents [b, c, 1, h, w], as `VAE.encode` gives them."""
    layers = Layers.encoding(vae)
    pictures = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    # As ComfyUI does it: the kernels depend on the strides.
    pictures = pictures.movedim(1, 0).unsqueeze(0)
    batch, _, _, height, width = pictures.shape
    scale = vae.spacial_compression_encode()
    shape = (batch, layers.channels, 1, height // scale, width // scale)

    def load(part: Tensor) -> Tensor:
        """Pixels in the VAE's range, to the device."""
        return vae.process_input(part).to(vae.vae_dtype).to(vae.device)

    estimate = vae.memory_used_encode(pictures.shape, vae.vae_dtype)
    latents, outcome = _run(vae, layers, pictures, shape, load, estimate, limit, bar)
    return latents if vae.format_encoded is None else vae.format_encoded(latents), outcome
