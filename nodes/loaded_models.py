"""The models that ComfyUI has loaded: what each is, where it came from, and how to unload some."""

from __future__ import annotations

import os

import comfy.model_base
import comfy.model_management
from comfy.model_management import LoadedModel
from comfy.model_patcher import ModelPatcher

from ..core.clearing import DIFFUSION, OTHER, TEXT, VAE, Model
from ..core.graph_identity import strings_in
from .environment import LOADED


def loaded() -> list[tuple[LoadedModel, ModelPatcher]]:
    """As the list is now, from any thread; models that nothing refers to any more are left out."""
    everything = list(comfy.model_management.current_loaded_models)
    alive = [(entry, entry.model) for entry in everything]  # held, or one might go meanwhile
    return [(entry, patcher) for entry, patcher in alive if patcher is not None]


def known() -> list[tuple[LoadedModel, Model]]:
    """The same with what is known of each."""
    return [(entry, facts(patcher, str(entry.device))) for entry, patcher in loaded()]


def is_loaded(entry: LoadedModel) -> bool:
    """Whether it is still in ComfyUI's list; entries count as equal by their models."""
    return any(entry is other for other in comfy.model_management.current_loaded_models)


def facts(patcher: ModelPatcher, device: str) -> Model:
    """What is known of a model that is loaded on this device: for all who tell of models."""
    files = files_of(patcher)
    name = os.path.basename(files[0]) if files else type(patcher.model).__name__
    size = int(patcher.loaded_size())
    return Model(name, _kind(patcher), device, size, files)


def _kind(patcher: ModelPatcher) -> str:
    """One of the KINDS. ComfyUI marks text encoders, and asks VAEs alone to decode."""
    if patcher.is_clip:
        return TEXT
    if isinstance(patcher.model, comfy.model_base.BaseModel):
        return DIFFUSION
    return VAE if callable(getattr(patcher.model, "decode", None)) else OTHER


def files_of(patcher: ModelPatcher) -> tuple[str, ...]:
    """Paths of the files that it was made from; empty when nobody tells.

    ComfyUI's loaders note how to load a model again. For other models the prompt cache may know
    which files stand behind it, LoRAs too.
    """
    again = patcher.cached_patcher_init
    texts = strings_in(again[1]) if again else ()
    told = [text for text in texts if os.path.isabs(text) and not os.path.isdir(text)]
    return tuple(dict.fromkeys(told or LOADED.files_of(patcher.model)))


def unload(chosen: list[LoadedModel]) -> None:
    """Take models off their devices, as ComfyUI does when it needs the room.

    Only in the worker thread, when no node runs (see boundary). A model
    that the rest of the prompt uses is loaded again then. Models that compute on the CPU beside a
    GPU are left alone, as by ComfyUI itself: there is nowhere to move them to.
    """
    kept = [entry for entry, _ in loaded() if not any(entry is other for other in chosen)]
    for device in comfy.model_management.get_all_torch_devices():
        comfy.model_management.free_memory(1e30, device, kept)
