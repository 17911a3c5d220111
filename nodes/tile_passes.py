"""The tiles of one run of a sampler, inside of ComfyUI's wrappers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..core.tiling import PATCH, STEP, Tile, TileBlender, TileGrid, crop
from . import foreign, outcome
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
from .tile_control import Hints, is_diffsynth

log = logging.getLogger("qwen_vram")

KEY = "qwen_vram.tiled_diffusion"
LATENT = 8  # pixels of the picture along one latent pixel
AT_MOST = 4  # tiles in one forward pass, where the user leaves it open
SPARE = 1.5  # of the memory that ComfyUI reckons with, as in its own choice of batches
Conds = dict[str, list[Cond]]
KV_CACHE = "KV_Attn_Input"  # the class of ComfyUI's Flux KV Cache, which nobody can import
REMEMBERS = (
    "Tiled Diffusion: {} keeps what the model computed in one forward pass for the next one, and "
    "the next one is another tile. Take that node out, or make tile_size larger than the picture."
)
WINDOWS_OF_FRAMES = (
    "Tiled Diffusion: a node that samples frames in windows (context windows) is in this model, "
    "and tiles cannot lie inside of those. Take one of the two out."
)
NO_PICTURE = (
    "Tiled Diffusion: this latent is no picture (its shape is {}). Take the node out for sound, "
    "meshes and video with sound."
)
BOXES = "Tiled Diffusion: GLIGEN boxes lie on the whole picture. Use Conditioning (Set Area)."
FOREIGN = "Tiled Diffusion: patches of other nodes see tiles instead of the picture: %s"
KNOWN_SHAPE = "known is a latent of {}, but the picture's is {}."


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut while it is sampled. Sizes in pixels of the picture."""

    tile: int
    overlap: int
    window: str = "hann"
    references: tuple[str, ...] = (AUTO,)  # for each; the last one holds for all further ones
    batch: int = 0  # tiles in one forward pass at most; 0: see `Run._size`
    active: frozenset[int] | None = None  # tiles to sample, by `TileGrid.tiles()`; None: all
    known: Tensor | None = None  # latent of the picture that the other tiles keep
    told: Callable[[int, int], None] | None = None  # called with (tiles done, tiles) in each step

    def __post_init__(self) -> None:
        """Raises ValueError with a sentence."""
        TileGrid.cover(STEP, STEP, self.tile // LATENT, self.latent_overlap)
        if self.active is not None and self.known is None:
            raise ValueError("Tiles that are not active need a known latent.")

    @property
    def latent_overlap(self) -> int:
        """In latent pixels, whole patches."""
        return ceil(self.overlap / LATENT / PATCH) * PATCH


def grid_of(tiling: Tiling, height: int, width: int) -> TileGrid:
    """Of a latent with these sides, in latent pixels."""
    tile = tiling.tile // LATENT
    return TileGrid.cover(height, width, tile, tiling.latent_overlap, STEP, PATCH)


@dataclass
class Run:
    """One run of a sampler on a latent with these sides."""

    tiling: Tiling
    sides: Sides
    hints: Hints = field(default_factory=Hints)
    known: Tensor | None = None  # as the model has it

    def __post_init__(self) -> None:
        self.grid = grid_of(self.tiling, *self.sides)
        every = range(len(self.grid))
        active = self.tiling.active
        self.active = [index for index in every if active is None or index in active]

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
        """Per side of CFG the prediction for the whole picture, like `x`."""
        base = self._base(model, x)
        make = dict(window=self.tiling.window, device=x.device, base=base)
        blenders = [cond and TileBlender(self.grid, x.shape, **make) for cond in conds]
        weighted = [side and [with_weights(cond, x) for cond in side] for side in conds]
        size = self._size(model, weighted, x, options)
        for first in range(0, len(self.active), size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            group = self.active[first : first + size]
            outputs = self._group(executor, model, weighted, x, timestep, options, group)
            for blender, output in zip(blenders, outputs, strict=True):
                if blender:
                    for index, part in zip(group, output.chunk(len(group)), strict=True):
                        blender.add(index, part)
            if self.tiling.told is not None:
                self.tiling.told(first + len(group), len(self.active))
        return [b.result().to(x.dtype) if b else torch.zeros_like(x) for b in blenders]

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
        options = self.hints.options(options, self.sides, tiles[0])
        self.hints.to(x.device)
        outputs = executor(model, own, parts, times, options)
        self.hints.to("cpu")
        return outputs

    def _conds(self, side: list[Cond], tiles: Sequence[Tile], batch: int) -> list[Cond]:
        """A side of CFG for these tiles."""
        choices = self.tiling.references
        cropped = [
            [crop_cond(cond, self.sides, tile, choices, self.hints.of) for tile in tiles]
            for cond in side
        ]
        if len(tiles) == 1:
            return [each[0] for each in cropped if each[0] is not None]
        return [batched(each, batch) for each in cropped]

    def _base(self, model: BaseModel, x: Tensor) -> Tensor | None:
        """What tiles that are not active predict."""
        if self.tiling.active is None:
            return None
        if self.known is None:
            known = self.tiling.known
            known = known.unsqueeze(2) if known.ndim == 4 and x.ndim == 5 else known
            if known.shape[1:] != x.shape[1:] or x.shape[0] % known.shape[0]:
                raise ValueError(KNOWN_SHAPE.format(tuple(known.shape), tuple(x.shape)))
            known = model.process_latent_in(known).to(x.device, torch.float32)
            self.known = known.repeat(x.shape[0] // known.shape[0], *[1] * (x.ndim - 1))
        return self.known

    # ------------------------------------------------------------------------------ batches
    def _size(
        self, model: BaseModel, conds: list[list[Cond] | None], x: Tensor, options: dict[str, Any]
    ) -> int:
        """How many tiles share a forward pass: those that fit, spread evenly over the passes.

        Weights that are streamed from RAM are then read once for several tiles. Where they lie in
        the GPU's memory, and the user leaves it open, more than one tile only takes more memory.
        """
        patcher, count = model.current_patcher, len(self.active)
        resident = patcher.loaded_size() >= patcher.model_size()
        most = min(count, self.tiling.batch or (1 if resident else AT_MOST))
        if not _may_share(model, conds, options):
            most = 1
        free = patcher.get_free_memory(x.device) if most > 1 else 0
        while most > 1 and self._need(model, conds, x, most) * SPARE >= free:
            most -= 1
        most = max(1, most)
        return ceil(count / ceil(count / most)) if count else 1

    def _need(
        self, model: BaseModel, conds: list[list[Cond] | None], x: Tensor, count: int
    ) -> float:
        """Bytes that ComfyUI reckons with for one side of so many tiles."""
        tile = self.grid.tiles()[0]
        shapes: dict[str, list[list[int]]] = {}
        for side in conds:
            for cond in side or ():
                if (value := cond["model_conds"].get(REFERENCE_LATENTS)) is not None:
                    parts = crop_references(value.cond, self.tiling.references, self.sides, tile)
                    numbers = sum(part[0].numel() for part in parts)
                    channels = parts[0].shape[1] if parts else 1
                    each = [count * x.shape[0], channels, numbers // channels]
                    shapes[REFERENCE_LATENTS] = max([each], shapes.get(REFERENCE_LATENTS, [each]))
        return model.memory_required(self.shape(x.shape, count), cond_shapes=shapes)

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
        size = f"{self.grid.tile_width * LATENT} x {self.grid.tile_height * LATENT}"
        count = len(self.grid)
        parts = [f"{count} tile{'s' * (count > 1)} of {size} pixels"]
        side = max(conds.values(), key=lambda s: max(map(_count, s), default=0), default=[])
        latents = max((cond.get("reference_latents") or [] for cond in side), key=len, default=[])
        if latents:
            cropped = sum(
                is_cropped(latent, choice_of(self.tiling.references, index), self.sides)
                for index, latent in enumerate(latents)
            )
            parts.append(f"references cropped: {cropped}, whole: {len(latents) - cropped}")
        return " · ".join(parts)


def _count(cond: Cond) -> int:
    return len(cond.get("reference_latents") or ())


def _may_share(model: BaseModel, conds: list[list[Cond] | None], options: dict[str, Any]) -> bool:
    """Whether several tiles may go through the model at once, each for itself."""
    own = type(model.diffusion_model) is QwenImageTransformer2DModel
    alone = "multigpu_clones" in options or foreign.FUNCTION in options
    inner = options.get("transformer_options", {})
    return own and not alone and can_batch(conds) and not foreign.sees_the_batch(inner)


# ------------------------------------------------------------------------------ the patch
class TiledModel:
    """The wrappers of one tiling; `node_id`: the node that tells of each run.

    It never refers to the clone that it patches: that would keep a freed model alive.
    """

    def __init__(self, tiling: Tiling, node_id: str | None = None) -> None:
        self.tiling, self.node_id = tiling, node_id
        self._run: Run | None = None
        self._named: set[str] = set()  # other nodes' patches that the log has named

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone; an earlier tiling is replaced."""
        clone = model.clone()
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self._sample,
            WrappersMP.PREPARE_SAMPLING: self._prepare,
            WrappersMP.CALC_COND_BATCH: self._calculate,
        }
        for kind, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def _sample(
        self, executor: WrapperExecutor, noise: Tensor, *arguments: Any, **more: Any
    ) -> Tensor:
        """OUTER_SAMPLE: one run of a sampler."""
        guider, before = executor.class_obj, self._run
        if noise.ndim < 4:
            raise ValueError(NO_PICTURE.format(tuple(noise.shape)))
        run = Run(self.tiling, tuple(noise.shape[-2:]))
        if not run.trivial:
            self._check(guider.model_options, guider.conds)
            _put_first(guider.model_options["transformer_options"]["wrappers"])
        outcome.tell(run.line(guider.conds), self.node_id)
        self._run = run
        try:
            return executor(noise, *arguments, **more)
        finally:
            self._run = before

    def _check(self, options: dict[str, Any], conds: Conds) -> None:
        """Raises ValueError for what cannot work with tiles; names in the log what may not."""
        inner = options["transformer_options"]
        if foreign.cached(inner):
            raise ValueError(REMEMBERS.format("EasyCache"))
        patches = inner.get("patches", {})
        every = [patch for kind in patches.values() for patch in kind]
        if any(type(patch).__name__ == KV_CACHE for patch in every):
            raise ValueError(REMEMBERS.format("Flux KV Cache"))
        if options.get("context_handler") is not None:
            raise ValueError(WINDOWS_OF_FRAMES)
        if any("gligen" in cond for side in conds.values() for cond in side):
            raise ValueError(BOXES)
        names = foreign.strangers(inner, foreign.AROUND_A_CALCULATION)
        names += [kind for kind, found in patches.items() if not all(map(is_diffsynth, found))]
        names += [kind for kind, found in inner.get("patches_replace", {}).items() if found]
        names += [foreign.FUNCTION] if foreign.FUNCTION in options else []
        if unknown := [name for name in names if name not in self._named]:
            self._named.update(unknown)
            log.info(FOREIGN, ", ".join(unknown))

    def _prepare(
        self,
        executor: WrapperExecutor,
        model: ModelPatcher,
        shape: Sequence[int],
        conds: Conds,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """PREPARE_SAMPLING: memory is made for tiles, not for the picture."""
        run = self._run
        if run is None or run.trivial or tuple(shape[-2:]) != run.sides:
            return executor(model, shape, conds, *rest, **more)
        own, whole = run.for_the_load(conds)
        tile = run.shape(shape, run.count_to_load())
        inner, found, models = executor(model, tile, own, *rest, **more)
        for cond in (cond for side in found.values() for cond in side):
            latents = cond.get("reference_latents")
            if id(latents) in whole:
                cond["reference_latents"] = whole[id(latents)]
        return inner, found, models

    def _calculate(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[Cond] | None],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """CALC_COND_BATCH: the predictions of one step."""
        run = self._run
        if run is None or run.sides != tuple(x.shape[-2:]):  # somebody samples in his own way
            run = Run(self.tiling, tuple(x.shape[-2:]))
        if run.trivial:
            return executor(model, conds, x, timestep, options)
        return run.calculate(executor, model, conds, x, timestep, options)


def _put_first(wrappers: dict[str, dict[str, list[Any]]]) -> None:
    """Our estimate around those of others, as Fit's, which is then that of a tile."""
    kind = WrappersMP.PREPARE_SAMPLING
    wrappers[kind] = {KEY: wrappers[kind][KEY], **wrappers[kind]}
