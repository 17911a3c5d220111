"""The models that ComfyUI and this pack have in memory, one by one."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ..core.memory_report import Model
from . import loaded_models
from .boundary import BOUNDARY
from .devices import short
from .loaders import REGISTRY, weight_dtype_name

FILE_MARKS = (
    "_comfy_tensor_mmap_refs",
    "_comfy_tensor_file_slice",
)  # on a storage: see comfy.utils


class _Weights(NamedTuple):
    """Where the weights of a model lie, in bytes; `stamp` changes when ComfyUI moves them."""

    stamp: tuple[Any, ...]
    on: dict[str, int]
    mapped: int
    pinned: int
    dtype: str


_weights: weakref.WeakKeyDictionary[Any, _Weights] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[ModelPatcher] = weakref.WeakSet()
_lock = threading.Lock()
_used: weakref.WeakSet[Any] | None = None  # the models of the last prompt that ran a node


def models(thorough: bool = False) -> tuple[list[Model], dict[str, str]]:
    """Every set of weights once, the largest first; and those without figures, with the reason.

    What ComfyUI manages, what our loaders hold, and what was seen before. ComfyUI lists only models
    that were on a device. `thorough` also looks for those that are only in RAM, among all Python
    objects, which takes a tenth of a second or more; from then on they are known. While a prompt
    runs its own thread alone does so: who holds an object last is who has to free it.
    """
    found, why = [], {}
    for patcher, handles in _patchers(thorough):
        try:
            found.append(_model(patcher, handles))
        except Exception as error:  # any custom node's class; the report goes on without this one
            why[f"model {type(patcher.model).__name__}"] = _reason(error)
    return sorted(found, key=lambda model: -model.bytes), why


def _reason(error: Exception) -> str:
    """Why a model has no figures: while a prompt runs, its thread may build or delete it."""
    if BOUNDARY.busy:
        return "ComfyUI runs a prompt, and may be loading or moving it; ask again."
    return f"its figures cannot be read ({short(error)})."


def note_used() -> None:
    """Note which models the running prompt uses: ComfyUI forgets it at the end of the prompt.

    Called by the worker when a node has ended. With dynamic VRAM alone ComfyUI keeps this account.
    """
    global _used
    patchers = [patcher for _, patcher in loaded_models.loaded() if patcher.is_dynamic()]
    _used = weakref.WeakSet(p.model for p in patchers if _in_use(p))


def _in_use(patcher: ModelPatcher) -> bool:
    pins = getattr(patcher.model, "dynamic_pins", {}).get(patcher.load_device, {})
    return bool(pins.get("current_prompt"))


def _patchers(thorough: bool) -> list[tuple[ModelPatcher, int]]:
    """One patcher for each set of weights, with the handles that our registry gave out for it."""
    loaded = [entry.model for entry in list(mm.current_loaded_models)]
    with _lock:
        _seen.update(patcher for patcher in loaded if patcher is not None)
        if thorough and (get_executing_context() is not None or not BOUNDARY.busy):
            _seen.update(_all_patchers())
        seen = list(_seen)
    shared = [(patcher, count) for patcher, count in REGISTRY.live()]
    first: dict[int, tuple[ModelPatcher, int]] = {}
    plain = [(patcher, 0) for patcher in [*loaded, *seen] if patcher is not None]
    for patcher, handles in [*plain, *shared]:
        known, count = first.get(id(patcher.model), (patcher, 0))
        first[id(patcher.model)] = (known, max(count, handles))
    return list(first.values())


def _all_patchers() -> Iterator[ModelPatcher]:
    """Every ModelPatcher that lives. By its real type: a proxy could do anything when asked."""
    for found in gc.get_objects():
        if issubclass(type(found), ModelPatcher) and "model" in vars(found):
            yield found


def _model(patcher: ModelPatcher, handles: int) -> Model:
    device, weights = patcher.load_device, _measured(patcher)
    pages, ram, pinned = 0, weights.on.get("cpu", 0), weights.pinned
    if patcher.is_dynamic():
        vbar = patcher.model.dynamic_vbars.get(device)
        pages = vbar.loaded_size() if vbar is not None else 0
        ram += patcher.loaded_ram_size()  # copies for transfers, apart from the parameters
        pinned = patcher.pinned_memory_size()
    known = loaded_models.facts(patcher, str(device))
    on_device = ram + weights.mapped if device.type == "cpu" else weights.on.get(str(device), 0)
    return Model(
        name=known.name,
        kind=known.kind,
        dtype=weights.dtype,
        device=known.device,
        bytes=patcher.model_size(),
        resident_bytes=on_device + pages,
        pages_bytes=pages,
        ram_bytes=ram,
        mapped_bytes=weights.mapped,
        pinned_bytes=pinned,
        file=known.name if known.files else None,
        shared_with=max(0, handles - 1),
        identity=tuple(map(os.path.realpath, known.files)) or None,
        needed=_needed(patcher),
    )


def _measured(patcher: ModelPatcher) -> _Weights:
    """Where the weights lie: looked up again only when ComfyUI has moved some."""
    model = patcher.model
    stamp = (
        model.model_loaded_weight_memory,
        str(model.device),
        model.current_weight_patches_uuid,
        len(patcher.pinned),
    )
    known = _weights.get(model)
    if known is None or known.stamp != stamp:
        known = _weights[model] = _measure(patcher, stamp)
    return known


def _measure(patcher: ModelPatcher, stamp: tuple[Any, ...]) -> _Weights:
    on: dict[str, int] = {}
    mapped = pinned = 0
    pointers: set[int] = set()
    for tensor in _tensors(patcher.model):
        pointer = tensor.data_ptr()
        if pointer in pointers:
            continue
        pointers.add(pointer)
        pinned += mm.PINNED_MEMORY.get(pointer, 0) if tensor.device.type == "cpu" else 0
        storage = tensor.untyped_storage()
        if any(hasattr(storage, mark) for mark in FILE_MARKS):
            mapped += tensor.nbytes
        else:
            place = str(tensor.device)
            on[place] = on.get(place, 0) + tensor.nbytes
    return _Weights(stamp, on, mapped, pinned, weight_dtype_name(patcher))


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers; of quantised ones the tensors that they are made of."""
    for tensor in (*model.parameters(), *model.buffers()):
        if hasattr(tensor, "__tensor_flatten__"):
            yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def _needed(patcher: ModelPatcher) -> bool | None:
    """Whether the last prompt used it; None while one runs, and where nobody keeps account."""
    if _used is None or BOUNDARY.busy or not patcher.is_dynamic():
        return None
    return patcher.model in _used
