"""Asks every owner of memory for its figures: driver, allocator, ComfyUI, comfy-aimdo, the pack."""

from __future__ import annotations

import datetime
import functools
import logging
import time as clock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.memory_management
import comfy.model_management as mm
import psutil
import torch
from server import PromptServer

from ..core import memory_report, memory_text
from ..core.fragments import Fragments, fragments
from ..core.memory_findings import Finding, Ram, findings
from ..core.memory_report import Allocator, Device, Holding, Probe
from . import allocator, reference_memory
from .devices import device_memory, devices, short
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
PROBE_BYTES = 16 << 20  # close enough
MOST_PROBE_SECONDS = 2.0

Heap = Callable[[], Any]  # what torch.cuda.memory_snapshot() gives
log = logging.getLogger("qwen_vram")
_at_start: dict[str, tuple[int | None, int | None]] = {}  # of ours, of all: without the allocator


def running() -> bool:
    """Whether ComfyUI executes a prompt."""
    return bool(PromptServer.instance.prompt_queue.get_current_queue_volatile()[0])


def note_start() -> None:
    """Note what the driver counts before anything is loaded: CUDA's context, and others."""
    for device in devices()[:-1]:
        try:
            _at_start[str(device)] = _measured_start(device)
        except Exception as error:  # one broken card must not keep the pack from loading
            log.warning("The memory of %s cannot be measured: %s.", device, short(error))


def _measured_start(device: torch.device) -> tuple[int | None, int | None]:
    memory, torchs = device_memory(device), _allocator(device, None)
    if any(reason.startswith("it fails") for reason in memory.why.values()):
        log.warning("The memory of %s cannot be measured: %s", device, dict(memory.why))
    reserved = torchs.reserved if torchs is not None else 0
    own, used = memory.own_bytes, memory.used_bytes
    return (
        None if own is None else own - reserved,
        None if used is None or device.type == "mps" else used - reserved,
    )


def gather(thorough: bool = False, probe: bool = False, only: str | None = None) -> dict[str, Any]:
    """The report as JSON: see core/memory_report.py. Any thread may ask.

    `thorough` also reads the allocator's blocks and looks for models that are only in RAM; `probe`
    tries allocations; `only` names one device.
    """
    known, unread = models(thorough)
    heap = functools.cache(torch.cuda.memory_snapshot) if thorough else None  # of all cards
    chosen = [device for device in devices() if only in (None, str(device))]
    told = [_device(device, heap, probe) for device in chosen]
    try:
        doctor, async_by = allocator.for_the_report()
    except Exception as error:  # whatever the driver of a broken card raises
        unread["allocator's options"] = f"it fails: {short(error)}."
        doctor, async_by = (), None
    if unread and told:
        told[-1] = Device(**{**vars(told[-1]), "why": {**told[-1].why, **unread}})
    found = findings(told, known, _ram(), [Finding(*each) for each in doctor], async_by)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    time = now.replace("+00:00", "Z")
    return memory_report.report(told, known, [f._asdict() for f in found], time, running())


def _ram() -> Ram:
    try:
        swap = psutil.swap_memory().used
    except (OSError, RuntimeError):  # Windows without performance counters, some containers
        swap = None
    return Ram(swap, int(mm.TOTAL_PINNED_MEMORY))


def _device(device: torch.device, heap: Heap | None, probe: bool) -> Device:
    """One device; what fails there is not measurable, and the reason is its error."""
    why: dict[str, str] = {}

    def _try(what: str, ask: Callable[..., Any], *args: Any) -> Any:
        try:
            return ask(device, *args)
        except Exception as error:  # whatever a driver or a custom node's object raises
            why[what] = f"it fails: {short(error)}."
            return None

    probed = _try("largest allocation", largest_allocation) if probe else None
    memory = device_memory(device)
    pieces = _try("free blocks", _fragments, heap) if heap is not None else None
    torchs = _try("allocator", _allocator, pieces)
    holdings = _try("buffers and kept results", lambda d: list(_holdings(d))) or []
    return Device(
        memory.device,
        memory.name,
        memory.kind,
        memory.total_bytes,
        memory.used_bytes,
        memory.own_bytes,
        memory.other_bytes,
        {**memory.why, **why},
        torchs,
        pieces,
        tuple(holding for holding in holdings if holding.bytes),
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


def _fragments(device: torch.device, heap: Heap) -> Fragments | None:
    """Free blocks of torch's own allocator; the others raise when asked for them."""
    if device.type != "cuda" or _backend(device) != "native":
        return None
    return fragments(heap(), device.index or 0)


# ---------------------------------------------------------------------------------- named holders
def _holdings(device: torch.device) -> Iterator[Holding]:
    """What is neither model nor allocator: streaming buffers, kept results, the pack's caches."""
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
    kept = reference_memory.held_on(device)  # while a sampler runs
    yield Holding("reference_cache", "Reference cache of Qwen VRAM", kept)
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
            if tensor.device == device and tensor.layout is torch.strided:  # others: no storage
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
        why = "Not tried: an operating system promises more RAM than there is."
        return Probe(None, why if device.type in ("cpu", "mps") else "Not tried on this device.")
    before = _pages(device)
    end = clock.monotonic() + MOST_PROBE_SECONDS
    largest, done = _largest(lambda size: _fits(device, size), _bound(device), end)
    mm.soft_empty_cache()
    return Probe(largest, _probe_note(before, _pages(device), done))


def _largest(fits: Callable[[int], bool], bound: int, end: float) -> tuple[int, bool]:
    """The largest size up to `bound` that fits, to within PROBE_BYTES, by halving.

    False if the time `end` (by clock.monotonic) came before.
    """
    if fits(bound):
        return bound, True
    low, high = 0, bound
    while high - low > PROBE_BYTES:
        if clock.monotonic() > end:
            return low, False
        tried = (low + high) // 2
        low, high = (tried, high) if fits(tried) else (low, tried)
    return low, True


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


def _probe_note(before: int, after: int, done: bool) -> str:
    note = "Torch's cache went back to the driver."
    if not done:
        note += f" After {MOST_PROBE_SECONDS:.0f} s no larger ones were tried."
    if before > after:
        gone = memory_text.amount(before - after)
        note += f" {gone} of the models' pages had to leave; they come back with the next run."
    if after:
        more = memory_text.amount(after)
        note += f" Dynamic VRAM would also give up {more} of the models' pages for a run."
    return note
