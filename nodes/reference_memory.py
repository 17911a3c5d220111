"""Where the reference cache keeps what it recorded: how much that is, and where there is room."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ..core.reference_store import PLACES, KVStore, bytes_of
from ..core.units import size_text
from . import loaded_models
from .vram_limit import LIMIT
from .workload import tokens_of

PLACE_CHOICES = ("auto", *PLACES)
COMFORTABLE = 1.25  # times the store: what has to be spare on the GPU
SHARE = 3  # pinned RAM is dear, and so is the room of weights: no more than a third of either
STAGED_BLOCKS = 2  # on the GPU, where the rest is in RAM
NAME = "reference_latents"  # the host's, in a condition
Conds = dict[str, list[dict[str, Any]]]

NO_ROOM = (
    "no room for the reference cache, which takes {need}: {gpu} to spare on the GPU, {room} with "
    "all weights in RAM, and {ram} of RAM free, and it takes a third of either at most. A smaller "
    "store_format, or fewer or smaller references, take less."
)
NO_GPU = (
    "no room for the reference cache on the GPU: it takes {need}, and there are {room} even with "
    "all weights in RAM. Set store_place to ram or auto, or store_format to a smaller one."
)
NO_RAM = (
    "no room for the reference cache in RAM: it takes {need}, and {ram} are free. Set store_place "
    "to gpu or auto, or store_format to a smaller one."
)
NO_RAM_ALONE = (
    "no room for the reference cache: it takes {need}, and {ram} of RAM are free, where the model "
    "runs, too{most}. A smaller store_format, or fewer or smaller references, take less."
)
A_THIRD = "; auto takes a third of it at most"
TIGHT = (
    "the reference cache takes {need} of the GPU, where {gpu} are to spare beside the weights: "
    "some of these are streamed from RAM"
)
ONE_MEMORY = "the model runs in RAM, and so the reference cache is there"

_stores: weakref.WeakSet[KVStore] = weakref.WeakSet()
_lock = threading.Lock()


# ------------------------------------------------------------------------------------- the stores
def new_store(format: str, place: str, device: torch.device) -> KVStore:
    """A store that the memory report knows of; its RAM is pinned as far as ComfyUI allows."""
    store = KVStore(format, place, device, _pin, mm.unpin_memory)
    with _lock:
        _stores.add(store)
    return store


def _pin(tensor: torch.Tensor) -> bool:
    """Within ComfyUI's limit, so that no weights lose their pins; False where it has none left."""
    if not mm.is_device_cpu(tensor.device):
        return False
    with _lock:
        if mm.TOTAL_PINNED_MEMORY + tensor.nbytes > mm.MAX_PINNED_MEMORY:
            return False
        return mm.pin_memory(tensor)


def held_on(device: torch.device) -> int:
    """Bytes that all living stores hold on a device; those in RAM count to the CPU."""
    with _lock:
        stores = list(_stores)
    total = 0
    for store in stores:
        held = store.bytes_held
        total += held["gpu"] if store.device == device else 0
        total += held["ram"] if device.type == "cpu" else 0
    return total


# ------------------------------------------------------------------------------------- the figures
def expected_bytes(
    model: ModelPatcher,
    conds: Conds,
    noise_shape: Sequence[int],
    format: str,
    more_tokens: int = 0,
    parts: int = 1,
) -> int:
    """Bytes of all stores of one run, before it starts.

    `conds`: as PREPARE_SAMPLING has them, of the sides of CFG that are computed. `noise_shape`: of
    OUTER_SAMPLE's noise, since other wrappers enlarge that of PREPARE_SAMPLING. `more_tokens`: of
    the picture, that are kept beside those of the references. `parts`: of the picture, that have
    their own.
    """
    every = [cond for side in conds.values() for cond in side]
    every += _copies_for_areas(conds, noise_shape)
    counts = [sum(map(tokens_of, cond.get(NAME) or ())) for cond in every]
    counts = [count + more_tokens for count in counts if count or more_tokens]
    blocks = model.model.diffusion_model.transformer_blocks
    attention, dtype = blocks[0].attn, model.model.get_dtype_inference()
    shapes = [(noise_shape[0], attention.heads, count, attention.dim_head) for count in counts]
    sizes = [2 * len(blocks) * bytes_of(format, shape, dtype) for shape in shapes]
    return parts * sum(sizes)


def _copies_for_areas(conds: Conds, noise_shape: Sequence[int]) -> list[dict[str, Any]]:
    """What ComfyUI adds to each side of CFG for prompts that the other has for an area: what that
    side has there. By its own rules, as comfy.samplers.process_conds applies them."""
    if not any(
        {"area", "set_area_to_bounds"} & cond.keys() for side in conds.values() for cond in side
    ):
        return []
    sides = {
        name: [{**cond, "model_conds": {NAME: cond.get(NAME)}} for cond in side]
        for name, side in conds.items()
    }
    counts = {name: len(side) for name, side in sides.items()}
    for side in sides.values():
        comfy.samplers.resolve_areas_and_cond_masks_multidim(
            side, tuple(noise_shape[2:]), torch.device("cpu")
        )
    for name, side in sides.items():
        for cond in side:
            for other in sides.keys() - {name}:
                comfy.samplers.create_cond_with_same_area_if_none(sides[other], cond)
    return [cond["model_conds"] for name, side in sides.items() for cond in side[counts[name] :]]


def computed(conds: Conds, guider: Any, model_options: dict[str, Any]) -> Conds:
    """The sides of CFG that are computed: at a scale of 1 ComfyUI leaves the negative one out."""
    one = math.isclose(getattr(guider, "cfg", 0.0), 1.0)
    if not one or model_options.get("disable_cfg1_optimization", False):
        return conds
    return {name: side for name, side in conds.items() if name != "negative"}


def activations_of(
    model: ModelPatcher, noise_shape: Sequence[float], conds: Conds, pictures: int | None = None
) -> int:
    """Bytes that ComfyUI keeps free for forward passes, with all it reserves.

    `noise_shape`: PREPARE_SAMPLING's. Within a limit of ours its batch is not that of a pass: that
    is `pictures` (vram_limit.VRAMLimit.load_shape).
    """
    batch, *rest = noise_shape
    limited = model.model_options.get("transformer_options", {}).get(LIMIT, 0) > 0
    shape = [pictures if limited and pictures else batch, *rest]
    estimate = comfy.sampler_helpers.estimate_memory(model, shape, conds)[0]
    return round(max(mm.minimum_inference_memory(), estimate + mm.extra_reserved_memory()))


def place_for(
    wanted: str,
    need: int,
    device: torch.device,
    model: ModelPatcher,
    activations: int | None = None,
) -> tuple[str, str]:
    """Where a store of `need` bytes goes, and a sentence where there is something to say.

    "gpu", "ram", or "" where it has no room. Ask before the model is loaded; `activations` as
    `activations_of` gives them, without: the least that ComfyUI reserves.

    *auto*: on the GPU what fits beside the whole model; in RAM what leaves two thirds of it, since
    weights that had to leave are streamed in every pass, and a store once a step; on the GPU in
    the place of weights what leaves them two thirds; otherwise nowhere.
    """
    if wanted not in PLACE_CHOICES:
        raise ValueError(f"store_place is one of {', '.join(PLACE_CHOICES)}, not {wanted}.")
    activations = round(mm.minimum_inference_memory()) if activations is None else activations
    ram = mm.get_free_memory(torch.device("cpu"))
    if device.type == "cpu":
        if need * (SHARE if wanted == "auto" else 1) > ram:
            sizes = {"need": size_text(need), "ram": size_text(ram)}
            return "", NO_RAM_ALONE.format(**sizes, most=A_THIRD if wanted == "auto" else "")
        return "ram", ONE_MEMORY if wanted == "gpu" else ""
    room = _room(model, device) - activations
    return _choose(wanted, need, room, room - model.model_size(), ram, device.type == "mps")


def _choose(
    wanted: str, need: int, room: int, spare: int, ram: int, one_memory: bool
) -> tuple[str, str]:
    """`room`: bytes of the GPU without weights, `spare`: with all of them there."""
    sizes = {"need": need, "gpu": spare, "room": room, "ram": ram}
    texts = {name: size_text(max(0, size)) for name, size in sizes.items()}
    tight = TIGHT.format(**texts) if need > spare else ""
    if wanted == "gpu":
        return ("gpu", tight) if need * COMFORTABLE <= room else ("", NO_GPU.format(**texts))
    if wanted == "ram":
        return ("ram", "") if need <= ram else ("", NO_RAM.format(**texts))
    if need * COMFORTABLE <= spare:
        return "gpu", ""
    if need * SHARE <= ram and not one_memory:
        return "ram", ""
    if need * SHARE <= room:
        return "gpu", tight
    return "", NO_ROOM.format(**texts)


def _room(model: ModelPatcher, device: torch.device) -> int:
    """Bytes of a GPU that there would be with no weights on it, within a limit of ours.

    Pages of dynamic VRAM give way by themselves, and ComfyUI counts them as free; other weights
    leave as far as the load wants it.
    """
    free = model.get_free_memory(device) + sum(
        patcher.loaded_size()
        for entry, patcher in loaded_models.loaded()
        if entry.device == device and not patcher.is_dynamic()
    )
    limit = model.model_options.get("transformer_options", {}).get(LIMIT, 0)
    return int(min(free, limit) if limit > 0 else free)


def for_the_load(
    model: ModelPatcher, noise_shape: Sequence[float], need: int, place: str
) -> list[float]:
    """For PREPARE_SAMPLING: the shape of the noise to plan the load with, so that a store fits.

    ComfyUI fills the card with weights, all but what it thinks the noise needs: that grows with
    the first number. Dynamic VRAM fills it too, but its pages give way to what torch allocates;
    of what does not give way, other models leave for this.
    """
    blocks = len(model.model.diffusion_model.transformer_blocks)
    wanted = need if place == "gpu" else need * min(STAGED_BLOCKS, blocks) / blocks
    batch, *rest = noise_shape
    for_one = model.model.memory_required([1, *rest])
    return [batch + wanted / max(1.0, for_one), *rest]
