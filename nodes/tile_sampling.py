"""Sampling of a picture's tiles: all together in every step, or one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.sample
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..core.tiling import Tile
from .tile_canvas import Canvas

LAYERED = "negative_index"  # how ComfyUI gives references to Qwen-Image-Layered alone
Callback = Callable[[int, Tensor, Tensor, int], None]


def require_edit_model(model: ModelPatcher) -> None:
    """Raises ValueError for a model that takes no reference latents as Qwen-Image-Edit does.

    Qwen-Image, which draws from text alone, has the very same weights by name and shape: it cannot
    be told apart, and the help says so.
    """
    inner = model.model
    other = isinstance(inner, comfy.model_base.MageFlow)  # made from it, for another VAE
    network = getattr(inner, "diffusion_model", None)
    layered = getattr(network, "default_ref_method", None) == LAYERED
    if not isinstance(inner, comfy.model_base.QwenImage) or other or layered:
        name = "Qwen-Image-Layered" if layered else type(inner).__name__
        raise ValueError(
            f"The model input carries {name}, which is not Qwen-Image-Edit. "
            "Load qwen_image_edit_2511 or another Qwen-Image-Edit with Load Diffusion Model "
            "(Qwen VRAM)."
        )


def takes_negative(model: ModelPatcher, cfg: float) -> bool:
    """Whether ComfyUI runs the negative prompt: not with CFG 1, unless a patch wants to see it."""
    wanted = model.model_options.get("disable_cfg1_optimization", False)
    return bool(wanted) or not math.isclose(cfg, 1.0)


@dataclass(frozen=True)
class Sampling:
    """The settings of a KSampler, and what the picture should and should not become."""

    model: ModelPatcher
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list[Any]
    negative: list[Any]

    def noise(self, height: int, width: int) -> Tensor:
        """The noise of a latent of this size, as a KSampler makes it."""
        latent = comfy.sample.fix_empty_latent_channels(
            self.model, torch.zeros(1, self._channels, 1, height, width)
        )
        return comfy.sample.prepare_noise(latent, self.seed)

    @property
    def _channels(self) -> int:
        return self.model.get_model_object("latent_format").latent_channels

    def run(
        self,
        latent: Tensor,
        noise: Tensor,
        references: Sequence[Tensor],
        *,
        denoise: float,
        mask: Tensor | None,
        callback: Callback,
        model: ModelPatcher | None = None,
    ) -> Tensor:
        """As ComfyUI's `common_ksampler`, with these reference latents. `mask` is (1, h, w)."""
        model = model or self.model
        values = {"reference_latents": list(references)}
        positive, negative = (
            node_helpers.conditioning_set_values(c, values, append=True)
            for c in (self.positive, self.negative)
        )
        return comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            negative,
            comfy.sample.fix_empty_latent_channels(model, latent),
            denoise=denoise,
            noise_mask=mask,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )


class Progress:
    """One bar over the guide and the tiles of all pictures, with a preview of the whole picture.

    It counts steps of tiles; a guide's steps count like those of a tile.
    """

    def __init__(self, sampling_model: ModelPatcher, pictures: int) -> None:
        self._bar, self._pictures = comfy.utils.ProgressBar(1), pictures
        self._picture, self._total, self._done = -1, 1, 0
        inner = sampling_model.model
        self._previewer = latent_preview.get_previewer(
            sampling_model.load_device, inner.latent_format
        )
        self._canvas: Image.Image | None = None
        self._scale = 1.0

    def begin(self, canvas: Canvas) -> None:
        """The next picture."""
        self._picture, self._total, self._done = self._picture + 1, 1, 0
        if self._previewer is not None:
            longest = latent_preview.MAX_PREVIEW_RESOLUTION
            self._scale = min(1.0, longest / max(canvas.height, canvas.width))
            self._canvas = _small(canvas, self._scale)

    def expect(self, steps: int) -> None:
        """What this picture takes, in steps of tiles, with what is done already."""
        self._total = max(1, steps)

    def callback(self, tile: Tile | None = None, tiles: int = 1) -> Callback:
        """For a sampler, each of whose steps counts for `tiles`.

        Its latent is that of one tile of the picture, or of the whole.
        """
        before = self._done

        def step(index: int, x0: Tensor, x: Tensor, total: int) -> None:
            self._done = before + (index + 1) * tiles
            self._show(self._image(x0, tile))

        return step

    def told(self, tiles: int) -> Callable[[int, int], None]:
        """For a model that tells how many of its tiles are done in a step of `tiles`."""

        def tell(done: int, among: int) -> None:
            self._show(None, more=min(tiles - 1, done * tiles // max(1, among)))

        return tell

    def _show(self, image: Any, more: int = 0) -> None:
        done = min(self._total, self._done + more)
        self._bar.update_absolute(
            self._picture * self._total + done, self._pictures * self._total, image
        )

    def _image(self, x0: Tensor, tile: Tile | None) -> Any:
        """The preview: of a whole latent, or of the picture with that of a tile in it."""
        if self._previewer is None:
            return None
        shown = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        if tile is None:
            return shown
        left, top, right, bottom = (
            round(place * self._scale)
            for place in (tile.left, tile.top, tile.left + tile.width, tile.top + tile.height)
        )
        part = shown[1].resize((max(1, right - left), max(1, bottom - top)))
        self._canvas.paste(part, (left, top))
        return shown[0], self._canvas.copy(), shown[2]


def _small(canvas: Canvas, scale: float) -> Image.Image:
    """The picture for the preview: some of its pixels."""
    rows, columns = (
        (torch.arange(max(1, round(side * scale))) / scale).long().clamp(max=side - 1)
        for side in canvas.picture.shape[1:3]
    )
    pixels = canvas.rgb[0, rows[:, None], columns]
    values = (pixels.float() * 255).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.cpu().numpy())
