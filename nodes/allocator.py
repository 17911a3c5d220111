"""The doctor of PyTorch's memory allocator: looks at this process, and may change what it can."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import comfy.memory_management
import comfy.model_management
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ..core import allocator, allocator_doctor
from ..core.allocator import NATIVE, Machine, Origin
from ..core.allocator_doctor import Diagnosis, Observed
from .settings import FILE
from .status import shown


def diagnosis() -> Diagnosis:
    """What the allocator of this process does, and what to do about it. Any thread may ask."""
    return allocator_doctor.diagnose(observe())


def observe() -> Observed:
    """Everything that this process tells about its allocator."""
    machine = Machine(torch.__version__, platform.system(), args.cpu)
    variable, text = _read_by_torch(machine)
    marker = allocator.read_marker(os.environ)
    choice, problems = _chosen()
    device, why = _device(machine)
    seen = Observed(
        machine=machine,
        device=torch.cuda.get_device_name(device) if device is not None else "",
        backend=_backend(machine),
        text=text,
        variable=variable,
        origin=marker.origin if marker else Origin(),
        added=marker.added if marker else {},
        notes=marker.notes if marker else (),
        choice=choice,
        problems=tuple(problems),
        shadowed=allocator_doctor.shadowed(os.environ, machine.amd),
        dynamic_vram=comfy.memory_management.aimdo_enabled,
        why=why,
    )
    return _measured(seen, device)


def _read_by_torch(machine: Machine) -> tuple[str, str]:
    """The variable that PyTorch reads, and its text; empty if there is none."""
    names = [n for n in allocator.VARIABLES if machine.amd or n != allocator.AMD_VARIABLE]
    variable = next((n for n in names if n in os.environ), "")
    return variable, os.environ.get(variable, "")


def _chosen() -> tuple[dict[str, str], list[str]]:
    """What ComfyUI's settings say now; nothing with several users, as at the start."""
    if args.multi_user:
        return {}, []
    path = os.path.join(folder_paths.get_user_directory(), "default", FILE)
    settings, problem = allocator.read_settings(path)
    choice, problems = allocator.choice_of(settings)
    return choice, problems + ([f"{FILE} cannot be read ({problem})"] if problem else [])


def _device(machine: Machine) -> tuple[torch.device | None, str]:
    """The GPU that PyTorch's allocator serves, or None and why there is none."""
    if reason := machine.reason_for_nothing():
        return None, reason
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda":
        return None, f"ComfyUI computes on {device.type}"
    return device, ""


def _backend(machine: Machine) -> str | None:
    """By PyTorch itself; None where it is not built for such a GPU."""
    built = torch.backends.cuda.is_built()
    return torch.cuda.get_allocator_backend() if built else None


def _measured(seen: Observed, device: torch.device | None) -> Observed:
    """The same with what PyTorch tells of its options and blocks."""
    if device is None:
        return seen
    if seen.backend != NATIVE:
        return seen._replace(why=f"{seen.backend} keeps no account of its blocks")
    stats = torch.cuda.memory_stats(device)
    sizes = [stats[f"{kind}_bytes.all.current"] for kind in ("reserved", "allocated")]
    seen = seen._replace(sizes=(*sizes, stats["inactive_split_bytes.all.current"]))
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.8
    if fraction is not None:
        seen = seen._replace(fraction=fraction(device))
    read = _options()
    if read is None:
        return seen._replace(why="this PyTorch does not tell its options")
    return seen._replace(read=read, text=read.get(allocator.VARIABLE, seen.text))


def _options() -> Mapping[str, Any] | None:
    """PyTorch's own account of its options: beside a snapshot of its blocks, native only."""
    try:
        return torch.cuda.memory._snapshot()["allocator_settings"]
    except (AttributeError, KeyError):  # no public function gives them
        return None


# --------------------------------------------------------------------------------------- applying
def apply_choice(seen: Observed) -> str:
    """Give the running process the options chosen in the settings, and say what is in effect."""
    if not seen.choice:
        return "Nothing to apply: nothing is chosen in ComfyUI's settings, Qwen VRAM."
    setter = _setter()
    if seen.read is None or setter is None:
        return f"Nothing can be applied in the running process: {seen.why or 'no way to do so'}."
    text = allocator_doctor.text_to_apply(seen)
    try:
        setter(text)
    except (ValueError, RuntimeError) as error:  # an option from outside, of another version
        setter(seen.text)
        return f"PyTorch refused {text}: {str(error).splitlines()[0]}"
    read = _options() or {}
    lines = []
    for name, value in seen.choice.items():
        if name == "backend":
            needs = "in use" if value == seen.backend else "needs a restart"
            lines.append(f"backend:{value} {needs}")
        else:
            taken = allocator_doctor.is_in_effect(name, value, read)
            lines.append(f"{name}:{value} {'applied' if taken else 'not taken over'}")
    return f"In the running process: {', '.join(lines)}."


def _setter() -> Callable[[str], None] | None:
    """PyTorch's function that reads an allocator string again; it has no public one."""
    new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.9
    return new or getattr(torch.cuda.memory, "_set_allocator_settings", None)


class AllocatorDoctor(io.ComfyNode):
    """Say what the memory allocator does here, and what its options are worth."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMAllocator.md."""
        return io.Schema(
            node_id="QwenVRAMAllocator",
            display_name="Allocator Doctor (Qwen VRAM)",
            category="Qwen VRAM/memory",
            description=(
                "Says which memory allocator PyTorch uses on the GPU, which of its options are "
                "live, ignored or harmful here, and what to do. It changes nothing unless asked."
            ),
            search_aliases=[
                *("fragmentation", "max_split_size_mb", "expandable_segments", "cudaMallocAsync"),
                *("PYTORCH_CUDA_ALLOC_CONF", "out of memory"),
            ],
            inputs=[
                io.Boolean.Input(
                    "apply_now",
                    default=False,
                    tooltip=(
                        "Give the running process the options from ComfyUI's settings, as far as "
                        "PyTorch can take them over without a restart, until ComfyUI ends."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Never the same: the process changes beside the graph."""
        return float("nan")

    @classmethod
    def execute(cls, apply_now: bool) -> io.NodeOutput:
        """Apply if asked, then look, and tell."""
        applied = apply_choice(observe()) if apply_now else ""
        found = diagnosis()
        report = "\n".join(filter(None, [applied, allocator_doctor.text_of(found)]))
        line = " · ".join(filter(None, [applied, allocator_doctor.status_of(found)]))
        states = {v.name: {"value": v.value, "state": v.state} for v in found.verdicts}
        return shown(report, text=line, report=report, backend=found.seen.backend, options=states)


NODES = [AllocatorDoctor]
