"""Tiled diffusion: a model patch by which any sampler samples a picture of any size in tiles.

MultiDiffusion (arXiv 2302.08113) with windows as in Mixture of Diffusers (arXiv 2302.02412): in
every step each tile is predicted on its own, and the predictions are blended.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, merge_nested_dicts
from comfy_api.latest import io
from torch import Tensor

from ..core.tiling import PIXEL_STEP, WINDOWS
from . import foreign, outcome
from .status import shown
from .tile_conditions import AUTO as AUTO
from .tile_conditions import CROP as CROP
from .tile_conditions import REFERENCES, Cond
from .tile_conditions import WHOLE as WHOLE
from .tile_control import is_diffsynth
from .tile_passes import Conds, Run, Tiling, ratio_of
from .tile_passes import grid_of as grid_of
from .transformer_options import PARTS

log = logging.getLogger("qwen_vram")

KEY = "qwen_vram.tiled_diffusion"
KINDS = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.CALC_COND_BATCH)
REMEMBERS = (
    "Tiled Diffusion: {} keeps what the model computed in one forward pass for the next one, which "
    "is another tile. Take that node out, or make tile_size larger than the picture."
)
WINDOWS_OF_FRAMES = (
    "Tiled Diffusion: context windows cut the frames of this model's videos, and tiles cannot lie "
    "in them. Take one of the two nodes out."
)
NO_PICTURE = (
    "Tiled Diffusion: a latent of the shape {} is no picture. Take the node out of the models for "
    "sound, meshes, and video with sound."
)
BOXES = "Tiled Diffusion: GLIGEN boxes lie on the whole picture. Use Conditioning (Set Area)."
FOREIGN = "Tiled Diffusion: patches of other nodes see tiles instead of the picture: %s"
WAITS = "samples in tiles when a sampler runs with it"


def require_tileable(model: ModelPatcher) -> None:
    """Raises ValueError for a model that a run in tiles would refuse, before anything is run."""
    inner = model.model_options["transformer_options"]
    wrappers = merge_nested_dicts(inner.get("wrappers", {}), model.wrappers)
    _require_no_memory({**inner, "wrappers": wrappers})


def _require_no_memory(inner: dict[str, Any]) -> None:
    """`inner`: transformer_options. Raises ValueError for what one tile would get of another."""
    if foreign.cached(inner):
        raise ValueError(REMEMBERS.format("EasyCache"))
    every = (patch for kind in inner.get("patches", {}).values() for patch in kind)
    if any(type(patch).__name__ == foreign.KV_CACHE for patch in every):
        raise ValueError(REMEMBERS.format("Flux KV Cache"))


def patch(model: ModelPatcher, tiling: Tiling) -> ModelPatcher:
    """A clone of the model that samples in tiles; an earlier tiling is replaced."""
    return TiledModel(tiling).patch(model)


def untiled(model: ModelPatcher) -> ModelPatcher:
    """The model itself, or a clone without the tiling that it has. See TiledModel.patch."""
    if not any(model.get_wrappers(kind, KEY) for kind in KINDS):
        return model
    clone = model.clone()
    for kind in KINDS:
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


class TiledModel:
    """The wrappers of one tiling; `node_id`: the node that tells of each run.

    It never refers to the clone that it patches: that would keep a freed model alive.
    """

    def __init__(self, tiling: Tiling, node_id: str | None = None) -> None:
        self.tiling, self.node_id = tiling, node_id
        self._run: Run | None = None
        self._named: set[str] = set()  # other nodes' patches that the log has named

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """See above."""
        clone = model.clone()
        wrappers = (self._sample, self._prepare, self._calculate)
        for kind, wrapper in zip(KINDS, wrappers, strict=True):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    # ------------------------------------------------------------------------ ComfyUI's wrappers
    def _sample(
        self, executor: WrapperExecutor, noise: Tensor, *arguments: Any, **more: Any
    ) -> Tensor:
        """OUTER_SAMPLE: one run of a sampler. What it kept for its tiles goes with it."""
        guider, before = executor.class_obj, self._run
        if noise.ndim < 4:
            raise ValueError(NO_PICTURE.format(tuple(noise.shape)))
        ratio = ratio_of(guider.model_patcher.model)
        self._run = run = Run(self.tiling, tuple(noise.shape[-2:]), ratio)
        try:
            if not run.trivial:
                self._check(guider.model_options, guider.conds)
                inner = guider.model_options["transformer_options"]
                inner[PARTS] = len(run.active)
                _put_first(inner["wrappers"])
            outcome.tell(run.line(guider.conds), self.node_id)
            output = executor(noise, *arguments, **more)
            if run.together > 1:
                outcome.tell(run.line(guider.conds), self.node_id)
            return output
        finally:
            self._run = before

    def _check(self, options: dict[str, Any], conds: Conds) -> None:
        """Raises ValueError for what cannot work with tiles; names in the log what may not."""
        inner = options["transformer_options"]
        patches = inner.get("patches", {})
        _require_no_memory(inner)
        if options.get("context_handler") is not None:
            raise ValueError(WINDOWS_OF_FRAMES)
        if any("gligen" in cond for side in conds.values() for cond in side):
            raise ValueError(BOXES)
        names = foreign.strangers(inner, foreign.AROUND_A_CALCULATION)
        for kind, found in patches.items():
            names += [_name(patch, kind) for patch in found if not is_diffsynth(patch)]
        for kind, found in inner.get("patches_replace", {}).items():
            names += [_name(patch, kind) for patch in found.values()]
        names += [foreign.FUNCTION] if foreign.FUNCTION in options else []
        if unknown := [name for name in dict.fromkeys(names) if name not in self._named]:
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
        tiles = run.shape(shape, run.count_to_load())
        inner, found, models = executor(model, tiles, own, *rest, **more)
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
        if run is None or run.sides != tuple(x.shape[-2:]):  # called beside a run of a sampler
            run = Run(self.tiling, tuple(x.shape[-2:]), ratio_of(model))
        if run.trivial:
            return executor(model, conds, x, timestep, options)
        return run.calculate(executor, model, conds, x, timestep, options)


def _name(patch: Any, kind: str) -> str:
    """The class or function of another node's patch, and where in the model it is."""
    return f"{getattr(patch, '__qualname__', type(patch).__qualname__)} ({kind})"


def _put_first(wrappers: dict[str, dict[str, list[Any]]]) -> None:
    """Our estimate around those of others: theirs, as that of Fit, is then one of a tile."""
    kind = WrappersMP.PREPARE_SAMPLING
    wrappers[kind] = {KEY: wrappers[kind][KEY], **wrappers[kind]}


# ---------------------------------------------------------------------------------- the node
class TiledDiffusion(io.ComfyNode):
    """Any sampler, any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMTiledDiffusion.md."""
        return io.Schema(
            node_id="QwenVRAMTiledDiffusion",
            display_name="Tiled Diffusion (Qwen VRAM)",
            category="Qwen VRAM/tiles",
            description=(
                "Lets any sampler sample a large picture in overlapping tiles, each with its part "
                "of the reference pictures. The tiles are blended in every step."
            ),
            search_aliases=["tiled sampling", "multidiffusion", "mixture of diffusers", "upscale"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed itself."),
                *cls.inputs_of_the_tiling(),
                *cls.inputs_of_the_references(),
                io.Int.Input(
                    "tile_batch",
                    default=0,
                    min=0,
                    max=16,
                    tooltip=(
                        "Tiles in one forward pass at most. Several are faster, most of all where "
                        "weights are streamed from RAM, and take more memory. 0: up to 3, as the "
                        "memory allows, and one with a vram_limit."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def inputs_of_the_tiling(cls) -> list[io.Input]:
        """How the picture is cut."""
        return [
            io.Int.Input(
                "tile_size",
                default=1024,
                min=256,
                max=4096,
                step=PIXEL_STEP,
                tooltip=(
                    "The sides of a tile in pixels. The model was made for about 1024. A picture "
                    "that is no larger is sampled whole."
                ),
            ),
            io.Int.Input(
                "overlap",
                default=128,
                min=0,
                max=2048,
                step=16,
                tooltip="How many pixels neighbouring tiles share at least. More hides more.",
            ),
            io.Combo.Input(
                "window",
                options=list(WINDOWS),
                tooltip="How the weight of a tile falls off towards its edges.",
                advanced=True,
            ),
        ]

    @classmethod
    def inputs_of_the_references(cls) -> list[io.Input]:
        """What a tile sees of the reference pictures."""
        return [
            io.Combo.Input(
                "reference_1",
                options=list(REFERENCES),
                default=AUTO,
                tooltip=(
                    "The first reference picture. crop along: each tile sees its part of it. keep "
                    "whole: each tile sees all of it, as for a style. auto: crop along if it has "
                    "the shape of the picture."
                ),
            ),
            io.Combo.Input(
                "reference_2",
                options=list(REFERENCES),
                default=WHOLE,
                tooltip=(
                    "The second reference picture, as the first. It is often a style or a person, "
                    "which every tile shall see whole."
                ),
            ),
            io.Combo.Input(
                "other_references",
                options=list(REFERENCES),
                default=WHOLE,
                tooltip="All further reference pictures.",
            ),
        ]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        tile_size: int,
        overlap: int,
        window: str,
        reference_1: str,
        reference_2: str,
        other_references: str,
        tile_batch: int,
    ) -> io.NodeOutput:
        """Patch a clone."""
        references = (reference_1, reference_2, other_references)
        tiling = Tiling(tile_size, overlap, window, references, tile_batch)
        tiled = TiledModel(tiling, outcome.running_node())
        return shown(tiled.patch(model), text=WAITS)


NODES = [TiledDiffusion]
