"""The tiles of one run of a sampler: what each step computes, and what the load reckons with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ..core.tiling import (
    PATCH,
    PIXEL_PATCH,
    PIXEL_STEP,
    Tile,
    TileBlender,
    TileGrid,
    crop,
)
from . import foreign
from .tile_conditions import (
    AUTO,
    REFERENCE_LATENTS,
    Cond,
    Sides,
    batched,
    can_batch,
    choice_of,
    crop_cond,
    crop_references,
    is_cropped,
    with_weights,
)
from .tile_control import Hints
from .transformer_options import with_part
from .vram_limit import LIMIT

LATENT = 8  # pixels of the picture along one latent pixel of Qwen-Image
AT_MOST = 3  # tiles in one forward pass, where the user leaves it open
SPARE = 1.5  # of the memory that ComfyUI reckons with, as in its own choice of batches
Conds = dict[str, list[Cond]]
SIZE = "tile_size must be a multiple of {} pixels, not {}."
OVERLAP = (
    "overlap: tiles of {0} pixels can share 0 to {1} pixels, not {2}. Make it smaller, or "
    "tile_size larger."
)
KNOWN_SHAPE = "known is a latent of {}, but the picture's is {}."


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut while it is sampled. Sizes in pixels of the picture.

    Raises ValueError with a sentence.
    """

    tile: int
    overlap: int
    window: str = "hann"
    references: tuple[str, ...] = (AUTO,)  # for each; the last one holds for all further ones
    batch: int = 0  # tiles in one forward pass at most; 0: see `Run._size`
    active: frozenset[int] | None = None  # tiles to sample, by `TileGrid.tiles()`; None: all
    known: Tensor | None = None  # latent of the picture that the other tiles keep
    told: Callable[[int, int], None] | None = None  # called with (tiles done, tiles) in each step

    def __post_init__(self) -> None:
        if self.tile < PIXEL_STEP or self.tile % PIXEL_STEP:
            raise ValueError(SIZE.format(PIXEL_STEP, self.tile))
        if not 0 <= self.overlap <= self.tile - PIXEL_PATCH:
            raise ValueError(OVERLAP.format(self.tile, self.tile - PIXEL_PATCH, self.overlap))
        if self.active is not None and self.known is None:
            raise ValueError("Tiles that are not active need a known latent.")


def grid_of(tiling: Tiling, height: int, width: int, ratio: int = LATENT) -> TileGrid:
    """Of a latent with these sides, in latent pixels; `ratio`: pixels along one of them.

    Tiles begin every 16 pixels, of models with larger latent pixels every two of these. The tile
    comes as near to the size that was asked for as such steps allow.
    """
    patch = max(PATCH, PIXEL_PATCH // ratio)
    step = max(PATCH, PIXEL_STEP // ratio)
    tile = max(1, round(tiling.tile / ratio / step)) * step
    overlap = ceil(tiling.overlap / ratio / patch) * patch
    return TileGrid.cover(height, width, tile, min(overlap, tile - patch), step, patch)


def ratio_of(model: BaseModel) -> int:
    """Pixels along one latent pixel of what this model samples."""
    return model.latent_format.spacial_downscale_ratio


@dataclass
class Run:
    """One run of a sampler on a latent with these sides; `ratio` as of `grid_of`."""

    tiling: Tiling
    sides: Sides
    ratio: int = LATENT
    hints: Hints = field(default_factory=Hints)
    together: int = 1  # tiles in a forward pass
    _known: Tensor | None = None  # as the model has it

    def __post_init__(self) -> None:
        self.grid = grid_of(self.tiling, *self.sides, self.ratio)
        chosen = self.tiling.active
        self.active = [i for i in range(len(self.grid)) if chosen is None or i in chosen]

    @property
    def trivial(self) -> bool:
        """Whether the one tile is the picture."""
        return len(self.grid) == 1 == len(self.active)

    # ------------------------------------------------------------------------------ one step
    def calculate(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[Cond] | None],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """For each side of CFG the prediction for the whole picture, like `x`."""
        make = dict(window=self.tiling.window, device=x.device, base=self._base(model, x))
        blenders = [TileBlender(self.grid, x.shape, **make) if side else None for side in conds]
        weighted = [side and [with_weights(cond, x) for cond in side] for side in conds]
        self.together = self._size(model, weighted, x, options)
        for first in range(0, len(self.active), self.together):
            comfy.model_management.throw_exception_if_processing_interrupted()
            group = self.active[first : first + self.together]
            outputs = self._group(executor, model, weighted, x, timestep, options, group)
            for blender, output in zip(blenders, outputs, strict=True):
                for index, part in zip(group, output.chunk(len(group)), strict=True):
                    if blender is not None:
                        blender.add(index, part)
            if self.tiling.told is not None:
                self.tiling.told(first + len(group), len(self.active))
        # Nothing is predicted where there is no prompt, as ComfyUI has it.
        return [torch.zeros_like(x) if b is None else b.result().to(x.dtype) for b in blenders]

    def _group(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[Cond] | None],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
        group: Sequence[int],
    ) -> list[Tensor]:
        """What the model predicts for some tiles, one after the other along the batch."""
        tiles = [self.grid.tiles()[index] for index in group]
        parts = torch.cat([crop(x, tile) for tile in tiles])
        times = torch.cat([timestep] * len(tiles))
        own = [side and self._conds(side, tiles, x.shape[0]) for side in conds]
        with self.hints.options(options, self.sides, tiles[0], x.device) as seen:
            inner = with_part(seen.get("transformer_options", {}), "tiles", *group)
            seen = {**seen, "transformer_options": inner}
            return executor(model, own, parts, times, seen)

    def _conds(self, side: list[Cond], tiles: Sequence[Tile], batch: int) -> list[Cond]:
        """A side of CFG for these tiles."""
        choices = self.tiling.references
        cropped = [
            [crop_cond(cond, self.sides, tile, choices, self.hints.of) for tile in tiles]
            for cond in side
        ]
        if len(tiles) == 1:
            return [only for (only,) in cropped if only is not None]
        return [batched(each, batch) for each in cropped]

    def _base(self, model: BaseModel, x: Tensor) -> Tensor | None:
        """What tiles that are not active predict. Raises ValueError: another shape."""
        if self.tiling.active is None:
            return None
        if self._known is None:
            known = self.tiling.known
            known = known.unsqueeze(2) if known.ndim == 4 and x.ndim == 5 else known
            if known.shape[1:] != x.shape[1:] or x.shape[0] % known.shape[0]:
                raise ValueError(KNOWN_SHAPE.format(tuple(known.shape), tuple(x.shape)))
            known = model.process_latent_in(known).to(x.device, torch.float32)
            self._known = known.repeat(x.shape[0] // known.shape[0], *[1] * (x.ndim - 1))
        return self._known

    # ------------------------------------------------------------------------------ batches
    def _size(
        self, model: BaseModel, conds: list[list[Cond] | None], x: Tensor, options: dict[str, Any]
    ) -> int:
        """How many tiles share a forward pass: those that fit, spread evenly over the passes.

        Weights are then cast, or streamed from RAM, once for several tiles. Beyond three there is
        hardly any gain, but more memory taken. What a limit of ours leaves is not what is free: of
        itself nothing takes more than one tile then.
        """
        count = len(self.active)
        limited = options.get("transformer_options", {}).get(LIMIT, 0) > 0
        most = min(count, self.tiling.batch or (1 if limited else AT_MOST))
        if most < 2 or not _may_share(model, conds, options):
            return 1
        free = model.current_patcher.get_free_memory(x.device)
        most = min(most, int(free // (self._need(model, conds, x) * SPARE)))
        return ceil(count / ceil(count / max(1, most)))

    def _need(self, model: BaseModel, conds: list[list[Cond] | None], x: Tensor) -> float:
        """Bytes that ComfyUI reckons with for one side of CFG of a tile."""
        tile, most = self.grid.tiles()[0], [1, 1, 0]
        for cond in (cond for side in conds for cond in side or ()):
            if (value := cond["model_conds"].get(REFERENCE_LATENTS)) is not None:
                parts = crop_references(value.cond, self.tiling.references, self.sides, tile)
                # However many there are, each latent has one of each.
                size = type(value)([part[:1] for part in parts]).size()
                most = max(most, [x.shape[0], *size[1:]], key=lambda shape: shape[-1])
        return model.memory_required(self.shape(x.shape), cond_shapes={REFERENCE_LATENTS: [most]})

    def shape(self, whole: Sequence[int], count: int = 1) -> list[int]:
        """Of so many tiles of a latent with this shape."""
        batch, *middle = whole[:-2]
        return [batch * count, *middle, self.grid.tile_height, self.grid.tile_width]

    # ------------------------------------------------------------------------------ the load
    def for_the_load(self, conds: Conds) -> tuple[Conds, dict[int, Any]]:
        """Conds with the references of a tile, and the whole ones by the id of those."""
        whole: dict[int, Any] = {}
        count, tile = self.count_to_load(), self.grid.tiles()[0]

        def own(cond: Cond) -> Cond:
            latents = cond.get("reference_latents")
            if not latents:
                return cond
            parts = crop_references(latents, self.tiling.references, self.sides, tile)
            parts = [part[:1].expand(count, *part.shape[1:]) for part in parts]
            whole[id(parts)] = latents
            return {**cond, "reference_latents": parts}

        return {name: [own(cond) for cond in side] for name, side in conds.items()}, whole

    def count_to_load(self) -> int:
        """For how many tiles in a forward pass there shall be memory beside the weights."""
        return max(1, min(self.tiling.batch, len(self.active)))

    def line(self, conds: Conds) -> str:
        """For the node: tiles and references."""
        count = len(self.grid)
        width, height = self.grid.tile_width * self.ratio, self.grid.tile_height * self.ratio
        parts = [f"tiles: {count}, each {width} x {height} pixels"]
        every = [cond.get("reference_latents") or [] for side in conds.values() for cond in side]
        latents = max(every, key=len, default=[])
        if latents:
            choices = self.tiling.references
            cropped = sum(
                is_cropped(latent, choice_of(choices, index), self.sides)
                for index, latent in enumerate(latents)
            )
            parts.append(f"references cropped: {cropped}, whole: {len(latents) - cropped}")
        if self.together > 1:
            parts.append(f"in one forward pass: {self.together}")
        return " · ".join(parts)


def _may_share(model: BaseModel, conds: list[list[Cond] | None], options: dict[str, Any]) -> bool:
    """Whether several tiles may go through the model at once, each for itself."""
    own = type(model.diffusion_model) is QwenImageTransformer2DModel
    alone = "multigpu_clones" in options or foreign.FUNCTION in options
    inner = options.get("transformer_options", {})
    return own and not alone and can_batch(conds) and not foreign.sees_the_batch(inner)
