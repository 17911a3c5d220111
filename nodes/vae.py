"""Decode and encode within the memory there is, with the picture of an untiled pass."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy_api.latest import io
from torch import Tensor

from .status import shown
from .vae_pictures import decode, encode, why_stock_decodes, why_stock_encodes
from .vram_limit import GB, RANGE

STOCK = "stock"
LIMIT_TOOLTIP = (
    "GB of working memory that the pass may take, besides the VAE itself. 0: what is free."
)


def _limit(vram_limit: float) -> int | None:
    """In bytes; None without one."""
    return round(vram_limit * GB) or None


class Decode(io.ComfyNode):
    """Latents to pictures, within a number of bytes, exactly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMDecode.md."""
        return io.Schema(
            node_id="QwenVRAMDecode",
            display_name="VAE Decode (Qwen VRAM)",
            category="Qwen VRAM/vae",
            description=(
                "Decodes latents within the memory there is. Large pictures go by tiles, but come "
                "out as if decoded at once: no seams, no change of colour."
            ),
            search_aliases=["vae decode", "vae decode tiled", "latent to image", "out of memory"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latents to decode."),
                io.Vae.Input("vae", tooltip="The VAE of Qwen-Image. Others go ComfyUI's own way."),
                io.Float.Input(
                    "vram_limit",
                    default=0.0,
                    **RANGE,
                    tooltip=LIMIT_TOOLTIP,
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: comfy.sd.VAE, vram_limit: float
    ) -> io.NodeOutput:
        """As ComfyUI's VAEDecode."""
        latents = samples["samples"]
        if latents.is_nested:
            latents = latents.unbind()[0]
        if not len(latents):
            raise ValueError("samples holds no latents: its batch is empty. Connect at least one.")
        if why := why_stock_decodes(vae, latents):
            images = vae.decode(latents)
            text, facts = f"ComfyUI's own decode: {why}", {"how": STOCK, "why": why}
        else:
            images, outcome = decode(vae, latents, _limit(vram_limit))
            text, facts = outcome.text(), outcome._asdict()
        if images.ndim == 5:
            images = images.reshape(-1, *images.shape[-3:])
        return shown(images, text=text, **facts)


class Encode(io.ComfyNode):
    """Pictures to latents, within a number of bytes, exactly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMEncode.md."""
        return io.Schema(
            node_id="QwenVRAMEncode",
            display_name="VAE Encode (Qwen VRAM)",
            category="Qwen VRAM/vae",
            description=(
                "Encodes a picture within the memory there is. A large one goes by tiles, but the "
                "latent is that of the whole picture."
            ),
            search_aliases=["vae encode", "vae encode tiled", "image to latent", "out of memory"],
            inputs=[
                io.Image.Input("pixels", tooltip="The picture to encode."),
                io.Vae.Input("vae", tooltip="The VAE of Qwen-Image. Others go ComfyUI's own way."),
                io.Float.Input(
                    "vram_limit",
                    default=0.0,
                    **RANGE,
                    tooltip=LIMIT_TOOLTIP,
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels: Tensor, vae: comfy.sd.VAE, vram_limit: float) -> io.NodeOutput:
        """As ComfyUI's VAEEncode."""
        if not len(pixels):
            raise ValueError("pixels holds no picture: its batch is empty. Connect at least one.")
        if why := why_stock_encodes(vae, pixels):
            latents = vae.encode(pixels)
            text, facts = f"ComfyUI's own encode: {why}", {"how": STOCK, "why": why}
        else:
            latents, outcome = encode(vae, pixels, _limit(vram_limit))
            text, facts = outcome.text(), outcome._asdict()
        return shown({"samples": latents}, text=text, **facts)


NODES = [Decode, Encode]
