"""Crops of a picture through the VAE: within memory, whole where that can be, and kept in store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.vae as wan
import comfy.model_management
from torch import Tensor

from ..core.tiling import Tile, TileBlender, TileGrid, crop
from .edit_encoding import EditEncoder, Outcome
from .pictures import Picture, Reference, Size, encode_reference, resized
from .tile_canvas import LATENT
from .vae_layers import WHOLE
from .vae_pictures import Silent, decode, encode, why_stock_decodes, why_stock_encodes

# Above it, pictures go through the VAE tile by tile: the attention in its middle looks from every
# place at every other, at 24 MP 400,000 of them.
WHOLE_PIXELS = 24 * 1024 * 1024


def require_qwen_vae(vae: Any) -> None:
    """Raises ValueError with a sentence."""
    if vae is None:
        raise ValueError(
            "The vae input carries no VAE; this checkpoint has none inside. "
            "Connect Load VAE (Qwen VRAM)."
        )
    model = getattr(vae, "first_stage_model", None)
    if not isinstance(model, wan.WanVAE):
        name = type(vae if model is None else model).__name__
        raise ValueError(
            f"The vae input carries {name}, which is not the VAE of Qwen-Image. "
            "Load qwen_image_vae with Load VAE (Qwen VRAM)."
        )


def require_numbers(pixels: Tensor, what: str) -> Tensor:
    """The same. Raises ValueError where a model has failed: NaN looks like a picture to no one."""
    if not bool(pixels.isfinite().all()):
        raise ValueError(
            f"{what} came out as NaN or infinity, which is no picture. The model's numbers grew "
            "too large, as happens in fp16, or an attention kernel fails with this model. Start "
            "ComfyUI with --bf16-unet --bf16-vae, or with --use-pytorch-cross-attention in place "
            "of another attention."
        )
    return pixels


class Coder:
    """Pictures to latents and back, for one run of a node; `outcomes` tell what the store gave."""

    def __init__(self, vae: Any, encoder: EditEncoder) -> None:
        self._vae, self._encoder = vae, encoder
        self.outcomes: list[Outcome] = []

    def reference(self, picture: Picture) -> Tensor:
        """The latent (1, c, 1, h, w) of a picture as such: from the store, or for it."""
        found = self._encoder.look_up_reference(picture)
        made = self._encoder.reference(found, self._vae, picture, _encode_whole)
        self.outcomes.append(made)
        return made.value

    def stored(self, pixels: Tensor) -> Tensor:
        """The latent of a part of the picture to edit, (1, h, w, 3), in its own size."""
        size = Size(pixels.shape[2], pixels.shape[1])
        return self.reference(Picture(1, pixels, size, "untouched"))

    def encode(self, pixels: Tensor) -> Tensor:
        """The latent of (1, h, w, 3), which is not kept."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if why_stock_encodes(self._vae, pixels):
            return self._vae.encode(pixels)
        return encode(self._vae, pixels, None, Silent)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """(1, c, 1, h, w) -> (1, 8h, 8w, 3), float32 in the RAM."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if why_stock_decodes(self._vae, latent):
            pixels = self._vae.decode(latent)
        else:
            pixels = decode(self._vae, latent, None, Silent)[0]
        return pixels.reshape(-1, *pixels.shape[-3:]).float().cpu()

    def encode_tiles(
        self, grid: TileGrid, pixels_of: Callable[[Tile], Tensor], code: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The latent of a whole picture (1, c, 1, h, w): at once by `code`, or tile by tile."""
        if grid.height * grid.width <= WHOLE_PIXELS:
            return code(pixels_of(Tile(0, 0, grid.height, grid.width)))
        blender: TileBlender | None = None
        for index, tile in enumerate(grid.tiles()):
            latent = self.encode(pixels_of(tile))
            if blender is None:
                shape = (*latent.shape[:-2], grid.height // LATENT, grid.width // LATENT)
                blender = TileBlender(grid.scaled(1, LATENT), shape)
            blender.add(index, latent)
        return blender.result()

    def decoded_tiles(self, grid: TileGrid, latent: Tensor) -> Callable[[Tile], Tensor]:
        """How to get the pixels of a tile of a whole latent."""
        if grid.height * grid.width <= WHOLE_PIXELS:
            pixels = self.decode(latent)
            return lambda tile: crop(pixels, tile, dim=-3)
        return lambda tile: self.decode(crop(latent, in_latent(tile)))


def in_latent(tile: Tile) -> Tile:
    """The same tile in latent pixels."""
    return Tile(*(side // LATENT for side in tile))


def _encode_whole(vae: Any, picture: Picture) -> Reference:
    """As `encode_reference`, but a picture that does not fit at once is encoded exactly, too.

    Rounded otherwise than at once, such a latent is not to be kept.
    """
    pixels = resized(picture.pixels, picture.size, picture.how)
    if why_stock_encodes(vae, pixels):
        return encode_reference(vae, picture)
    latent, outcome = encode(vae, pixels, None, Silent)
    return Reference(latent, outcome.how != WHOLE)
