"""Pictures and latents through Wan 2.1's VAE as ComfyUI's `VAE.decode` and `VAE.encode` do it."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.vae as wan
import comfy.sd
import torch
from comfy import model_management
from torch import Tensor, nn

from ..core.vae_plan import plan_for
from ..core.vae_tiles import Load
from .vae_passes import Layers, Outcome, Pass

KNOWN = {wan.CausalConv3d, wan.ResidualBlock, wan.Resample, wan.RMS_norm, nn.SiLU}


def why_stock_decodes(vae: Any, latents: Tensor) -> str:
    """Why ComfyUI's own way decodes this; nothing if ours does."""
    if why := _why_stock(vae):
        return why
    if latents.ndim != 5:
        return f"latents of {latents.ndim} dimensions are not of this VAE"
    if latents.shape[2] != 1:
        return f"{latents.shape[2]} frames are a video"
    return ""


def why_stock_encodes(vae: Any, pixels: Tensor) -> str:
    """Why ComfyUI's own way encodes this; nothing if ours does."""
    if why := _why_stock(vae):
        return why
    if pixels.ndim != 4:
        return f"pictures of {pixels.ndim} dimensions"
    if pixels.shape[0] != 1 and not vae.not_video:
        return f"to this VAE {pixels.shape[0]} pictures are a video"
    if min(pixels.shape[1:3]) < vae.spacial_compression_encode():
        return "the picture is smaller than one latent pixel"
    return ""


def _why_stock(vae: Any) -> str:
    """Why this VAE goes ComfyUI's own way; nothing if it is one whose parts are known."""
    if type(vae) is not comfy.sd.VAE:
        return f"{type(vae).__name__} is not ComfyUI's kind of VAE"
    model = vae.first_stage_model
    if type(model) is not wan.WanVAE:
        return f"{type(model).__name__} is not the VAE of Qwen-Image and Wan 2.1"
    others: set[type] = set()
    for coder in (model.decoder, model.encoder):
        if len(coder.middle) != 3:
            return f"its middle has {len(coder.middle)} layers"
        first, attention, last = coder.middle
        chain = coder.upsamples if coder is model.decoder else coder.downsamples
        others |= {type(layer) for layer in (coder.conv1, first, last, *chain, *coder.head)} - KNOWN
        others |= {type(attention)} - {wan.AttentionBlock}
    if others:
        return f"it has other layers: {', '.join(sorted(kind.__name__ for kind in others))}"
    return ""


def _run(
    vae: comfy.sd.VAE,
    layers: Layers,
    ends: tuple[Tensor, Tensor],
    load: Load,
    estimate: int,
    limit: int | None,
) -> Outcome:
    """All sources into their sinks, one at a time, but on the CPU as many as ComfyUI takes.

    There their number changes the kernel of a convolution, and so the rounding. `estimate` is
    ComfyUI's, of one picture.
    """
    sources, sinks = ends
    size, count = tuple(sources.shape[-2:]), 1
    with model_management.cuda_device_context(vae.device):
        if vae.device.type == "cpu":
            free = vae.patcher.get_free_memory(vae.device)
            count = max(1, min(len(sources), int(free / estimate)))
            if limit is not None and plan_for(layers.network(vae, count), *size, 0).bytes > limit:
                count = 1
        work = Pass(vae, layers, size, limit, count)
        return work.run(sources.split(count), sinks.split(count), load)


def decode(vae: comfy.sd.VAE, latents: Tensor, limit: int | None) -> tuple[Tensor, Outcome]:
    """Pictures [b, 1, h, w, c], as `VAE.decode` gives them."""
    layers = Layers.decoding(vae.first_stage_model)
    batch, _, _, height, width = latents.shape
    scale = vae.spacial_compression_decode()
    pixels = torch.empty(
        (batch, vae.conv_out_channels, 1, height * scale, width * scale),
        device=vae.output_device,
        dtype=vae.vae_output_dtype(),
    )

    def load(part: Tensor) -> Tensor:
        """Latents, to the device."""
        return part.to(device=vae.device, dtype=vae.vae_dtype)

    estimate = vae.memory_used_decode(latents.shape, vae.vae_dtype)
    outcome = _run(vae, layers, (latents, pixels), load, estimate, limit)
    vae.process_output(pixels)
    return pixels.movedim(1, -1), outcome


def encode(vae: comfy.sd.VAE, pixels: Tensor, limit: int | None) -> tuple[Tensor, Outcome]:
    """Latents [b, c, 1, h, w], as `VAE.encode` gives them."""
    layers = Layers.encoding(vae.first_stage_model)
    pictures = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    # As ComfyUI does it: the kernels depend on the strides.
    pictures = pictures.unsqueeze(2) if vae.not_video else pictures.movedim(1, 0).unsqueeze(0)
    batch, _, _, height, width = pictures.shape
    scale = vae.spacial_compression_encode()
    latents = torch.empty(
        (batch, vae.latent_channels, 1, height // scale, width // scale),
        device=vae.output_device,
        dtype=vae.vae_output_dtype(),
    )

    def load(part: Tensor) -> Tensor:
        """Pixels in the VAE's range, to the device."""
        return vae.process_input(part).to(vae.vae_dtype).to(vae.device)

    estimate = vae.memory_used_encode(pictures.shape, vae.vae_dtype)
    outcome = _run(vae, layers, (pictures, latents), load, estimate, limit)
    return latents if vae.format_encoded is None else vae.format_encoded(latents), outcome
