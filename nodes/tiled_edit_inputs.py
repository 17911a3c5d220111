"""What Tiled Edit takes: a picture and an instruction, models, settings of sampler and tiles."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..core.tiling import PIXEL_PATCH, PIXEL_STEP, WINDOWS
from .encoding import CACHE_MODES
from .tile_editing import GUIDES, MODES, Settings

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


def what_is_edited() -> list[io.Input]:
    """The picture, the instruction and the models."""
    return [
        io.Image.Input(
            "image", tooltip="The picture to edit. The pictures of a batch go one by one."
        ),
        io.String.Input(
            "instruction",
            multiline=True,
            dynamic_prompts=True,
            tooltip="What to change. It can speak of Picture 1, Picture 2 and so on.",
        ),
        io.String.Input(
            "negative",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip="What the result should not show. Not used with CFG 1.",
        ),
        io.Model.Input("model", tooltip="A Qwen-Image-Edit model."),
        io.Clip.Input("clip", lazy=True, tooltip="The text encoder; used only for what is new."),
        io.Vae.Input("vae", lazy=True, tooltip="The VAE of Qwen-Image."),
    ]


def how_it_is_sampled() -> list[io.Input]:
    """As of a KSampler."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            control_after_generate=True,
            tooltip="The random seed of the noise. All tiles share one field of noise.",
        ),
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="How many steps the guide takes, and each tile.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely the result follows the instruction. 1 needs half the time.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            default="euler",
            tooltip="The algorithm that samples.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="simple",
            tooltip="How the noise is spread over the steps.",
        ),
    ]


def how_tiles_are_drawn() -> list[io.Input]:
    """From where each begins, and whether all go together."""
    return [
        io.Float.Input(
            "denoise",
            default=0.2,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=(
                "How much of the guide the tiles draw anew: less keeps more of it, more may "
                "lose or repeat things. With a guide that is no start of denoising: how much of "
                "the picture; use 1 there."
            ),
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default=MODES[0],
            tooltip=(
                "together: the tiles are blended in every step. one after another: each tile "
                "is edited fully, then they are blended."
            ),
        ),
    ]


def how_it_is_tiled() -> list[io.Input]:
    """The tiles, and what tells them what to become."""
    return [
        io.Int.Input(
            "tile_size",
            default=1024,
            min=256,
            max=2048,
            step=32,
            tooltip="Side of a tile in pixels. The model is made for about 1024.",
        ),
        io.Int.Input(
            "overlap",
            default=128,
            min=32,
            max=1024,
            step=16,
            tooltip="What neighbouring tiles share, in pixels, at least.",
        ),
        io.Combo.Input(
            "guide",
            options=list(GUIDES),
            default=GUIDES[0],
            tooltip=(
                "First the whole picture is edited at about one megapixel. The tiles start "
                "from it, see it as a further reference, or there is none. Without it each "
                "tile may get an object of its own. A single tile needs none."
            ),
        ),
        io.Float.Input(
            "skip_threshold",
            default=3.0,
            min=0.0,
            max=255.0,
            step=0.5,
            tooltip=(
                "What the guide changes by less keeps its pixels exactly, tiles and places in "
                "tiles; of 255. 0 edits everything."
            ),
        ),
    ]


def how_tiles_are_corrected() -> list[io.Input]:
    """After each tile was edited, and the rest that few need."""
    return [
        io.Boolean.Input(
            "registration",
            default=True,
            tooltip="Move each edited tile back where the picture has it, by parts of a pixel.",
        ),
        io.Boolean.Input(
            "colour_match",
            default=True,
            tooltip=(
                "Take wide drifts of colour off each edited tile. Off for edits of colour alone."
            ),
        ),
        io.Combo.Input(
            "window",
            options=list(WINDOWS),
            default="hann",
            tooltip="How the weight of a tile falls towards its edges.",
            advanced=True,
        ),
        io.Combo.Input(
            "cache",
            options=list(CACHE_MODES),
            default=CACHE_MODES[0],
            tooltip=(
                "Where to keep what was encoded: memory ends with ComfyUI, "
                "off encodes every time and keeps nothing."
            ),
            advanced=True,
        ),
    ]


def further_pictures() -> list[io.Input]:
    """What need not be connected."""
    return [
        io.Mask.Input(
            "mask", optional=True, tooltip="Where the picture may change: white. Soft is fine."
        ),
        io.Image.Input("image2", optional=True, tooltip="Another reference, seen whole."),
        io.Image.Input("image3", optional=True, tooltip="Another reference, seen whole."),
    ]


@dataclass(frozen=True)
class Given:
    """The inputs of the node."""

    image: Tensor
    instruction: str
    negative: str
    model: ModelPatcher
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    mode: str
    tile_size: int
    overlap: int
    guide: str
    skip_threshold: float
    registration: bool
    colour_match: bool
    window: str
    cache: str
    clip: Any = None
    vae: Any = None
    mask: Tensor | None = None
    image2: Tensor | None = None
    image3: Tensor | None = None

    def settings(self) -> Settings:
        """Those of the tiles."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(Settings)})

    def require_masks(self) -> None:
        """Raises ValueError with a sentence."""
        if self.mask is None:
            return
        if self.mask.ndim != 3 or 0 in self.mask.shape:
            raise ValueError("The mask input carries no mask. Connect one, or nothing.")
        if len(self.mask) not in (1, len(self.image)):
            raise ValueError(
                f"{len(self.mask)} masks do not go with {len(self.image)} pictures. Connect one "
                "mask for all, or one for each."
            )


def require_picture(image: Tensor | None) -> None:
    """Raises ValueError with a sentence."""
    if image is None or image.ndim != 4 or 0 in image.shape:
        raise ValueError("image carries no picture. Connect an image, for example Load Image.")
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"image has {image.shape[-1]} channels; gray, RGB and RGBA pictures can be edited."
        )


def require_tiles(tile_size: int, overlap: int) -> None:
    """Raises ValueError with a sentence, before any model is loaded."""
    if tile_size % PIXEL_STEP:
        raise ValueError(
            f"tile_size is {tile_size} px, which is no multiple of {PIXEL_STEP}. Choose "
            f"{round(tile_size / PIXEL_STEP) * PIXEL_STEP} for example."
        )
    if overlap > tile_size - PIXEL_PATCH:
        raise ValueError(
            f"An overlap of {overlap} px leaves nothing of a tile of {tile_size} px. Choose an "
            "overlap that is smaller than tile_size, 128 px for example."
        )
