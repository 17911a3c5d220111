"""What a tile sees of the conditionings of a whole picture, as ComfyUI's sampler has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy.conds import CONDConstant, CONDList, CONDRegular
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..core.tiling import PATCH, STEP, Tile, crop

AUTO, CROP, WHOLE = REFERENCES = ("auto", "crop along", "keep whole")
REFERENCE_LATENTS = "ref_latents"  # in model_conds
FEATHER = 8  # latent pixels, as in comfy.samplers.get_area_and_mult
Cond = dict[str, Any]
Sides = tuple[int, int]  # height and width
# Gives a ControlNet for a part of what it hints at: (control, sides of the whole, part of it)
HintsOf = Callable[[Any, Sides, Tile], Any]


# ------------------------------------------------------------------------------ references
def is_cropped(latent: Tensor, choice: str, sides: Sides) -> bool:
    """Whether a reference is cropped along with tiles of a picture with these sides.

    `AUTO`: if it has the picture's shape, as far as sides that are rounded to `STEP` can have it.
    """
    if choice != AUTO:
        return choice == CROP
    (height, width), (own_height, own_width) = sides, latent.shape[-2:]
    if height > width:
        height, width, own_height, own_width = width, height, own_width, own_height
    return abs(own_height - own_width * height / width) <= STEP


def choice_of(references: Sequence[str], index: int) -> str:
    """The last one holds for all further references."""
    return references[min(index, len(references) - 1)]


def crop_reference(latent: Tensor, sides: Sides, tile: Tile) -> Tensor:
    """The part of a reference latent (..., h, w) that shows what the tile shows.

    Of one of another size whole tokens, as many for every tile of a grid. Where these do not lie
    on its latent pixels they are resampled: a part that is moved to them would be seen shifted, in
    each tile by another distance.
    """
    for dim, *place in zip((-2, -1), sides, tile[:2], tile[2:], strict=True):
        latent = _part(latent, dim, *place)
    return latent


def _part(latent: Tensor, dim: int, side: int, start: int, length: int) -> Tensor:
    """Along one dimension, what `length` from `start` is of the picture's `side`.

    Linear between the middles of latent pixels, constant beyond the outermost.
    """
    own = latent.shape[dim]
    size = own if length == side else length if own == side else _tokens(length * own / side, own)
    first, rest = divmod(start * own, side)
    if not rest and length * own == size * side:
        return latent.narrow(dim, first, size)
    middles = start + (torch.arange(size, dtype=torch.float64) + 0.5) * length / size
    middles = (middles * own / side - 0.5).clamp(0, own - 1)
    lower = middles.long()
    upper = (lower + 1).clamp(max=own - 1)
    shares = (middles - lower).to(latent).reshape(-1, *[1] * (-dim - 1))
    near, far = (latent.index_select(dim, at.to(latent.device)) for at in (lower, upper))
    return torch.lerp(near, far, shares)


def _tokens(length: float, most: int) -> int:
    """Latent pixels of whole tokens."""
    return min(most, max(PATCH, round(length / PATCH) * PATCH))


def crop_references(
    latents: Sequence[Tensor], references: Sequence[str], sides: Sides, tile: Tile
) -> list[Tensor]:
    """Each by its choice."""
    return [
        crop_reference(latent, sides, tile)
        if is_cropped(latent, choice_of(references, index), sides)
        else latent
        for index, latent in enumerate(latents)
    ]


# ------------------------------------------------------------------------------ areas and masks
def with_weights(cond: Cond, x: Tensor) -> Cond:
    """The same cond with its area in as many dimensions as `x`, and with the weights that ComfyUI
    gives the area's borders as a mask: a part of it would get others."""
    if "area" not in cond:
        return cond
    sizes = tuple(x.shape[2:])
    area = comfy.samplers.add_area_dims(list(cond["area"]), len(sizes))
    starts = area[len(area) // 2 :][: len(sizes)]
    lengths = [
        min(size - start, length) for size, start, length in zip(sizes, starts, area, strict=False)
    ]
    cond = {**cond, "area": (*lengths, *starts)}
    if "mask" not in cond:
        cond["mask"] = _feathered(sizes, lengths, starts).to(x.device, x.dtype)
        cond.pop("mask_strength", None)
    return cond


def _feathered(sizes: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> Tensor:
    """(1, *sizes): one in the area, rising over its borders that are inside the picture."""
    mask = torch.ones(1, *sizes)
    for dim, (size, length, start) in enumerate(zip(sizes, lengths, starts, strict=True)):
        weights, rise = torch.zeros(size), min(FEATHER, length // 4)
        inside = weights[start : start + length].fill_(1)
        for step in range(rise):
            if start != 0:
                inside[step] *= (1.0 / rise) * (step + 1)
            if start + length < size:
                inside[length - 1 - step] *= (1.0 / rise) * (step + 1)
        mask *= weights.reshape(-1, *(1,) * (len(sizes) - 1 - dim))
    return mask


def _part_of_area(cond: Cond, tile: Tile) -> tuple[Tile, Tile, Sides] | None:
    """Where the cond's area meets the tile, in the picture and in the area, whose sides follow."""
    if "area" not in cond:
        return None
    area = cond["area"]
    dims = len(area) // 2
    (height, width), (top, left) = area[dims - 2 : dims], area[-2:]
    upper, first = max(top, tile.top), max(left, tile.left)
    lower = min(top + height, tile.top + tile.height)
    last = min(left + width, tile.left + tile.width)
    seen = Tile(upper, first, lower - upper, last - first)
    return seen, Tile(upper - top, first - left, *seen[2:]), (height, width)


# ------------------------------------------------------------------------------ conds
def crop_cond(
    cond: Cond, sides: Sides, tile: Tile, references: Sequence[str], hints: HintsOf
) -> Cond | None:
    """A cond of `with_weights` for one tile; None if it has no say there. The cond stays as it is.

    `sides` are the picture's, in latent pixels.
    """
    own, seen, part, whole = {**cond}, tile, tile, sides
    if (found := _part_of_area(cond, tile)) is not None:
        seen, part, whole = found
        if min(seen.height, seen.width) < 1:
            return None
        dims = len(cond["area"]) // 2
        lengths, starts = cond["area"][: dims - 2], cond["area"][dims:-2]
        places = seen.top - tile.top, seen.left - tile.left
        own["area"] = (*lengths, *seen[2:], *starts, *places)
    if "mask" in cond:
        own["mask"] = crop(cond["mask"], tile)
        # A default holds wherever no other prompt does, whatever its own mask.
        if "default" not in cond and not own["mask"].any():
            return None
    if cond.get("control") is not None:
        own["control"] = hints(cond["control"], whole, part)
    own["model_conds"] = {
        name: _crop_value(name, value, sides, tile, seen, references)
        for name, value in cond["model_conds"].items()
    }
    return own


def _crop_value(
    name: str, value: Any, sides: Sides, tile: Tile, seen: Tile, references: Sequence[str]
) -> Any:
    """One input of the model. Whatever has the picture's sides is cropped to the tile, of which
    ComfyUI itself takes what lies in an area; references to what is seen."""
    if not isinstance(value, CONDRegular):
        return value
    if name == REFERENCE_LATENTS:
        return value._copy_with(crop_references(value.cond, references, sides, seen))
    if isinstance(value, CONDList):
        return value._copy_with([_own(each, sides, tile) for each in value.cond])
    cropped = _own(value.cond, sides, tile)
    return value if cropped is value.cond else value._copy_with(cropped)


def _own(value: Any, sides: Sides, tile: Tile) -> Any:
    """The tile's part of what has the picture's sides."""
    picture = isinstance(value, Tensor) and value.ndim >= 4 and tuple(value.shape[-2:]) == sides
    return crop(value, tile) if picture else value


# ------------------------------------------------------------------------------ several tiles
def can_batch(conds: Sequence[Sequence[Cond] | None]) -> bool:
    """Whether tiles differ only in what has a batch."""
    every = [cond for side in conds for cond in side or ()]
    return not any({"area", "mask", "control", "gligen"} & cond.keys() for cond in every)


def batched(conds: Sequence[Cond], batch: int) -> Cond:
    """One cond for several tiles, tile by tile along the batch; `batch`: latents in each tile."""
    first = conds[0]
    values = {
        name: _joined([cond["model_conds"][name] for cond in conds], batch)
        for name in first["model_conds"]
    }
    return {**first, "model_conds": values}


def _joined(values: Sequence[Any], batch: int) -> Any:
    first = values[0]
    repeated = isinstance(first, CONDRegular) and not isinstance(first, CONDConstant)
    if not repeated and all(value is first for value in values):
        return first
    if isinstance(first, CONDList):
        lists = zip(*(value.cond for value in values), strict=True)
        return first._copy_with([_cat(each, batch) for each in lists])
    return first._copy_with(_cat([value.cond for value in values], batch))


def _cat(parts: Sequence[Any], batch: int) -> Any:
    """What is one and the same for every tile stays: ComfyUI repeats it.

    Of several it would give one after the other to latents, not the first ones to each tile.
    """
    first = parts[0]
    single = not isinstance(first, Tensor) or first.shape[0] == 1
    if single and all(part is first for part in parts):
        return first
    return torch.cat([repeat_to_batch_size(part, batch) for part in parts])
