"""Frees memory, with the figures before and after, and what stays taken and why."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_management import LoadedModel

from ..core.clearing import CACHE, EVERYTHING, MODELS, ON_CPU, Model, Wish, freed, why_kept
from . import loaded_models
from .devices import DeviceMemory, device_memory, devices
from .loaders import REGISTRY
from .status import size_text
from .store import STORE

WORTH_TELLING_BYTES = 1 << 20
# The first that is measurable tells what was freed. Torch's own count knows nothing of the pages
# that dynamic VRAM keeps weights in.
MEASURES = ("own_bytes", "used_bytes", "reserved_bytes")
Known = list[tuple[LoadedModel, Model]]


class Figures(NamedTuple):
    """Bytes in use on one device; None is not measurable.

    `allocated_bytes` is what tensors take of the `reserved_bytes` that torch took from the driver.
    """

    memory: DeviceMemory
    allocated_bytes: int | None
    reserved_bytes: int | None

    def told(self) -> dict[str, int | None]:
        """For the answer."""
        return {
            "used_bytes": self.memory.used_bytes,
            "own_bytes": self.memory.own_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
        }


class Left(NamedTuple):
    """What was not freed. `bytes` is None where it cannot be measured."""

    id: str
    device: str
    bytes: int | None
    text: str


class Freeing(NamedTuple):
    """What there was before something is freed."""

    wish: Wish
    names: Collection[str]
    figures: list[Figures]
    models: Known

    @classmethod
    def of(cls, wish: Wish, names: Collection[str]) -> Freeing:
        """As it is now."""
        return cls(wish, names, measure(), loaded_models.known())


def measure() -> list[Figures]:
    """The figures of every device, the RAM last."""
    return [Figures(device_memory(device), *_allocator(device)) for device in devices()]


def _allocator(device: torch.device) -> tuple[int | None, int | None]:
    """Allocated and reserved bytes; torch counts both under cudaMallocAsync too."""
    if device.type in ("cuda", "xpu"):
        counts = getattr(torch, device.type)
        return counts.memory_allocated(device), counts.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    return None, None


def free(wish: Wish, names: Collection[str]) -> Callable[[str], dict[str, Any]]:
    """The work of the levels cache and models, for `Boundary.submit`."""

    def work(moment: str) -> dict[str, Any]:
        """Called when no node runs."""
        start = Freeing.of(wish, names)
        if wish.level == MODELS:
            chosen = [entry for entry, model in start.models if not why_kept(model, wish, names)]
            loaded_models.unload(chosen)
        free_caches()
        return told(start, moment)

    return work


def free_caches() -> None:
    """Garbage, the buffers that weights were cast in, and what torch keeps for later."""
    REGISTRY.forget_leaving()
    gc.collect()
    # Ends with soft_empty_cache. With dynamic VRAM ComfyUI does the same after every node.
    comfy.model_management.reset_cast_buffers()


# ------------------------------------------------------------------------------------ the answer
def told(start: Freeing, moment: str) -> dict[str, Any]:
    """What was freed since `start`, and what was not."""
    stays = [loaded_models.is_loaded(entry) for entry, _ in start.models]
    models = [model for _, model in start.models]
    unloaded = [m for m, stayed in zip(models, stays, strict=True) if not stayed]
    kept = [m for m, stayed in zip(models, stays, strict=True) if stayed]
    if start.wish.level == CACHE:
        kept = []  # nobody asked for them
    pairs = list(zip(start.figures, measure(), strict=True))
    left = [part for _, after in pairs for part in _left_on(after, start.wish, len(unloaded))]
    return {
        "done": True,
        "level": start.wish.level,
        "when": moment,
        "devices": [_device(*pair) for pair in pairs],
        "unloaded": [_model(model) for model in unloaded],
        "kept": [_model(m) | {"why": why_kept(m, start.wish, start.names) or ON_CPU} for m in kept],
        "left": [part._asdict() for part in left],
        "text": _line(start.wish, moment, pairs, len(unloaded), len(kept)),
    }


def _model(model: Model) -> dict[str, Any]:
    """Without the paths of its files."""
    return {name: value for name, value in model._asdict().items() if name != "files"}


def _device(before: Figures, after: Figures) -> dict[str, Any]:
    memory = after.memory
    return {
        "device": memory.device,
        "name": memory.name,
        "kind": memory.kind,
        "before": before.told(),
        "after": after.told(),
        "freed_bytes": _freed(before, after),
        "why": dict(memory.why),
    }


def _freed(before: Figures, after: Figures) -> int | None:
    """By this process, if the driver tells; else by all there are, or by torch."""
    return freed(*([figures.told()[name] for name in MEASURES] for figures in (before, after)))


def _line(
    wish: Wish, moment: str, pairs: list[tuple[Figures, Figures]], unloaded: int, kept: int
) -> str:
    """For the node and the log."""
    parts = []
    for before, after in pairs:
        change, memory = _freed(before, after), after.memory
        name = memory.name if memory.kind == "cpu" else memory.device
        if change is None:
            parts.append(f"{name}: not measurable")
        else:
            word = "freed" if change >= 0 else "more in use"
            parts.append(f"{name}: {size_text(abs(change))} {word}")
    if wish.level != CACHE:
        models = "1 model" if unloaded == 1 else f"{unloaded} models"
        parts.append(f"{models} unloaded" + (f", {kept} kept" if kept else ""))
    return " · ".join([*parts, moment])


# ------------------------------------------------------------------------------ what stays taken
def _left_on(figures: Figures, wish: Wish, unloaded: int) -> list[Left]:
    """What is still taken on a device."""
    memory = figures.memory
    in_ram = memory.kind == "cpu"
    parts = _left_in_ram(wish, unloaded) if in_ram else _left_on_card(figures, wish)
    if memory.other_bytes and not in_ram:  # in the RAM there are always some
        text = "Other programs take it. Qwen VRAM never touches them: close them yourself."
        parts.append(Left("other_processes", memory.device, memory.other_bytes, text))
    return [p for p in parts if p.bytes is None or p.bytes >= WORTH_TELLING_BYTES]


def _left_on_card(figures: Figures, wish: Wish) -> list[Left]:
    """Of what this process holds."""
    device, own = figures.memory.device, figures.memory.own_bytes
    allocated, reserved = figures.allocated_bytes, figures.reserved_bytes
    loaded = [patcher for e, patcher in loaded_models.loaded() if str(e.device) == device]
    models = sum(patcher.loaded_size() for patcher in loaded)
    # With dynamic VRAM most weights lie in pages that are not torch's.
    weights = sum(patcher.model.model_loaded_weight_memory for patcher in loaded)
    parts = [Left("models", device, models, "Models that are loaded.")]
    if allocated is not None and reserved is not None:
        text = "Tensors that node outputs, or nodes themselves, hold."
        if wish.level != EVERYTHING:
            text += " The level everything lets go of node outputs."
        parts.append(Left("tensors", device, allocated - weights, text))
        text = "Free parts of blocks that are in use: torch cannot give them back."
        parts.append(Left("blocks", device, reserved - allocated, text))
        if own is not None:
            text = "The driver's and libraries' part of ComfyUI; it goes when ComfyUI ends."
            parts.append(Left("context", device, own - reserved - (models - weights), text))
    return parts


def _left_in_ram(wish: Wish, unloaded: int) -> list[Left]:
    """Of what this process holds in the RAM."""
    kept, parts = REGISTRY.kept(), []
    if kept:
        size = sum(key.file.size for key in kept)
        text = f"Models whose loader has keep_loaded on ({len(kept)}). Switch it off, and run."
        parts.append(Left("keep_loaded", "cpu", size, text))
    pinned = int(comfy.model_management.TOTAL_PINNED_MEMORY)
    parts.append(Left("pinned", "cpu", pinned, "Pinned memory of models that are in use."))
    text = "Encoded prompts. The settings of Qwen VRAM bound them, and its panel removes them."
    parts.append(Left("prompts", "cpu", STORE.memory_usage().bytes, text))
    if unloaded and wish.level != EVERYTHING:
        text = (
            "Unloaded models stay in RAM as long as node outputs refer to them, and are quick to "
            "load again. How much of it is read from their files only is not measurable. The "
            "level everything lets go of them."
        )
        parts.append(Left("weights", "cpu", None, text))
    return parts
