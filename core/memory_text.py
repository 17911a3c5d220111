"""A memory report (see core/memory_report.py) as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .memory_report import NOT_MEASURABLE
from .units import size_text


def text(told: Mapping[str, Any]) -> str:
    """A report as people read it, one line for each part."""
    lines = [f"Memory at {told['time']}" + (", while a prompt runs" if told["running"] else "")]
    for device in told["devices"]:
        lines += ["", *_device_lines(device)]
    lines += ["", "Models of ComfyUI" if told["models"] else "ComfyUI has no model in memory."]
    lines += [f"  {_model_line(model)}" for model in told["models"]]
    lines += ["", "Findings" if told["findings"] else "Nothing stands out."]
    lines += [f"  {f['severity']}: {f['text']} {f['action']}".rstrip() for f in told["findings"]]
    return "\n".join(lines)


def amount(size_bytes: int | None) -> str:
    """A size, or that there is none."""
    return NOT_MEASURABLE if size_bytes is None else size_text(size_bytes)


def _device_lines(device: Mapping[str, Any]) -> list[str]:
    total, free = amount(device["total_bytes"]), amount(device["free_bytes"])
    lines = [f"{device['device']} {device['name']}: {total}, free {free}"]
    for part in device["parts"]:
        detail = f" ({part['detail']})" if part["detail"] else ""
        lines.append(f"  {amount(part['bytes']):>14}  {part['label']}{detail}")
    if device["dynamic_vram_bytes"]:
        lines.append("  " + pages_line(device))
    if device["allocator"]:
        lines.append("  " + _allocator_line(device["allocator"]))
    if device["largest_allocation"]:
        probe = device["largest_allocation"]
        lines.append(
            f"  Largest allocation now: {amount(probe['bytes'])}. {probe['note']}".rstrip()
        )
    lines += [f"  Not measurable: {n['what']}: {n['why']}" for n in device["not_measurable"]]
    return lines


def pages_line(device: Mapping[str, Any]) -> str:
    """What of a device the models hold outside of torch's allocator."""
    return f"Dynamic VRAM: {amount(device['dynamic_vram_bytes'])} in pages of 32 MiB"


def _allocator_line(allocator: Mapping[str, Any]) -> str:
    return (
        f"Allocator {allocator['backend']}: {amount(allocator['allocated_bytes'])} allocated, "
        f"{amount(allocator['reserved_bytes'])} reserved, largest free block "
        f"{amount(allocator['largest_free_block_bytes'])}, free between live blocks "
        f"{amount(allocator['inactive_split_bytes'])}"
    )


def _model_line(model: Mapping[str, Any]) -> str:
    words = [f"{model['label']}: {amount(model['bytes'])}"]
    if model["file"]:
        words.append(f"file {model['file']}")
    words.append(f"{amount(model['resident_bytes'])} on {model['device']}")
    words.append(f"{amount(model['ram_bytes'])} in RAM")
    words.append(f"{amount(model['pinned_bytes'])} pinned")
    if model["shared_with"]:
        words.append(f"shared by {model['shared_with'] + 1} nodes")
    if model["duplicate_of"]:
        words.append(f"a second copy of {model['duplicate_of']}")
    return ", ".join(words)
