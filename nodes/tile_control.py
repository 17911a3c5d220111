"""What ControlNets show a tile: its part of their hints, encoded once for a run."""

from __future__ import annotations

import copy
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..core.tiling import Tile, crop
from .tile_conditions import Sides

# ComfyUI loads its extra nodes under names made of their paths: this class cannot be imported.
DIFFSYNTH = "DiffSynthCnetPatch"


class Hints:
    """Copies of the ControlNets of one run for each tile. Originals stay as they are."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Any] = {}
        self._whole: dict[tuple[Any, ...], Tensor] = {}
        self._kept: dict[int, Any] = {}  # so that no id is given again

    def of(self, control: Any, whole: Sides, part: Tile) -> Any:
        """A ControlNet, and those chained before it, for a part of what the hint lies on.

        `whole`: sides of that in latent pixels: the picture, or the area of a regional prompt.
        """
        key = (id(control), whole, part)
        if key not in self._copies:
            self._kept[id(control)] = control
            self._copies[key] = self._copy(control, whole, part)
        return self._copies[key]

    def _copy(self, control: Any, whole: Sides, part: Tile) -> Any:
        own = copy.copy(control)
        own.cond_hint = own.extra_concat = None
        if hasattr(own, "control_input"):  # T2IAdapter keeps the result of its hint
            own.control_input = None
        if control.previous_controlnet is not None:
            own.previous_controlnet = self.of(control.previous_controlnet, whole, part)
        own.multigpu_clones = {
            device: self.of(clone, whole, part) for device, clone in control.multigpu_clones.items()
        }
        ratio = control.compression_ratio
        own.extra_concat_orig = [
            mask if mask.shape[-2:] == (1, 1) else self._crop(control, mask, whole, part, ratio)
            for mask in control.extra_concat_orig
        ]
        if control.vae is not None:
            ratio *= control.vae.spacial_compression_encode()
        if control.cond_hint_original is not None:
            own.cond_hint_original = self._crop(
                control, control.cond_hint_original, whole, part, ratio
            )
        return own

    def _crop(self, control: Any, hint: Tensor, whole: Sides, part: Tile, ratio: int) -> Tensor:
        """Scaled to the whole as ComfyUI does it, and then cut."""
        return self.scaled(
            hint, Tile(0, 0, *whole), part, ratio, control.upscale_algorithm, "center"
        )

    def scaled(
        self, hint: Tensor, whole: Tile, part: Tile, ratio: int, method: str, cut: str
    ) -> Tensor:
        """The part of a hint (..., h, w) that is scaled to the whole, times `ratio`."""
        height, width = (side * ratio for side in whole[2:])
        key = (id(hint), height, width)
        if hint.shape[-2:] != (height, width):
            if key not in self._whole:
                self._kept[id(hint)] = hint
                self._whole[key] = comfy.utils.common_upscale(hint, width, height, method, cut)
            hint = self._whole[key]
        return crop(hint, Tile(*(side * ratio for side in part)))

    # -------------------------------------------------------------------------- model patches
    def options(self, options: dict[str, Any], whole: Sides, part: Tile) -> dict[str, Any]:
        """The model's options, with what ComfyUI's DiffSynth ControlNets see made the tile's."""
        inner = options.get("transformer_options", {})
        patches = inner.get("patches", {})
        if not any(map(is_diffsynth, patches.get("double_block", ()))):
            return options
        own = [
            self._patch(patch, whole, part) if is_diffsynth(patch) else patch
            for patch in patches["double_block"]
        ]
        patches = {**patches, "double_block": own}
        return {**options, "transformer_options": {**inner, "patches": patches}}

    def _patch(self, patch: Any, whole: Sides, part: Tile) -> Any:
        key = (id(patch), whole, part)
        if key not in self._copies:
            self._kept[id(patch)] = patch
            own = self._copies[key] = copy.copy(patch)
            own.encoded_image = own.encoded_image_size = None  # it encodes what it lacks
            ratio, everything = patch.vae.spacial_compression_encode(), Tile(0, 0, *whole)
            picture = patch.image.movedim(-1, 1)
            picture = self._scaled_picture(patch, picture, everything, part, ratio)
            own.image = picture.movedim(1, -1)
            if patch.mask is not None:
                mask = self._mean(patch)
                own.mask = self.scaled(mask, everything, part, 1, "bilinear", "none")
        return self._copies[key]

    def _scaled_picture(
        self, patch: Any, picture: Tensor, whole: Tile, part: Tile, ratio: int
    ) -> Tensor:
        key = ("picture", id(patch))
        picture = self._whole.setdefault(key, picture)  # one object, so that it is scaled once
        return self.scaled(picture, whole, part, ratio, "area", "center")

    def _mean(self, patch: Any) -> Tensor:
        key = ("mask", id(patch))
        if key not in self._whole:
            self._whole[key] = patch.mask.mean(dim=1, keepdim=True)
        return self._whole[key]

    def to(self, device: torch.device | str) -> None:
        """Move what DiffSynth ControlNets have encoded: as wide as the model, for every tile."""
        for own in self._copies.values():
            if is_diffsynth(own) and own.encoded_image is not None:
                own.encoded_image = own.encoded_image.to(device)


def is_diffsynth(patch: Any) -> bool:
    """Whether it is ComfyUI's own patch for Qwen-Image's DiffSynth ControlNets."""
    return type(patch).__name__ == DIFFSYNTH
