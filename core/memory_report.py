"""The figures of every owner of memory -> one report per device, as data and as text.

The parts of a device are disjoint and add up to its total exactly. What nobody accounts for is the
part "unexplained"; it is negative when two sources count the same bytes, and never clamped.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .fragments import Fragments
from .units import size_text

VERSION = 1
NOT_MEASURABLE = "not measurable"
AT_START = "as measured when ComfyUI started"
SINCE_START = "others_at_start"
OTHERS = {
    "cpu": "Other processes and the system",
    "mps": "Other processes, and ComfyUI's own RAM",  # one memory for both
}


@dataclass(frozen=True)
class Model:
    """One set of weights. Bytes; None is not measurable.

    Of `resident_bytes`, which lie on `device`, `pages_bytes` lie in dynamic VRAM, outside of
    torch's allocator. `ram_bytes` are held in RAM, `mapped_bytes` are only mapped from the file.
    `identity` tells whether two models come from the same file. `needed` is whether the last
    prompt asked for it.
    """

    name: str
    kind: str
    dtype: str
    device: str
    bytes: int
    resident_bytes: int | None
    pages_bytes: int = 0
    ram_bytes: int | None = None
    mapped_bytes: int = 0
    pinned_bytes: int | None = None
    file: str | None = None
    shared_with: int = 0
    identity: Hashable = None
    needed: bool | None = None

    @property
    def label(self) -> str:
        """As it is called in the report."""
        kind = "model" if self.kind == "other" else self.kind
        return f"{kind[:1].upper()}{kind[1:]} {self.name} ({self.dtype})"


class Allocator(NamedTuple):
    """Torch's allocator on a device. Bytes; `why` says for which reason one is None."""

    backend: str
    allocated: int
    reserved: int
    largest_free_block: int | None = None
    inactive_split: int | None = None
    why: Mapping[str, str] = {}


class Holding(NamedTuple):
    """What somebody holds on a device; `in_torch` if the allocator's figures contain it."""

    id: str
    label: str
    bytes: int
    in_torch: bool = True
    detail: str = ""


class Probe(NamedTuple):
    """The largest allocation that succeeded, or why it was not tried."""

    bytes: int | None
    note: str


@dataclass(frozen=True)
class Device:
    """One device as the driver and the allocator tell it. Bytes; `why` as in nodes/devices.py.

    `context` is what CUDA and its libraries took before anything was allocated; where the driver
    does not tell what is ours, `at_start` is what they and other processes took then.
    """

    device: str
    name: str
    kind: str
    total: int | None
    used: int | None
    own: int | None
    other: int | None
    why: Mapping[str, str] = field(default_factory=dict)
    allocator: Allocator | None = None
    fragments: Fragments | None = None
    holdings: Sequence[Holding] = ()
    context: int | None = None
    at_start: int | None = None
    probe: Probe | None = None

    @property
    def free(self) -> int | None:
        """What the driver can still hand out."""
        return None if self.total is None or self.used is None else self.total - self.used


class Part(NamedTuple):
    """One piece of a device's memory; None is not measurable."""

    id: str
    label: str
    bytes: int | None
    detail: str = ""


# ------------------------------------------------------------------------------------- the parts
def parts(device: Device, models: Sequence[Model]) -> list[Part]:
    """Who holds what on a device: disjoint, and with the unexplained rest exactly its total."""
    ours = [*_model_parts(device, models), *(_part(h) for h in device.holdings)]
    if device.kind == "cpu":
        ours += _process_part(device, ours)
    else:
        ours += _allocator_parts(device, models)
    others = _other_parts(device, sum(p.bytes for p in ours if p.bytes is not None))
    found = [*others, *(p for p in ours if p.bytes)]
    known = sum(p.bytes for p in found if p.bytes is not None)
    rest = None
    if device.total is not None and not {"rest", "unknown"} & {part.id for part in found}:
        rest = device.total - (device.free or 0) - known
        found, rest = _given_back(found, rest)
    found.append(Part("unexplained", "Unexplained", rest, _rest_detail(found)))
    label = "Free" if device.kind != "cpu" else "Free, or file cache that gives way"
    return [*found, Part("free", label, device.free)]


def _given_back(found: list[Part], rest: int) -> tuple[list[Part], int]:
    """What others took at the start, less what they must have given back since; and the rest.

    Their part is as old as the start. If the parts are more than the whole, it is too large.
    """
    then = found[0] if found and found[0].id == SINCE_START else None
    if rest >= 0 or then is None or not then.bytes:
        return found, rest
    back = min(-rest, then.bytes)
    since = f"others have given back {size_text(back)} since"
    now = then._replace(bytes=then.bytes - back, detail=f"{then.detail}; {since}")
    return [now, *found[1:]], rest + back


def _rest_detail(found: Sequence[Part]) -> str:
    since = any(part.id == SINCE_START for part in found)
    return "and what other processes took since ComfyUI started" if since else ""


def _part(holding: Holding) -> Part:
    return Part(holding.id, holding.label, holding.bytes, holding.detail)


def _model_parts(device: Device, models: Sequence[Model]) -> list[Part]:
    """What the models hold on a device; in RAM without what is only mapped from a file."""
    found = []
    for number, model in enumerate(models):
        size = _held(device, model)
        if size:
            found.append(Part(f"model:{number}", model.label, size, _residence(device, model)))
    return found


def _held(device: Device, model: Model) -> int:
    if device.kind == "cpu":
        return model.ram_bytes or 0
    return (model.resident_bytes or 0) if model.device == device.device else 0


def _residence(device: Device, model: Model) -> str:
    words = []
    if device.kind != "cpu" and model.resident_bytes is not None:
        words.append(_resident(model.bytes, model.resident_bytes, model.pages_bytes))
    if device.kind == "cpu" and model.mapped_bytes:
        words.append(f"{size_text(model.mapped_bytes)} more only mapped from the file")
    if device.kind == "cpu" and model.pinned_bytes:
        words.append(f"{size_text(model.pinned_bytes)} pinned")
    return ", ".join(words)


def _resident(size: int, resident: int, pages: int) -> str:
    """How much of a model is on its card. Pages are whole, and may be larger than what is in them.

    comfy-aimdo (comfy_aimdo.model_vbar) hands out dynamic VRAM in pages of 32 MiB.
    """
    if resident <= size:
        return f"{size_text(resident)} of {size_text(size)} resident"
    what = "its pages take" if pages else "it takes"
    return f"{size_text(size)}; {what} {size_text(resident)}"


def _process_part(device: Device, ours: list[Part]) -> list[Part]:
    """What else this process holds in RAM. If less than nothing is left, sources overlap."""
    if device.own is None:
        return []
    left = device.own - sum(part.bytes or 0 for part in ours)
    if left < 0:
        return []
    label = "The rest of ComfyUI"
    return [Part("process", label, left, "Python, libraries, other results")]


def _allocator_parts(device: Device, models: Sequence[Model]) -> list[Part]:
    """What torch has in live tensors of nobody named, and what it keeps free for itself."""
    allocator = device.allocator
    if allocator is None:
        return []
    named = sum(
        (m.resident_bytes or 0) - m.pages_bytes for m in models if m.device == device.device
    )
    named += sum(holding.bytes for holding in device.holdings if holding.in_torch)
    live, split = allocator.allocated - named, allocator.inactive_split or 0
    cache = allocator.reserved - allocator.allocated - split
    found = [
        Part("allocator_live", "Live tensors of nodes", live),
        Part("allocator_split", "Allocator: free between live blocks", split),
        Part("allocator_cache", "Allocator: cached", cache),
    ]
    return [part for part in found if part.bytes > 0]  # less than nothing is left to the rest


def _other_parts(device: Device, ours: int) -> list[Part]:
    """Other processes and the context, or both in one where they cannot be told apart."""
    found = []
    if device.used is None:
        if device.total is not None and device.total > ours:
            label = f"Free, or held by others ({NOT_MEASURABLE})"
            found.append(Part("unknown", label, device.total - ours))
        return found
    if device.own is None:
        return [*found, *_rest_parts(device, ours)]
    if device.other is not None:
        found.append(
            Part("other_processes", OTHERS.get(device.kind, "Other processes"), device.other)
        )
    if device.context is not None:
        found.append(Part("context", "CUDA context and libraries", device.context, AT_START))
    return found


def _rest_parts(device: Device, ours: int) -> list[Part]:
    """Others and the context in one: what they took at the start, or else all that is left."""
    context = "CUDA context" if device.kind == "cuda" else "driver"
    if device.at_start is not None:
        label = f"Other processes and {context}"
        return [Part(SINCE_START, label, device.at_start, AT_START)]
    if device.used is None or device.used <= ours:
        return []
    return [Part("rest", f"Other processes, {context} and unexplained", device.used - ours)]


# ------------------------------------------------------------------------------------ the report
def report(
    devices: Sequence[Device],
    models: Sequence[Model],
    findings: Sequence[Mapping[str, Any]],
    time: str,
    running: bool,
) -> dict[str, Any]:
    """The report as JSON can hold it."""
    models = named_apart(models)
    return {
        "version": VERSION,
        "time": time,
        "running": running,
        "devices": [_device_json(device, models) for device in devices],
        "models": [
            _model_json(model, twin) for model, twin in zip(models, twins(models), strict=True)
        ],
        "findings": [dict(finding) for finding in findings],
    }


def named_apart(models: Sequence[Model]) -> list[Model]:
    """The same models, with a number behind a name that was there before."""
    seen: dict[str, int] = {}
    found = []
    for model in models:
        seen[model.label] = count = seen.get(model.label, 0) + 1
        name = f"{model.name} #{count}" if count > 1 else model.name
        found.append(Model(**{**vars(model), "name": name}))
    return found


def twins(models: Sequence[Model]) -> list[Model | None]:
    """For each model the first one of the same file, kind, dtype and device, if it is another."""
    first: dict[Hashable, Model] = {}
    found: list[Model | None] = []
    for model in models:
        key = (model.identity, model.kind, model.dtype, model.device)
        found.append(first.setdefault(key, model) if model.identity is not None else None)
    return [twin if twin is not model else None for twin, model in zip(found, models, strict=True)]


def _device_json(device: Device, models: Sequence[Model]) -> dict[str, Any]:
    pages = sum(m.pages_bytes for m in models if m.device == device.device)
    return {
        "device": device.device,
        "name": device.name,
        "kind": device.kind,
        "total_bytes": device.total,
        "used_bytes": device.used,
        "own_bytes": device.own,
        "free_bytes": device.free,
        "parts": [part._asdict() for part in parts(device, models)],
        "not_measurable": _not_measurable(device),
        "allocator": _allocator_json(device.allocator),
        "fragments": device.fragments._asdict() if device.fragments else None,
        "dynamic_vram_bytes": pages if device.kind != "cpu" else None,
        "largest_allocation": device.probe._asdict() if device.probe else None,
    }


FIGURES = {
    "total_bytes": "total memory",
    "used_bytes": "memory in use",
    "own_bytes": "memory of this process by the driver's count",
    "other_bytes": "other processes",
    "largest_free_block": "largest free block",
    "inactive_split": "fragmentation",
}


def _not_measurable(device: Device) -> list[dict[str, str]]:
    why = {**device.why, **(device.allocator.why if device.allocator else {})}
    return [{"what": FIGURES.get(name, name), "why": reason} for name, reason in why.items()]


def _allocator_json(allocator: Allocator | None) -> dict[str, Any] | None:
    if allocator is None:
        return None
    return {
        "backend": allocator.backend,
        "allocated_bytes": allocator.allocated,
        "reserved_bytes": allocator.reserved,
        "largest_free_block_bytes": allocator.largest_free_block,
        "inactive_split_bytes": allocator.inactive_split,
    }


def _model_json(model: Model, twin: Model | None) -> dict[str, Any]:
    given = {k: v for k, v in vars(model).items() if k != "identity"}
    return {**given, "label": model.label, "duplicate_of": twin.name if twin else None}
