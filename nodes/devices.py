"""How full each device is: the driver's figures, by NVML where there is one, and by psutil."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import psutil
import torch

from . import nvml

PRIVATE = ("RssAnon", "RssShmem")  # lines of /proc/self/status, in KiB


class DeviceMemory(NamedTuple):
    """Bytes in use on one device; None is not measurable, and `why` says for which reason.

    `used_bytes` is what all processes take, `own_bytes` what this one takes by the driver's count,
    `other_bytes` the difference. The RAM counts as used where the system cannot hand it out
    without swapping; a file that is merely mapped or cached is not in use.
    """

    device: str
    name: str
    kind: str
    total_bytes: int | None
    used_bytes: int | None
    own_bytes: int | None
    other_bytes: int | None
    why: Mapping[str, str]


class _Used(NamedTuple):
    """Figures of a device, and why some of them are None."""

    total: int | None
    used: int | None
    own: int | None
    why: dict[str, str]


def devices() -> list[torch.device]:
    """Every device that ComfyUI uses, the RAM (cpu) last."""
    found = [torch.device(d) for d in comfy.model_management.get_all_torch_devices()]
    return [d for d in found if d.type != "cpu"] + [torch.device("cpu")]


def short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def device_memory(device: torch.device) -> DeviceMemory:
    """The figures of one device, now. Takes about a millisecond; any thread may ask.

    A device that fails has none, with its error as the reason.
    """
    measure = {"cpu": _ram, "cuda": _cuda, "xpu": _xpu, "mps": _mps}.get(device.type, _other)
    try:
        total, used, own, why = measure(device)
    except Exception as error:  # a driver that is broken, or lost its card: whatever torch raises
        why = dict.fromkeys(
            ("total_bytes", "used_bytes", "own_bytes"), f"it fails: {short(error)}."
        )
        total = used = own = None
    other = None
    if used is None or own is None:
        why = {"other_bytes": why.get("own_bytes") or why.get("used_bytes", ""), **why}
    elif own > used:
        why = {**why, "other_bytes": "the driver counts more for this process than for all."}
    else:
        other = used - own
    return DeviceMemory(str(device), _name(device), device.type, total, used, own, other, why)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "RAM"
    if device.type in ("cuda", "xpu"):
        try:
            return getattr(torch, device.type).get_device_name(device)
        except Exception:  # as above, where the reason is told
            return device.type
    return device.type


def _ram(device: torch.device) -> _Used:
    memory = psutil.virtual_memory()
    return _Used(memory.total, memory.total - memory.available, _own_ram(), {})


def _own_ram() -> int:
    """What this process holds and the system cannot drop: no file that is only mapped.

    Weights that are mapped from a safetensors file count as resident, but they are the file's
    cache. Linux tells them apart (man proc_pid_status); elsewhere it is the resident set.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    lines = (line.split() for line in status.read_text(errors="replace").splitlines())
    sizes = {line[0].rstrip(":"): line[1] for line in lines if len(line) > 1}
    if not set(PRIVATE) <= sizes.keys():  # a kernel before 4.5, or a sandbox
        return psutil.Process().memory_info().rss
    return sum(int(sizes[name]) * 1024 for name in PRIVATE)


def _cuda(device: torch.device) -> _Used:
    """NVIDIA by NVML, else, and for AMD, by the runtime."""
    if not torch._C._cuda_hasPrimaryContext(device.index or 0):  # no public function tells
        return _cuda_unused(device)
    free, total = torch.cuda.mem_get_info(device)
    usual = _Used(total, total - free, None, {})
    if torch.version.hip:
        return usual._replace(why={"own_bytes": "the ROCm runtime tells no figure of one process."})
    try:
        handle = nvml.handle(device, total)
        seen = nvml.memory(handle)
        usual = usual._replace(total=seen.used + seen.free, used=seen.used)
        return usual._replace(own=nvml.own(handle, torch.cuda.memory_reserved(device)))
    except nvml.Unknown as reason:
        return usual._replace(why={"own_bytes": str(reason)})


def _cuda_unused(device: torch.device) -> _Used:
    """A card that this process has not used: the runtime would take half a GB of it to answer."""
    total = torch.cuda.get_device_properties(device).total_memory
    why = "ComfyUI does not use this card, and asking the CUDA runtime would take memory of it"
    if torch.version.hip:
        return _Used(total, None, 0, {"used_bytes": f"{why}."})
    try:
        seen = nvml.memory(nvml.handle(device, total))
    except nvml.Unknown as reason:
        return _Used(total, None, 0, {"used_bytes": f"{why}; {reason}"})
    return _Used(seen.used + seen.free, seen.used, 0, {})


def _mps(device: torch.device) -> _Used:
    """The RAM, which Apple's GPU shares."""
    total, used, _, _ = _ram(device)
    return _Used(total, used, torch.mps.driver_allocated_memory(), {})


def _xpu(device: torch.device) -> _Used:
    """Intel's runtime tells what is free on some cards only."""
    why = {"own_bytes": "Intel's driver tells no figure of one process."}
    try:
        free, total = torch.xpu.mem_get_info(device)
    except (AttributeError, RuntimeError):  # an older torch, a driver without it
        why["used_bytes"] = "Intel's driver does not tell what is free on this card."
        return _Used(torch.xpu.get_device_properties(device).total_memory, None, None, why)
    return _Used(total, total - free, None, why)


def _other(device: torch.device) -> _Used:
    """As far as ComfyUI knows it: what is free to the driver, without what torch keeps."""
    if comfy.model_management.directml_enabled:
        why = "DirectML tells nothing of its memory."
        return _Used(
            None, None, None, dict.fromkeys(("total_bytes", "used_bytes", "own_bytes"), why)
        )
    total = int(comfy.model_management.get_total_memory(device))
    free, in_torch = comfy.model_management.get_free_memory(device, torch_free_too=True)
    why = f"the driver of {device.type} does not tell what one process takes."
    return _Used(total, int(total - (free - in_torch)), None, {"own_bytes": why})
