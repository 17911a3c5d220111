"""Runs one forward pass as several smaller ones, inside the APPLY_MODEL wrapper.

Items of the batch apart are exact up to what the kernels round otherwise for fewer rows (on a CPU
2e-6 of values around 5 in float32, one step of bfloat16). Smaller references and tiled diffusion
change the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.budget import Plan
from ..core.tiling import PATCH, Tile, TileBlender, TileGrid, crop
from . import foreign
from .slicing import COMPILED, compiled, sliced
from .transformer_options import with_part

OVERLAP = 16  # latent pixels that neighbouring tiles share at least: 128 px
WHOLE_PATCHES = "Another node's patch looks at the whole picture ({}): no tiles."
WHOLE_HINTS = "The hints of the ControlNet do not lie on the picture's grid: no tiles."
NO_PICTURE = "The latent is no single picture: no tiles."


@dataclass(frozen=True)
class Call:
    """The arguments of one APPLY_MODEL call; `x` is (batch, channels, [frames,] height, width)."""

    x: Tensor
    t: Tensor
    c_concat: Tensor | None
    c_crossattn: Tensor | None
    control: dict[str, Any] | None
    transformer_options: dict[str, Any]
    extra: dict[str, Any]

    def run(self, executor: WrapperExecutor) -> Tensor:
        """What the model predicts, like `x`."""
        return executor(
            self.x,
            self.t,
            self.c_concat,
            self.c_crossattn,
            self.control,
            self.transformer_options,
            **self.extra,
        )


def forward(
    executor: WrapperExecutor,
    plan: Plan,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """One forward pass by `plan`: one plain call of `executor`, or several smaller ones.

    Slices are not its matter: they are the model's own (slicing.py). What `possible` finds to be
    in the way is left out; the caller tells it.
    """
    call = Call(x, t, c_concat, c_crossattn, control, transformer_options or {}, kwargs)
    plan, _ = possible(plan, x, control, call.transformer_options)
    size = together(getattr(executor, "class_obj", None), x, call.transformer_options)
    items = _apart(call, size) if plan.apart and x.shape[0] > size else [call]
    results = [_one(executor, plan, item) for item in items]
    return results[0] if len(results) == 1 else torch.cat(results)


def together(model: Any, x: Tensor, transformer_options: dict[str, Any]) -> int:
    """How many items of a batch have to stay in one call of this model.

    Only a Qwen-Image that nobody patched surely treats each picture on its own. Of other models the
    batch may be the frames of a video, and caches keep one state for all pictures of a side of CFG;
    the sides themselves ComfyUI runs apart, too, where memory is short.
    """
    batch, sides = x.shape[0], len(transformer_options.get("cond_or_uncond", ())) or 1
    inner = getattr(model, "diffusion_model", None)
    own = type(inner) is QwenImageTransformer2DModel
    if own and not foreign.sees_the_batch(transformer_options):
        return 1
    return batch if batch % sides else batch // sides


def possible(
    plan: Plan, x: Tensor, control: dict[str, Any] | None, transformer_options: dict[str, Any]
) -> tuple[Plan, str]:
    """The plan without what cannot be done here, and the reasons for that, or ""."""
    reasons = []
    if sliced(plan) and compiled(transformer_options):
        plan = replace(plan, feed_forward=1, projections=1, attention=1)
        reasons.append(COMPILED)
    if plan.tiles > 1 and (reason := _untiled(x, control, transformer_options)):
        plan = replace(plan, tiles=1)
        reasons.append(reason)
    return plan, " ".join(reasons)


def _untiled(x: Tensor, control: dict[str, Any] | None, transformer_options: dict[str, Any]) -> str:
    """What is in the way of tiles, or ""."""
    if foreign.cached(transformer_options):
        return WHOLE_PATCHES.format("EasyCache")
    found = transformer_options.get("patches", {})
    if patches := sorted(name for name in found if found[name]):
        return WHOLE_PATCHES.format(", ".join(patches))
    if x.ndim not in (4, 5) or (x.ndim == 5 and x.shape[2] != 1):
        return NO_PICTURE
    return "" if _hints_fit(control, *x.shape[-2:]) else WHOLE_HINTS


def _one(executor: WrapperExecutor, plan: Plan, call: Call) -> Tensor:
    """One item of the batch, or the batch as it came."""
    if plan.reference_scale != 1.0:
        call = _with_smaller_references(call, plan.reference_scale)
    if plan.tiles == 1:
        return call.run(executor)
    height, width = call.x.shape[-2:]
    grid = TileGrid.along(height, width, plan.tiles, OVERLAP)
    return call.run(executor) if len(grid) == 1 else _tiled(executor, call, grid)


# ------------------------------------------------------------------------------ apart
def _apart(call: Call, size: int) -> list[Call]:
    """A call for each `size` items: the sides of CFG, and within them maybe the pictures."""
    batch = call.x.shape[0]
    parts = [slice(start, start + size) for start in range(0, batch, size)]
    return [
        Call(
            *(_items(value, part, batch) for value in (call.x, call.t)),
            *(_items(value, part, batch) for value in (call.c_concat, call.c_crossattn)),
            _items(call.control, part, batch),
            _options_of(call.transformer_options, part, batch),
            {name: _items(value, part, batch) for name, value in call.extra.items()},
        )
        for part in parts
    ]


def _items(value: Any, part: slice, batch: int) -> Any:
    """Of whatever has the batch as its first dimension, also in lists and dicts."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, list):
        return [_items(each, part, batch) for each in value]
    if isinstance(value, dict):
        return {name: _items(each, part, batch) for name, each in value.items()}
    return value


def _options_of(options: dict[str, Any], part: slice, batch: int) -> dict[str, Any]:
    """What tells about the batch, for a part of a side of CFG; patches ask which one they see."""
    sides = len(options.get("cond_or_uncond", ())) or 1
    pictures = batch // sides
    side, first = divmod(part.start, pictures)
    own = with_part(options, "items", first, part.stop - part.start)
    for name in ("cond_or_uncond", "uuids"):
        if name in options:
            own[name] = options[name][side : side + 1]
    if "sigmas" in options:
        size = part.stop - part.start
        own["sigmas"] = _items(options["sigmas"], slice(first, first + size), pictures)
    return own


# ------------------------------------------------------------------------------ references
def _with_smaller_references(call: Call, scale: float) -> Call:
    """The same call with the sides of every reference latent times `scale`."""
    references = call.extra.get("ref_latents")
    if not references:
        return call
    smaller = [_smaller(reference, scale) for reference in references]
    return replace(call, extra={**call.extra, "ref_latents": smaller})


def _smaller(latent: Tensor, scale: float) -> Tensor:
    """By the mean over areas, to even sides of at least one token."""
    height, width = (max(PATCH, round(side * scale / PATCH) * PATCH) for side in latent.shape[-2:])
    pictures = latent.reshape(-1, 1, *latent.shape[-2:])
    resized = interpolate(pictures, size=(height, width), mode="area")
    return resized.reshape(*latent.shape[:-2], height, width)


# ------------------------------------------------------------------------------ tiles
def _tiled(executor: WrapperExecutor, call: Call, grid: TileGrid) -> Tensor:
    """MultiDiffusion (arXiv 2302.08113): the mean of what overlapping tiles predict.

    The model sees each tile as a picture of its own: its positions begin in its own middle.
    """
    blender = TileBlender(grid, call.x.shape, device=call.x.device)
    for index, tile in enumerate(grid.tiles()):
        predicted = _crop_call(call, tile, index).run(executor)
        blender.add(index, predicted)
    return blender.result().to(predicted.dtype)


def _crop_call(call: Call, tile: Tile, index: int) -> Call:
    """The same call for one tile; text and references are whole in each."""
    sides = call.x.shape[-2:]

    def own(value: Any) -> Any:
        """Whatever has the picture's sides."""
        picture = isinstance(value, Tensor) and value.ndim >= 4 and value.shape[-2:] == sides
        return crop(value, tile) if picture else value

    return replace(
        call,
        x=crop(call.x, tile),
        c_concat=own(call.c_concat),
        control=_crop_hints(call.control, tile, *sides),
        transformer_options=with_part(call.transformer_options, "tile", index),
        extra={name: own(value) for name, value in call.extra.items()},
    )


def _tokens(side: int) -> int:
    """Along a side of so many latent pixels; the model fills an odd one up."""
    return -(-side // PATCH)


def _hints(control: dict[str, Any] | None) -> list[Tensor]:
    """What a ControlNet adds to the blocks, (batch, tokens, width) each."""
    parts = (control or {}).values()
    return [hint for part in parts for hint in part if hint is not None]


def _hints_fit(control: dict[str, Any] | None, height: int, width: int) -> bool:
    """Whether each hint has one row for each token of a picture with even sides."""
    hints = _hints(control)
    if not hints:
        return True
    tokens = _tokens(height) * _tokens(width)
    even = height % PATCH == width % PATCH == 0
    return even and all(hint.ndim == 3 and hint.shape[1] == tokens for hint in hints)


def _crop_hints(
    control: dict[str, Any] | None, tile: Tile, height: int, width: int
) -> dict[str, Any] | None:
    """The tile's tokens of every hint."""
    if not _hints(control):
        return control
    place = Tile(*(side // PATCH for side in tile))

    def own(hint: Tensor | None) -> Tensor | None:
        """(batch, tokens of the picture, width) to (batch, tokens of the tile, width)."""
        if hint is None:
            return None
        grid = hint.unflatten(1, (height // PATCH, width // PATCH)).movedim(3, 1)
        return crop(grid, place).flatten(2).movedim(1, 2)

    return {name: [own(hint) for hint in part] for name, part in control.items()}
