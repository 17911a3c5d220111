"""Asks every owner of memory for its figures: driver, allocator, ComfyUI, comfy-aimdo, the pack."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.memory_management
import comfy.model_management as mm
import psutil
import torch
from server import PromptServer

from ..core import memory_report
from ..core.fragments import Fragments, fragments
from ..core.memory_findings import Finding, Ram, findings
from ..core.memory_report import Allocator, Device, Holding, Probe
from . import allocator
from .devices import device_memory, devices
from .memory_models import models
from .store import STORE

ASYNC = "cudaMallocAsync"
NO_BLOCKS = {
    ASYNC: (
        "the driver's allocator cudaMallocAsync keeps no list of blocks; with "
        "--disable-cuda-malloc torch's own allocator does."
    ),
    "mps": "Apple's allocator keeps no list of blocks.",
    "xpu": "torch tells no blocks of this device.",
}
NOT_ASKED = "only asked for on demand, since it takes long: ?fragments=true, or the node."
MOVING = "ComfyUI is loading or moving it right now; ask again."
PROBE_BYTES = 16 << 20  # close enough

_at_start: dict[str, tuple[int | None, int | None]] = {}  # of ours, of all: without the allocator
_probing = threading.Lock()


def running() -> bool:
    """Whether ComfyUI executes a prompt."""
    return bool(PromptServer.instance.prompt_queue.get_current_queue_volatile()[0])


def note_start() -> None:
    """Note what the driver counts before anything is loaded: CUDA's context, and others."""
    for device in devices()[:-1]:
        memory, torchs = device_memory(device), _allocator(device, None)
        reserved = torchs.reserved if torchs is not None else 0
        own, used = memory.own_bytes, memory.used_bytes
        _at_start[str(device)] = (
            None if own is None else own - reserved,
            None if used is None or device.type == "mps" else used - reserved,
        )


def gather(thorough: bool = False, probe: bool = False, only: str | None = None) -> dict[str, Any]:
    """The report as JSON: see core/memory_report.py. Any thread may ask.

    `thorough` also reads the allocator's blocks and looks for models that are only in RAM; `probe`
    tries allocations; `only` names one device.
    """
    known, moving = models(thorough)
    told = [_device(device, thorough, probe) for device in devices() if only in (None, str(device))]
    if moving and told:
        last = told[-1]
        told[-1] = Device(**{**vars(last), "why": {**last.why, f"{moving} of the models": MOVING}})
    doctor = [Finding(*finding) for finding in allocator.diagnosis().findings]
    found = findings(told, known, _ram(), doctor)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    time = now.replace("+00:00", "Z")
    return memory_report.report(told, known, [f._asdict() for f in found], time, running())


def _ram() -> Ram:
    try:
        swap = psutil.swap_memory().used
    except (OSError, RuntimeError):  # Windows without performance counters, some containers
        swap = None
    return Ram(swap, int(mm.TOTAL_PINNED_MEMORY))


def _device(device: torch.device, thorough: bool, probe: bool) -> Device:
    probed = largest_allocation(device) if probe else None
    memory = device_memory(device)
    pieces = _fragments(device) if thorough else None
    return Device(
        memory.device,
        memory.name,
        memory.kind,
        memory.total_bytes,
        memory.used_bytes,
        memory.own_bytes,
        memory.other_bytes,
        memory.why,
        _allocator(device, pieces),
        pieces,
        tuple(holding for holding in _holdings(device) if holding.bytes),
        *_at_start.get(str(device), (None, None)),
        probed,
    )


# ----------------------------------------------------------------------------- torch's allocators
def _backend(device: torch.device) -> str:
    return torch.cuda.get_allocator_backend() if device.type == "cuda" else device.type


def _allocator(device: torch.device, pieces: Fragments | None) -> Allocator | None:
    """What torch's allocator tells of a device; None where it has none.

    Under cudaMallocAsync allocated and reserved are the driver's figures of its pool and true; all
    others are 0 there (torch 2.11, c10/cuda/CUDAMallocAsyncAllocator.cpp, getDeviceStats).
    """
    if device.type == "mps":
        sizes = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        return Allocator("mps", *sizes, why=_no_blocks("mps"))
    if device.type not in ("cuda", "xpu"):
        return None
    stats = getattr(torch, device.type).memory_stats(device)
    backend = _backend(device)
    sizes = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    if backend != "native":
        return Allocator(backend, *sizes, why=_no_blocks(backend))
    split = stats["inactive_split_bytes.all.current"]
    if pieces is None:
        return Allocator(backend, *sizes, None, split, {"largest_free_block": NOT_ASKED})
    return Allocator(backend, *sizes, pieces.largest_bytes, split)


def _no_blocks(backend: str) -> Mapping[str, str]:
    why = NO_BLOCKS.get(backend, f"the allocator {backend} keeps no list of blocks.")
    return {"inactive_split": why, "largest_free_block": why}


def _fragments(device: torch.device) -> Fragments | None:
    """Free blocks of torch's own allocator; the others raise when asked for them."""
    if device.type != "cuda" or _backend(device) != "native":
        return None
    return fragments(torch.cuda.memory_snapshot(), device.index or 0)


# ---------------------------------------------------------------------------------- named holders
def _holdings(device: torch.device) -> Iterator[Holding]:
    """What is neither model nor allocator: streaming buffers, kept results, the prompt cache."""
    label = "Buffers that stream weights"
    own = sum(
        buffer.size()
        for buffer in list(mm.STREAM_AIMDO_CAST_BUFFERS.values())
        if device.type == "cuda" and buffer.device == device.index
    )
    yield Holding("stream_buffers", label, own, in_torch=False, detail="dynamic VRAM")
    cast = [b.nbytes for b in list(mm.STREAM_CAST_BUFFERS.values()) if b.device == device]
    yield Holding("cast_buffers", label, sum(cast))
    yield Holding("outputs", "Results that nodes keep", _kept_results(device))
    if device.type == "cpu":
        yield Holding("pack", "Prompt cache of Qwen VRAM", STORE.memory_usage().bytes)


def _kept_results(device: torch.device) -> int:
    """Tensors among ComfyUI's cached outputs: known while a prompt runs with the default cache.

    ComfyUI then leaves the cache's own method where memory pressure can call it; at other times
    nothing public leads there, and these bytes are in the rest.
    """
    release = comfy.memory_management.extra_ram_release_callback
    cache = getattr(getattr(release, "__self__", None), "cache", None)
    if not isinstance(cache, dict):
        return 0
    sizes: dict[int, int] = {}
    for entry in list(cache.values()):
        for tensor in _tensors_in(entry.outputs):
            if tensor.device == device:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def _tensors_in(value: Any, depth: int = 5) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _tensors_in(item, depth - 1)


# -------------------------------------------------------------------------------------- the probe
def largest_allocation(device: torch.device) -> Probe:
    """Find the largest tensor that there is room for, by allocating; all of it is freed at once.

    Dynamic VRAM would give up pages of models for any size, so no more than what is free without
    them is tried; pages that went all the same are counted in the note.
    """
    if device.type not in ("cuda", "xpu"):
        why = "not tried: an operating system promises more RAM than there is."
        return Probe(None, why if device.type in ("cpu", "mps") else "not tried on this device.")
    with _probing:
        before = _pages(device)
        largest = _largest(lambda size: _fits(device, size), _bound(device))
        mm.soft_empty_cache()
    return Probe(largest, _probe_note(before, _pages(device)))


def _largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest size up to `bound` that fits, to within PROBE_BYTES, by halving."""
    if fits(bound):
        return bound
    low, high = 0, bound
    while high - low > PROBE_BYTES:
        tried = (low + high) // 2
        low, high = (tried, high) if fits(tried) else (low, tried)
    return low


def _bound(device: torch.device) -> int:
    """What is free to the driver, and what torch keeps without using it."""
    memory = device_memory(device)
    stats = getattr(torch, device.type).memory_stats(device)
    kept = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
    free = (memory.total_bytes or 0) - (memory.used_bytes or 0)
    return max(0, free + kept)


def _fits(device: torch.device, size: int) -> bool:
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except Exception as error:  # what torch raises differs from backend to backend
        mm.raise_non_oom(error)
        return False
    return True


def _pages(device: torch.device) -> int:
    return sum(model.pages_bytes for model in models()[0] if model.device == str(device))


def _probe_note(before: int, after: int) -> str:
    note = "Torch's cache went back to the driver."
    if before > after:
        gone = memory_report.amount(before - after)
        note += f" {gone} of the models' pages had to leave; they come back with the next run."
    if after:
        more = memory_report.amount(after)
        note += f" Dynamic VRAM would also give up {more} of the models' pages for a run."
    return note
