"""Which weight_dtype suits a file and a machine, and why: rules over plain facts.

Sizes decide, and whether the card has kernels for a format. With dynamic VRAM ComfyUI streams what
the card cannot hold from RAM (fp8 on 12 GB: 0.82 s a step, with 32 GB of RAM 0.83 to 1.11, on a
card that holds it 0.73), so a small card alone is no reason to lose precision; RAM that cannot
hold the weights is: they are then read from disk again in every step. The order is by loss: as the
file is, 8 bit, 4 bit, and 4 bit in every layer. Seconds: RESULTS.md, "Quantised loading".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .checkpoint import TEXT_ENCODER, TRANSFORMER
from .format_support import (
    CPU,
    CUDA,
    HOPPER,
    MPS,
    PLAIN_TORCH,
    ROCM,
    XPU,
    Machine,
    has_kernels,
    obstacle,
    slowness,
)
from .quantization import BITSANDBYTES, COMFY_KITCHEN, FORMATS
from .units import size_text

FP8_DEVICES = (CUDA, ROCM, XPU, CPU)  # that hold fp8 (comfy.model_management.supports_cast)
FP8_SCALED = "fp8_scaled"  # with a scale beside each weight, as most fp8 files have it
PLAIN_FP8 = ("fp8_e4m3fn", "fp8_e5m2")
FP8 = (*PLAIN_FP8, FP8_SCALED)
FLOATS = ("bf16", "fp16", "fp32", "fp64", *FP8)  # what can be quantised at load
# fp16 overflows in this model.
PLAIN = {"bf16": "bf16", "fp16": "bf16", "fp32": "bf16", "fp64": "bf16"}
SMALLEST = "smallest"  # the preset that auto takes by itself where nothing else has room
# Against bf16, on an H200 that holds both: benchmarks/RESULTS.md.
INT8_COST = "10 % of a step's time"
# Bytes. The transformer and the text encoder take turns, so each leaves room for the other as
# people load it: in fp8, of the official size.
OTHER = {TRANSFORMER: 7_750_000_000, TEXT_ENCODER: 20_430_000_000}
# What ComfyUI sets aside for 1328x1328 with CFG: memory_required and minimum_inference_memory.
WORKING = 3_200_000_000
SLACK = 2_000_000_000  # the largest layer in fp32 while it is quantised, and Python's own


@dataclass(frozen=True)
class File:
    """A model file, as its header tells it."""

    kind: str  # core.checkpoint.TRANSFORMER or TEXT_ENCODER
    dtype: str  # one of FLOATS, or the format that it is quantised in
    bytes: int
    parameters: int
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes by format, if quantised at load
    smallest: Mapping[str, int] = field(default_factory=dict)  # the same by the preset smallest

    @property
    def short(self) -> str:
        """The dtype as people say it: fp8."""
        return "fp8" if self.dtype in FP8 else self.dtype


@dataclass(frozen=True)
class Choice:
    """A weight_dtype of the host or a name of core.quantization.FORMATS, and the reason.

    `preset`: the one to take in place of the user's; None: the user's.
    """

    weight_dtype: str
    why: str
    preset: str | None = None


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else size_text(size)


# ------------------------------------------------------------------------------------ what has room
def kept(file: File, machine: Machine) -> tuple[str, int]:
    """The weight_dtype that leaves a file as it is, and the bytes that have to stay in memory."""
    known = machine.device in (*FP8_DEVICES, MPS)
    if file.dtype == "fp64" and file.kind == TEXT_ENCODER:
        return "fp32", 4 * file.parameters
    if file.dtype not in PLAIN or file.kind == TEXT_ENCODER or not known:
        return (file.dtype if in_own_fp8(file, machine) else "default"), file.bytes
    # Dynamic VRAM reads the file's own weights again and casts them at each use.
    return PLAIN[file.dtype], file.bytes if machine.dynamic_vram else 2 * file.parameters


def in_own_fp8(file: File, machine: Machine) -> bool:
    """Whether plain fp8 is better named than left to ComfyUI's default: unless the card holds both
    models. The weights are the same, but LoRAs are then added while it computes.

    By default ComfyUI merges a LoRA once into a weight that stays in VRAM, but at each use into one
    that is streamed, which takes longer than to add it. Where nothing moves, merging is faster; on
    24 GB for known prompts alone, too. Measured on 8, 12 and 24 GB of an H200 with dynamic VRAM,
    and assumed elsewhere. On a CPU the default is fp32, four times as large; it has no VRAM here,
    so it never holds both.
    """
    plain = file.dtype in PLAIN_FP8 and file.kind == TRANSFORMER
    both = file.bytes + OTHER[file.kind]
    return plain and machine.device in FP8_DEVICES and not on_card(both, machine)


def has_room(size: int, file: File, machine: Machine, from_file: bool, alone: bool) -> bool:
    """Whether memory holds `size` bytes of weights, so that no step reads the disk.

    `from_file`: they are the file's, so RAM need not hold them where the card does as a whole: a
    pinned copy is given up when RAM is short, as far as ComfyUI can tell. Card and RAM do not add
    up: with 12 + 16 GB the fp8 file's 20.4 GB were read from disk in every step. `alone`: without
    room for the other model, which is then read again for a new prompt.
    """
    need = size
    if machine.dynamic_vram and machine.pins_blindly:
        need = size if from_file else 2 * size  # a pinned copy of all weights, never given up
    elif from_file and on_card(size, machine):
        straight = machine.dynamic_vram or machine.vram_free > machine.ram_free
        need = 0 if straight else size  # ComfyUI then loads straight into the card
    return need + (SLACK if alone else OTHER[file.kind]) <= machine.ram_free


def on_card(size: int, machine: Machine) -> bool:
    """Whether the card holds the weights and computes beside them."""
    return size + WORKING <= machine.vram_free


# ------------------------------------------------------------------------------------------- rules
class _Made(NamedTuple):
    """What could be made of a file."""

    format: str
    size: int  # bytes
    preset: str | None = None

    def choice(self, why: str) -> Choice:
        """This, and why."""
        by = f", preset {self.preset}" if self.preset else ""
        return Choice(self.format, f"{self.format}{by} ({_gb(self.size)}){why}", self.preset)


@dataclass(frozen=True)
class _Case:
    """One question: a file on a machine."""

    file: File
    machine: Machine

    @property
    def keep(self) -> str:
        """The weight_dtype that leaves the file as it is."""
        return kept(self.file, self.machine)[0]

    @property
    def keep_bytes(self) -> int:
        """What then has to stay in memory."""
        return kept(self.file, self.machine)[1]

    def kept_in(self, alone: bool) -> bool:
        """Whether memory holds that."""
        return has_room(self.keep_bytes, self.file, self.machine, True, alone)

    def candidates(self, bits: int) -> list[_Made]:
        """What could be made of the file in so many bits, the best first."""
        # More of a step than bf16, on an H200: int8 10 %, bnb_int8 20 %; w4a8 19 to 30 %, nf4 11 %.
        names = ("w4a8", "bnb_nf4") if bits == 4 else ("int8", PLAIN_TORCH)
        found = [_Made(f, self.file.sizes[f]) for f in names if f in self.file.sizes]
        return [made for made in found if self._good(made.format)]

    def smallest(self) -> list[_Made]:
        """The same in 4 bit with the preset smallest: nf4 is what was measured."""
        sizes = self.file.smallest
        found = [_Made(f, sizes[f], SMALLEST) for f in ("bnb_nf4", "w4a8") if f in sizes]
        return [made for made in found if self._good(made.format)]

    def _good(self, format: str) -> bool:
        """A text encoder computes in full precision: the kernels make no difference there."""
        if obstacle(format, self.machine):
            return False
        ours = FORMATS[format].package == BITSANDBYTES
        return ours or self.file.kind == TEXT_ENCODER or has_kernels(format, self.machine)

    def first(self, options: list[_Made], alone: bool) -> _Made | None:
        """The first that is smaller than the file and has room."""
        smaller = (made for made in options if made.size < 0.99 * self.file.bytes)
        return next((m for m in smaller if self.holds(m, alone)), None)

    def holds(self, made: _Made, alone: bool) -> bool:
        """Whether memory holds what was quantised at load, once."""
        return has_room(made.size, self.file, self.machine, False, alone)


Rule = Callable[[_Case], Choice | None]


def _already(case: _Case) -> Choice | None:
    """What is quantised is never quantised again."""
    if case.file.dtype in FLOATS:
        return None
    size = _gb(case.file.bytes)
    return Choice("default", f"the file is quantised ({case.file.dtype}, {size}): kept as it is")


def _no_fp8(case: _Case) -> Choice | None:
    """A Mac's GPU cannot even hold fp8: as bf16, which is exact, or 8 bit, which is smaller."""
    file, machine = case.file, case.machine
    if file.dtype not in FP8 or machine.device != MPS:
        return None
    wide = 2 * file.parameters
    able = file.dtype != FP8_SCALED and file.kind == TRANSFORMER
    if able and has_room(wide, file, machine, True, False):
        return Choice("bf16", f"as bf16 ({_gb(wide)}), since {_NO_FP8}")
    found = [*case.candidates(8), *case.candidates(4), *case.smallest()]
    made = next((made for made in found if case.holds(made, alone=True)), found[-1])
    room = case.holds(made, alone=True)
    then = "" if room else "; the RAM does not hold it: the system will swap"
    return made.choice(f", since {_NO_FP8}{then}")


_NO_FP8 = "this device holds no fp8"


def _keep(case: _Case) -> Choice | None:
    """The best is what the file has, where memory holds both models."""
    if not case.kept_in(alone=False):
        return None
    machine, size = case.machine, case.keep_bytes
    eight = case.first(case.candidates(8), alone=False)
    if machine.device in (CPU, MPS):
        return Choice(case.keep, f"{_kept(case)}: the RAM holds its {_gb(size)}{_loras(case)}")
    if on_card(size, machine):
        why = f"the card holds its {_gb(size)}{_loras(case)}{_untried(case)}"
        return Choice(case.keep, f"{_kept(case)}: {why}")
    if not machine.dynamic_vram and eight and on_card(eight.size, machine):
        why = "the card holds it as a whole, and has no dynamic VRAM to stream the file's"
        return eight.choice(f": {why} {_gb(size)}")
    how = "streamed from the RAM" if machine.dynamic_vram else "in part moved at each use"
    why = f"{how}{_slower(case)}{_loras(case)}; {_int8(case, size)}{_untried(case)}"
    return Choice(case.keep, f"{_kept(case)} ({_gb(size)}), {why}")


def _int8(case: _Case, size: int) -> str:
    """What it would save and cost: the question that people ask."""
    saved = size - case.file.sizes.get("int8", size)
    less = _gb(saved) if saved > 0.01 * size else "nothing"
    hopper = case.file.kind == TRANSFORMER and case.machine.capability == HOPPER
    cost = f" and cost {INT8_COST}" if hopper and case.file.short == "bf16" else ""
    return f"int8 would save {less}{cost}"


def _untried(case: _Case) -> str:
    """RTX 20 has no bf16, but int8 units. No card of consumers was at hand to time it on, and on
    the one that was int8 is slower than bf16: so that is no reason to take it."""
    turing = case.machine.capability == (7, 5) and has_kernels("int8", case.machine)
    if case.file.kind != TRANSFORMER or not turing:
        return ""
    return "; this card computes in fp32, with int8 in int8: whether faster was not measured"


def _eight_bit(case: _Case) -> Choice | None:
    """Half of bf16 for an error below fp8's."""
    return _smaller(case, 8, alone=False)


def _keep_alone(case: _Case) -> Choice | None:
    """Reading the other model again for a new prompt costs less than bits."""
    if not case.kept_in(alone=True):
        return None
    size = _gb(case.keep_bytes)
    why = f"the RAM holds its {size}, but not both models"
    if on_card(case.keep_bytes, case.machine):
        why = f"the card holds its {size}, but the RAM not the other model"
    return Choice(case.keep, f"{_kept(case)}: {why}, {_READ}{_slower(case)}{_loras(case)}")


_READ = "so a new prompt reads the disk"


def _eight_bit_alone(case: _Case) -> Choice | None:
    return _smaller(case, 8, alone=True)


def _four_bit(case: _Case) -> Choice | None:
    """With a loss that can be seen, but the alternative is the disk in every step."""
    return _smaller(case, 4, alone=False) or _smaller(case, 4, alone=True)


def _smallest(case: _Case) -> Choice | None:
    """With more loss. 12 GB of VRAM, 16 GB of RAM: 0.7 s a step, the fp8 file 1.8 and more."""
    if (made := case.first(case.smallest(), alone=True)) is None:
        return None
    slow = slowness(made.format, case.machine)
    why = f": the RAM has room for nothing larger; with the file's {_gb(case.keep_bytes)} {{}}"
    would = "every step would read the disk" if case.machine.dynamic_vram else "it would swap"
    return made.choice(why.format(would) + (f"; {slow}" if slow else ""))


def _from_disk(case: _Case) -> Choice:
    """Nothing has room that runs here."""
    then = "every step reads the disk" if case.machine.dynamic_vram else "the system will swap"
    why = f"the RAM does not hold its {_gb(case.keep_bytes)}, so {then}"
    return Choice(case.keep, f"{_kept(case)}: {why}{_loras(case)}; {_advice(case)}")


RULES: tuple[Rule, ...] = (
    _already,
    _no_fp8,
    _keep,
    _eight_bit,
    _keep_alone,
    _eight_bit_alone,
    _four_bit,
    _smallest,
    _from_disk,
)


def choose(file: File, machine: Machine) -> Choice:
    """The best weight_dtype for this file on this machine: the first rule that has an answer."""
    case = _Case(file, machine)
    choice = next(found for rule in RULES if (found := rule(case)) is not None)
    return replace(choice, why=f"auto: {file.short} file, {machine.title}: {choice.why}")


def _smaller(case: _Case, bits: int, alone: bool) -> Choice | None:
    made = case.first(case.candidates(bits), alone)
    if made is None:
        return None
    other = "diffusion model" if case.file.kind == TEXT_ENCODER else "text encoder"
    beside = f" beside a {other}" if case.kept_in(alone=True) else ""
    why = [f"the RAM does not hold the file's {_gb(case.keep_bytes)}{beside}"]
    why += [f"and has no room for both models, {_READ}"] if alone else []
    why += [unpinned] if (unpinned := _unpinned(case, made.size)) else []
    why += [slow] if (slow := slowness(made.format, case.machine)) else []
    return made.choice(f": {'; '.join(why)}")


def _unpinned(case: _Case, size: int) -> str:
    """What was quantised at load lies in RAM a second time, pinned, to be streamed fast. Under
    pressure ComfyUI gives that copy up: int8 with 12 GB of VRAM and 32 GB of RAM took 1.6 to 2.3 s
    a step, the fp8 file 0.83 to 1.11 there; with much RAM a file of int8 took 0.92 to 1.28."""
    machine = case.machine
    pins = machine.dynamic_vram and not machine.pins_blindly and not on_card(size, machine)
    if not pins:
        return ""
    if 2 * size + SLACK > machine.ram_free:
        fp8_fits = case.file.dtype in PLAIN and size >= case.file.parameters
        than = " than the fp8 file would" if fp8_fits else ""
        return f"too little RAM to pin it all, so it streams slower{than}"
    return _beyond_the_limit(machine, size)


def _slower(case: _Case) -> str:
    """What is said of a file that is kept and streams."""
    said = _beyond_the_limit(case.machine, case.keep_bytes)
    return f"; {said}" if said else ""


def _beyond_the_limit(machine: Machine, size: int) -> str:
    """If more streams than ComfyUI may pin, it gives up pins and renews them in every pass.

    Of less nothing is renewed in steady steps: see nodes/pinning.py. With 25.6 GiB to
    pin bf16 on 12 GB took 1.8 s a step, by stock's loader 2.7, and 1.4 with all of it pinned.
    """
    most, streamed = machine.pinnable, size - max(0, machine.vram_free - WORKING)
    if not machine.dynamic_vram or most is None or streamed <= most:
        return ""
    return f"ComfyUI pins at most {_gb(most)} of RAM here, so it may stream slower"


def _kept(case: _Case) -> str:
    """bf16 for an fp16 file is what ComfyUI takes for this model too, where the card has it."""
    name = case.file.short if case.keep == "default" else case.keep.split("_")[0]
    return f"kept as {name}" if name == case.file.short else f"converted to {name}"


def _loras(case: _Case) -> str:
    """What naming fp8 changes beside ComfyUI's default: nothing where no LoRA is on."""
    return "; LoRAs added as it computes" if case.keep in PLAIN_FP8 else ""


def _advice(case: _Case) -> str:
    """What the user could do that a choice of weight_dtype cannot."""
    file, machine = case.file, case.machine
    if machine.pins_blindly:
        return "in this container start ComfyUI with --disable-pinned-memory"
    everything = replace(machine, packages=machine.packages | {BITSANDBYTES, COMFY_KITCHEN})
    could = _Case(file, everything)
    if made := could.first([*could.candidates(4), *could.smallest()], alone=True):
        by = f" with the preset {made.preset}" if made.preset else ""
        get = obstacle(made.format, machine).removeprefix(f"{made.format} ").removesuffix(".")
        return f"{made.format}{by} ({_gb(made.size)}) would fit, but {get}"
    if file.dtype in PLAIN and machine.device in FP8_DEVICES:
        return "take the fp8 file, half as large"
    return "close other programs, or add RAM"
