"""What ControlNets show a tile: its part of their hints, encoded once for a run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..core.tiling import Tile, crop
from .tile_conditions import Sides

# ComfyUI loads its extra nodes under names made of their paths: this class cannot be imported.
DIFFSYNTH = "DiffSynthCnetPatch"


class Hints:
    """Copies for each tile of the ControlNets of one run. The originals stay as they are."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Any] = {}
        self._scaled: dict[tuple[int, ...], Tensor] = {}
        self._kept: dict[int, Any] = {}  # whose ids are in keys: none may be given again

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
        if hasattr(own, "control_input"):  # T2IAdapter keeps what it makes of the hint
            own.control_input = None
        if control.previous_controlnet is not None:
            own.previous_controlnet = self.of(control.previous_controlnet, whole, part)
        own.multigpu_clones = {
            device: self.of(clone, whole, part) for device, clone in control.multigpu_clones.items()
        }
        ratio, scaling = control.compression_ratio, (control.upscale_algorithm, "center")
        own.extra_concat_orig = [
            mask if mask.shape[-2:] == (1, 1) else self._crop(mask, whole, part, ratio, *scaling)
            for mask in control.extra_concat_orig
        ]
        if control.vae is not None:
            ratio *= control.vae.spacial_compression_encode()
        if control.cond_hint_original is not None:
            hint = control.cond_hint_original
            own.cond_hint_original = self._crop(hint, whole, part, ratio, *scaling)
        return own

    def _crop(
        self, hint: Tensor, whole: Sides, part: Tile, ratio: int, method: str, cut: str
    ) -> Tensor:
        """The part of a hint (..., h, w), scaled to the whole as ComfyUI does it.

        `ratio`: pixels of the hint along one latent pixel.
        """
        height, width = (side * ratio for side in whole)
        if tuple(hint.shape[-2:]) != (height, width):
            key = (id(hint), height, width)
            if key not in self._scaled:
                self._kept[id(hint)] = hint
                self._scaled[key] = comfy.utils.common_upscale(hint, width, height, method, cut)
            hint = self._scaled[key]
        return crop(hint, Tile(*(side * ratio for side in part)))

    # -------------------------------------------------------------------------- model patches
    @contextmanager
    def options(
        self, options: dict[str, Any], whole: Sides, part: Tile, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """The model's options, with ComfyUI's DiffSynth ControlNets made those of the tile.

        What they encode is as wide as the model: on the GPU it is the current tile's alone.
        """
        inner = options.get("transformer_options", {})
        patches = inner.get("patches", {})
        blocks = patches.get("double_block", ())
        if not any(map(is_diffsynth, blocks)):
            yield options
            return
        blocks = [self._patch(b, whole, part) if is_diffsynth(b) else b for b in blocks]
        own = list(filter(is_diffsynth, blocks))
        _move(own, device)
        patches = {**patches, "double_block": blocks}
        yield {**options, "transformer_options": {**inner, "patches": patches}}
        _move(own, "cpu")

    def _patch(self, patch: Any, whole: Sides, part: Tile) -> Any:
        """A copy that has yet to encode its part of the picture."""
        key = (id(patch), whole, part)
        if key not in self._copies:
            own = copy.copy(patch)
            own.encoded_image = own.encoded_image_size = None
            picture, mask = self._views(patch)
            ratio = patch.vae.spacial_compression_encode()
            picture = self._crop(picture, whole, part, ratio, "area", "center")
            own.image = picture.movedim(1, -1)
            if mask is not None:
                own.mask = self._crop(mask, whole, part, 1, "bilinear", "none")
            self._copies[key] = own
        return self._copies[key]

    def _views(self, patch: Any) -> tuple[Tensor, Tensor | None]:
        """Its picture (B, C, H, W) and its mask (B, 1, ..., H, W): the same objects each time."""
        if id(patch) not in self._kept:
            mask = None if patch.mask is None else patch.mask.mean(dim=1, keepdim=True)
            self._kept[id(patch)] = (patch, patch.image.movedim(-1, 1), mask)
        return self._kept[id(patch)][1:]


def _move(patches: list[Any], device: torch.device | str) -> None:
    """What they have encoded so far."""
    for patch in patches:
        if patch.encoded_image is not None:
            patch.encoded_image = patch.encoded_image.to(device)


def is_diffsynth(patch: Any) -> bool:
    """Whether it is ComfyUI's own patch for Qwen-Image's DiffSynth ControlNets."""
    return type(patch).__name__ == DIFFSYNTH
