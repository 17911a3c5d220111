"""Tiled diffusion: a model patch by which any sampler samples a picture of any size in tiles."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .tile_conditions import AUTO as AUTO
from .tile_conditions import CROP as CROP
from .tile_conditions import REFERENCES as REFERENCES
from .tile_conditions import WHOLE as WHOLE
from .tile_passes import TiledModel, Tiling
from .tile_passes import grid_of as grid_of


def patch(model: ModelPatcher, tiling: Tiling) -> ModelPatcher:
    """A clone of the model that samples in tiles."""
    return TiledModel(tiling).patch(model)


NODES: list[type[io.ComfyNode]] = []
