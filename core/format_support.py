"""Which format runs on which machine, and which of them fast: facts of cards and packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .quantization import BITSANDBYTES, COMFY_KITCHEN, FORMATS, fits

CUDA, ROCM, MPS, XPU, CPU = "cuda", "rocm", "mps", "xpu", "cpu"
HIP_KERNELS = "comfy-kitchen for ROCm"  # a package's name in Machine.packages

KERNELS = {"int8": (7, 5), "w4a8": (8, 0), "w4a4": (7, 5)}  # comfy-kitchen's, by capability
KERNELS_CUDA = (13,)  # ComfyUI switches them off below
HOPPER = (9, 0)
BITSANDBYTES_DEVICES = (CUDA, ROCM, XPU, MPS, CPU)  # the builds and backends that 0.50 has
PLAIN_TORCH = "bnb_int8"  # the format that needs no package and no kernels


@dataclass(frozen=True)
class Machine:
    """Where a model is to run. Bytes throughout."""

    device: str  # cuda, rocm, mps, xpu, cpu, or another of torch's names
    name: str  # of the card
    capability: tuple[int, int] | None  # NVIDIA's compute capability
    cuda: tuple[int, ...] | None  # version of CUDA that torch was built for
    vram_total: int  # 0: the device has no memory of its own
    vram_free: int  # for ComfyUI: what other programs leave
    ram_total: int
    ram_free: int  # for ComfyUI: what other programs leave
    dynamic_vram: bool
    packages: frozenset[str]  # of bitsandbytes, comfy-kitchen, HIP_KERNELS
    pins_blindly: bool = False  # in a container whose limit ComfyUI does not see: see has_room
    pinnable: int | None = None  # what ComfyUI pins at most; None: no limit, or pinning is off
    broken: Mapping[str, str] = field(default_factory=dict)  # sentences of packages, by format

    @property
    def title(self) -> str:
        """The card as people name it, and what decides: "RTX 4070, free: 11.0 GB VRAM, 31.1 GB
        RAM", in the unit of file sizes (a card of 12 GB has 12.9 of them)."""
        name = self.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        vram = f"{self.vram_free / 1e9:.1f} GB VRAM, " if self.vram_total else ""
        return f"{name}, free: {vram}{self.ram_free / 1e9:.1f} GB RAM"


def has_kernels(format: str, machine: Machine) -> bool:
    """Whether the host's fast kernels for a format of its own run on this card."""
    if machine.device == ROCM:
        return HIP_KERNELS in machine.packages
    return (
        machine.device == CUDA
        and COMFY_KITCHEN in machine.packages
        and (machine.cuda or ()) >= KERNELS_CUDA
        and (machine.capability or ()) >= KERNELS[format]
    )


def obstacle(format: str, machine: Machine) -> str:
    """Why a format of FORMATS cannot run here, as a sentence with the remedy; "" where it can."""
    where = machine.name
    if format == PLAIN_TORCH:
        return ""
    if FORMATS[format].package == BITSANDBYTES:
        if BITSANDBYTES not in machine.packages:
            return machine.broken.get(format) or (
                f"{format} needs the package bitsandbytes: `pip install bitsandbytes` with the "
                "Python that runs ComfyUI, then restart it."
            )
        if machine.device not in BITSANDBYTES_DEVICES:
            return f"bitsandbytes does not run on {where}; choose default, or device cpu."
        return ""
    if COMFY_KITCHEN not in machine.packages:
        return machine.broken.get(format) or (
            f"{format} needs comfy-kitchen: install ComfyUI's requirements.txt again."
        )
    if machine.device == CUDA and (machine.capability or (0, 0)) < KERNELS["int8"]:
        has = ".".join(map(str, machine.capability or ("unknown",)))
        return (
            f"{format} needs a card of compute capability 7.5 (RTX 20) or newer; {where} has "
            f"{has}. Choose default, or bnb_nf4."
        )
    if machine.device not in (CUDA, ROCM, CPU, XPU):
        return f"{format} does not run on {where}; choose default, or bnb_nf4."
    return ""


def slowness(format: str, machine: Machine) -> str:
    """What makes a format that runs here slow; "" where nothing does, or it is not known."""
    if format == PLAIN_TORCH:
        return ""
    if FORMATS[format].package == BITSANDBYTES:
        return "" if machine.device in (CUDA, ROCM) else f"slow: no kernels for {machine.name}"
    if machine.device == CUDA and (machine.cuda or ()) < KERNELS_CUDA:
        built = ".".join(map(str, machine.cuda or ("?",)))
        return f"slow: ComfyUI's kernels need PyTorch for CUDA 13, and this one is for CUDA {built}"
    return "" if has_kernels(format, machine) else f"slow: no kernels for {machine.name}"


def int4_for(capability: tuple[int, int] | None, shapes: Iterable[Sequence[int]]) -> str:
    """Which of the host's 4-bit formats suits a card: "w4a8" or "w4a4".

    w4a8 loses less (7 % of the weights' norm against 13 %), but its kernels begin with RTX 30.
    """
    turing = capability is not None and KERNELS["w4a4"] <= capability < KERNELS["w4a8"]
    return "w4a4" if turing and any(fits("w4a4", shape) for shape in shapes) else "w4a8"
