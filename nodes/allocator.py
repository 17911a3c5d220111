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

_options_read: dict[str, Mapping[str, Any] | None] = {}  # as they were when last asked for


def diagnosis() -> Diagnosis:
    """What the allocator of this process does, and what to do about it. Any thread may ask."""
    return allocator_doctor.diagnose(observe())


def for_the_report() -> tuple[tuple[allocator_doctor.Finding, ...], str | None]:
    """What stands out, and how cudaMallocAsync would be had (see against_fragments).

    Asked for each second: PyTorch's options are those that it last told the doctor, since telling
    them takes a snapshot of all blocks, and what is chosen in the settings is not read.
    """
    seen = observe(quick=True)
    return allocator_doctor.diagnose(seen).findings, allocator_doctor.against_fragments(seen)


def observe(quick: bool = False) -> Observed:
    """Everything that this process tells about its allocator; `quick`: see for_the_report."""
    built = allocator.HIP if torch.version.hip else allocator.CUDA if torch.version.cuda else ""
    machine = Machine(built, platform.system(), args.cpu)
    variable, text = _read_by_torch(machine)
    marker = allocator.read_marker(os.environ)
    choice, problems = ({}, []) if quick else _chosen()
    devices, why = _devices(machine)
    seen = Observed(
        machine=machine,
        device=", ".join(f"{d} {torch.cuda.get_device_name(d)}" for d in devices),
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
        flag=NATIVE if args.disable_cuda_malloc else "",
    )
    return _measured(seen, devices, quick)


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


def _devices(machine: Machine) -> tuple[list[torch.device], str]:
    """The GPUs that PyTorch's allocator serves for ComfyUI; if there is none, why."""
    if reason := machine.reason_for_nothing():
        return [], reason
    every = comfy.model_management.get_all_torch_devices()
    found = [device for device in every if device.type == "cuda"]
    kind = comfy.model_management.get_torch_device().type
    return found, "" if found else f"ComfyUI computes on {kind}"


def _backend(machine: Machine) -> str | None:
    """By PyTorch itself; None where it is not built for such a GPU."""
    built = torch.backends.cuda.is_built()
    return torch.cuda.get_allocator_backend() if built else None


def _measured(seen: Observed, devices: list[torch.device], quick: bool) -> Observed:
    """The same with what PyTorch tells of its options and blocks."""
    if not devices:
        return seen
    if seen.backend != NATIVE:
        return seen._replace(why=f"{seen.backend} keeps no account of its blocks")
    kinds = ("reserved_bytes", "allocated_bytes", "inactive_split_bytes")
    stats = {device: torch.cuda.memory_stats(device) for device in devices}
    sizes = [(str(d), *(found[f"{k}.all.current"] for k in kinds)) for d, found in stats.items()]
    seen = seen._replace(sizes=tuple(sizes))
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.8
    if fraction is not None:
        seen = seen._replace(fraction=min(map(fraction, devices)))
    read = _options_read["now"] if quick and _options_read else _options()
    if read is None:
        return seen._replace(why="this PyTorch does not tell its options")
    return seen._replace(read=read, text=read.get(allocator.VARIABLE, seen.text))


def _options() -> Mapping[str, Any] | None:
    """PyTorch's own account of its options: beside a snapshot of its blocks, native only."""
    try:
        read = torch.cuda.memory._snapshot()["allocator_settings"]
    except (AttributeError, KeyError):  # no public function gives them
        read = None
    _options_read["now"] = read
    return read


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
