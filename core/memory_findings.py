"""What stands out in the figures, in plain words, each with one thing to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .memory_report import Device, Model, named_apart, parts, twins
from .units import size_text

GB = 1_000_000_000
UNEXPLAINED_BYTES = 300_000_000
MERGE, CLEAR_CACHE, CLEAR_MODELS, CLEAR_NEEDED = (
    "QwenVRAM.MergeLoaders",
    "QwenVRAM.Clear.Cache",
    "QwenVRAM.Clear.Models",
    "QwenVRAM.Clear.Needed",
)
UNLOAD = "Unload the models: blocks that are free as a whole go back to the driver."


class Finding(NamedTuple):
    """`command` is the id of a command of the editor that does what `action` says, if there is.

    `about` is the device or the models that it is about, for texts in other languages.
    """

    id: str
    severity: str
    text: str
    action: str
    saves_bytes: int | None = None
    command: str | None = None
    about: str = ""


class Ram(NamedTuple):
    """What else the findings need of the RAM, in bytes."""

    swap_used: int | None = None
    pinned: int = 0


def findings(
    devices: Sequence[Device],
    models: Sequence[Model],
    ram: Ram,
    more: Sequence[Finding] = (),
    async_by: str | None = None,
) -> list[Finding]:
    """Everything that stands out, and what others found, the worst first.

    `async_by` says how cudaMallocAsync would manage the memory instead; None if it cannot here.
    """
    models = named_apart(models)
    found = [*more, *_duplicates(models), *_unneeded(models)]
    for device in devices:
        found += _of_the_ram(device, ram) if device.kind == "cpu" else _of_a_card(device, async_by)
        found += _unexplained(device, models)
    order = ("problem", "warning", "info")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _duplicates(models: Sequence[Model]) -> Iterator[Finding]:
    """Two sets of weights from one file."""
    for model, twin in zip(models, twins(models), strict=True):
        if twin is None:
            continue
        saves = (model.ram_bytes or 0) + (model.resident_bytes or 0 if model.device != "cpu" else 0)
        yield Finding(
            f"duplicate_{model.kind.replace(' ', '_').lower()}",
            "warning",
            f"Two copies of the {model.kind} {model.file or model.name} are in memory, "
            f"{size_text(model.bytes)} each.",
            "Merge the loaders that load it, or use those of Qwen VRAM, which share one copy.",
            saves,
            MERGE,
            model.file or model.name,
        )


def _unneeded(models: Sequence[Model]) -> Iterator[Finding]:
    """Models on a card that the last prompt did not ask for."""
    idle = [m for m in models if m.needed is False and m.device != "cpu" and m.resident_bytes]
    size = sum(m.resident_bytes or 0 for m in idle)
    if size < GB / 2:
        return
    names = ", ".join(m.name for m in idle[:3]) + (" ..." if len(idle) > 3 else "")
    yield Finding(
        "models_not_needed",
        "info",
        f"{size_text(size)} on the card belong to models that the last run did not use: {names}.",
        "Nothing has to be done, since they give way to others; to free it now, unload those that "
        "the open workflow does not need.",
        size,
        CLEAR_NEEDED,
        names,
    )


def _of_a_card(device: Device, async_by: str | None) -> Iterator[Finding]:
    total = device.total or 0
    shared = device.kind == "mps"  # one memory: the RAM of ComfyUI itself is among the others
    if not shared and device.other is not None and device.other > max(GB, total // 10):
        yield Finding(
            "other_processes",
            "warning",
            f"Other processes hold {size_text(device.other)} of {device.device}.",
            "Close what you do not need: browsers with video, games, another ComfyUI.",
            device.other,
            about=device.device,
        )
    yield from _fragments(device, async_by)
    allocator = device.allocator
    if allocator is None:
        return
    cache = allocator.reserved - allocator.allocated - (allocator.inactive_split or 0)
    if cache > max(GB, total // 10):
        yield Finding(
            "allocator_cache",
            "info",
            f"Torch keeps {size_text(cache)} of {device.device} for itself, free for its next use.",
            "Clear the cache if another program needs it.",
            cache,
            CLEAR_CACHE,
            device.device,
        )


def _fragments(device: Device, async_by: str | None) -> Iterator[Finding]:
    """Free memory between live blocks: known with torch's own allocator alone."""
    allocator, pieces = device.allocator, device.fragments
    if allocator is None or allocator.inactive_split is None:
        return
    least = max(GB // 2, (device.total or 0) // 40)
    if pieces is not None and pieces.small_bytes > least:
        yield Finding(
            "fragmentation",
            "warning",
            f"{size_text(pieces.small_bytes)} of {device.device} lie in {pieces.small_count} "
            f"fragments smaller than 64 MB, where no large tensor fits.",
            async_by or UNLOAD,
            pieces.small_bytes,
            None if async_by else CLEAR_MODELS,
            device.device,
        )
    elif (stuck := allocator.inactive_split) > least:
        largest = pieces.largest_bytes if pieces is not None else None
        size = f", the largest piece has {size_text(largest)}" if largest is not None else ""
        yield Finding(
            "free_between_blocks",
            "info",
            f"{size_text(stuck)} of {device.device} are free between live blocks{size}.",
            UNLOAD,
            stuck,
            CLEAR_MODELS,
            device.device,
        )


def _of_the_ram(device: Device, ram: Ram) -> Iterator[Finding]:
    total, free = device.total or 0, device.free
    if free is not None and free < max(2 * GB, total // 20):
        swap = f", and {size_text(ram.swap_used)} are in the swap file" if ram.swap_used else ""
        yield Finding(
            "ram_full",
            "problem",
            f"Only {size_text(free)} of {size_text(total)} RAM are left{swap}. Models are then "
            "read from the disk again and again.",
            "Close other programs, or use smaller model files, such as fp8.",
        )
    if total and ram.pinned > total // 2:
        yield Finding(
            "pinned",
            "info",
            f"{size_text(ram.pinned)} of {size_text(total)} RAM are pinned for transfers to the "
            "card; the system cannot swap them.",
            "If other programs lack RAM, start ComfyUI with --disable-pinned-memory.",
            ram.pinned,
        )


def _unexplained(device: Device, models: Sequence[Model]) -> Iterator[Finding]:
    rest = next(part.bytes for part in parts(device, models) if part.id == "unexplained")
    if rest is None or abs(rest) <= UNEXPLAINED_BYTES:
        return
    if rest > 0:
        yield Finding(
            "unexplained",
            "info",
            f"Nobody accounts for {size_text(rest)} of {device.device}: libraries, a custom node "
            f"that takes memory past torch{', or another program' if device.own is None else ''}.",
            "If it grows from run to run, restart ComfyUI with fewer custom nodes to find it.",
            about=device.device,
        )
    else:
        yield Finding(
            "counted_twice",
            "info",
            f"{size_text(-rest)} of {device.device} are counted twice: two sources claim the same "
            "bytes, so the parts are more than the whole.",
            "Read the parts of this device as upper bounds; ask again when nothing runs.",
            about=device.device,
        )
