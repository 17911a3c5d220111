"""The options of PyTorch's GPU memory allocator: read, check and merge them. Standard library only.

prestartup_script.py runs this file by its path before torch is imported. What is said here of
PyTorch holds for 2.11, by its headers (c10/core/AllocatorConfig.h, c10/cuda/CUDAAllocatorConfig.h)
and by trying: it reads the first of VARIABLES that is set, and no other; an option that it does not
know, or a value that it cannot read, ends the process while torch is imported; of two backends the
first is taken, and then the first use of the GPU fails.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
GENERAL_VARIABLE = "PYTORCH_ALLOC_CONF"
AMD_VARIABLE = "PYTORCH_HIP_ALLOC_CONF"
VARIABLES = (VARIABLE, AMD_VARIABLE, GENERAL_VARIABLE)  # in PyTorch's order
MARKER = "QWEN_VRAM_ALLOCATOR"  # what we found and set, for the doctor and for a restart in place
NATIVE, ASYNC = "native", "cudaMallocAsync"
CUDA, HIP = "cuda", "hip"  # as torch/version.py names them
HOSTS_OWN = f"backend:{ASYNC}"  # as ComfyUI's cuda_malloc.py appends it
SETTING = "QwenVRAM.Allocator."
LEAVE = "leave as it is"
MOST_SETTINGS_BYTES = 32 << 20
_SWITCH = {"on": "True", "off": "False"}


class Option(NamedTuple):
    """One option: its setting in ComfyUI's dialog, and what there is to say about it."""

    setting: str
    values: str
    what: str
    measured: str


# Measured on one NVIDIA H200 held down to 23.5 GiB, without dynamic VRAM: 30 or 60 generations,
# 512 to 2048 pixels; see Fragmentation in benchmarks/RESULTS.md.
OPTIONS = {
    "backend": Option(
        "Backend",
        f"{NATIVE} or {ASYNC}",
        "native is PyTorch's own allocator; cudaMallocAsync is the one of NVIDIA's driver, "
        "which has none of the options below.",
        "without dynamic VRAM no difference in one run of 60 (73.8 s with native, 72.1 s with "
        "cudaMallocAsync), and 24 % slower with cudaMallocAsync in another of 30",
    ),
    "max_split_size_mb": Option(
        "MaxSplitSizeMB",
        "a whole number of MB from 21 to 1000000",
        "Blocks larger than this are not split for a smaller tensor, so that they stay whole for "
        "large ones. It is not a minimum size, and limits nothing else.",
        "128 changed nothing without dynamic VRAM",
    ),
    "expandable_segments": Option(
        "ExpandableSegments",
        "True or False",
        "Memory is taken in ranges that grow, instead of in pieces of fixed size. Linux only.",
        "slower with dynamic VRAM; without it as fast, and it reserved 1.3 GB less",
    ),
    "garbage_collection_threshold": Option(
        "GarbageCollectionThreshold",
        "a number between 0 and 1, such as 0.8",
        "Unused blocks are given back once this part of the memory is in use. PyTorch looks at it "
        "only in a process that has a memory fraction, and ComfyUI sets none.",
        "",
    ),
    "roundup_power2_divisions": Option(
        "RoundupPower2Divisions",
        "a power of two from 1 to 64, or a list such as [256:1,512:2,>:8] (sizes in MB)",
        "Sizes are rounded up to one of so many steps between two powers of two, so that a block "
        "fits again more often. With N steps up to 1/N more memory is taken.",
        "",
    ),
}


class Machine(NamedTuple):
    """What decides what can be live: what torch is built for, and platform.system()."""

    built: str  # CUDA, HIP, or "" for neither
    system: str
    cpu: bool = False  # ComfyUI runs with --cpu

    @property
    def amd(self) -> bool:
        """Whether torch is built for AMD cards."""
        return self.built == HIP

    def reason_for_nothing(self) -> str | None:
        """Why no option can have an effect here; None if one can."""
        if self.cpu:
            return "ComfyUI runs with --cpu"
        if not self.built:
            return "this PyTorch is not built for NVIDIA or AMD cards"
        return None

    def reason_against(self, name: str, value: str, backend: str) -> str | None:
        """Why an option would have no effect with that backend; None if it may have one."""
        if name == "backend":
            return f"{ASYNC} is for NVIDIA cards" if self.amd and value == ASYNC else None
        if backend == ASYNC:
            return f"{ASYNC} ignores it"
        if name == "expandable_segments" and self.system != "Linux":
            return "PyTorch has it on Linux only"
        return None


class Origin(NamedTuple):
    """What was set outside ComfyUI: in which variable ("" for none), and its text."""

    variable: str = ""
    text: str = ""


class Found(NamedTuple):
    """What the start finds. `flag` is the backend that the command line names, or ""."""

    variables: Mapping[str, str]
    host_added: bool
    flag: str
    machine: Machine


class Plan(NamedTuple):
    """What VARIABLE shall be (None: not set), and the backend if ComfyUI has to be told."""

    text: str | None
    backend: str | None
    origin: Origin
    added: Mapping[str, str]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------- text
def parse(text: str) -> dict[str, str]:
    """The options of an allocator string, in order, values as written but without white space.

    Raises ValueError with a sentence where it has no meaning to PyTorch.
    """
    text = "".join(text.split())
    entries: dict[str, str] = {}
    while text:
        found = re.match(r"([^,:\[\]]+):([^,:\[\]]+|\[[^\[\]]*\])(?:,|$)", text)
        if found is None:
            raise ValueError(f"{text[:40]!r} is not an option with a value, as name:value")
        name, value = found.groups()
        if name == "backend" and entries.get(name, value) != value:
            raise ValueError("it names two backends")
        entries[name] = value
        text = text[found.end() :]
    return entries


def to_text(entries: Mapping[str, str]) -> str:
    """The allocator string of some options."""
    return ",".join(f"{name}:{value}" for name, value in entries.items())


def is_valid(name: str, value: str) -> bool:
    """Whether every PyTorch since 2.4 takes this value for this option of ours."""
    if name == "backend":
        return value in (NATIVE, ASYNC)
    if name == "expandable_segments":
        return value in _SWITCH.values()
    if name == "max_split_size_mb":  # 20 is enough for PyTorch 2.11, older ones want more
        return re.fullmatch(r"[0-9]{2,7}", value) is not None and 21 <= int(value) <= 10**6
    if name == "garbage_collection_threshold":
        return re.fullmatch(r"0\.[0-9]{1,6}", value) is not None and float(value) > 0
    return name == "roundup_power2_divisions" and _are_divisions(value)


def _are_divisions(value: str) -> bool:
    if not value.startswith("["):
        return _is_power(value, 64)
    if re.fullmatch(r"\[([0-9]{1,5}|>):[0-9]{1,2}(,([0-9]{1,5}|>):[0-9]{1,2})*\]", value) is None:
        return False
    pairs = [pair.split(":") for pair in value[1:-1].split(",")]
    sizes = [size for size, _ in pairs]
    numbers = [int(size) for size in sizes if size != ">"]
    return (
        all(n == "0" or _is_power(n, 64) for _, n in pairs)
        and all(_is_power(str(n), 65536) for n in numbers)
        and numbers == sorted(set(numbers))
        and len(numbers) > 0
        and ">" not in sizes[:-1]
    )


def _is_power(value: str, most: int) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,5}", value) is not None and (
        int(value) <= most and int(value) & (int(value) - 1) == 0
    )


# ------------------------------------------------------------------------ what torch is built for
def built_for(text: str) -> str:
    """CUDA, HIP or "", from the text of torch/version.py: torch itself must not be imported yet.

    The version's name does not tell: NVIDIA's own builds and those from source end otherwise.
    """
    kinds = (rf"^({kind})\b[^=\n]*= *['\"]" for kind in (HIP, CUDA))
    found = (re.search(kind, text, re.MULTILINE) for kind in kinds)
    return next((match[1] for match in found if match), "")


# --------------------------------------------------------------------------- what the user chose
def read_settings(path: str) -> tuple[dict[str, Any], str]:
    """ComfyUI's settings file, and what is wrong with it ("" for nothing, or for no file)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            return {}, "it is no file"
        if status.st_size > MOST_SETTINGS_BYTES:
            return {}, f"it has more than {MOST_SETTINGS_BYTES >> 20} MB"
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        return {}, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return (content, "") if isinstance(content, dict) else ({}, "it is no JSON object")


def choice_of(settings: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The options that the user chose, each of them valid, and a sentence for each that is not."""
    chosen: dict[str, str] = {}
    problems = []
    names = {SETTING + option.setting: name for name, option in OPTIONS.items()}
    for key, value in settings.items():
        if not key.startswith(SETTING):
            continue
        if key not in names:
            problems.append(f"{key[:80]!r} is not known to this version")
            continue
        text = _as_text(names[key], value)
        if text is None or (text and not is_valid(names[key], text)):
            problems.append(f"{key} is {_shown(value)}, not {OPTIONS[names[key]].values}")
        elif text:
            chosen[names[key]] = text
    return {name: chosen[name] for name in OPTIONS if name in chosen}, problems


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (list, dict)) else repr(value)[:60]


def _as_text(name: str, value: Any) -> str | None:
    """A setting's value as in an allocator string; "" to leave it, None if it makes no sense."""
    if name in ("max_split_size_mb", "garbage_collection_threshold"):
        if type(value) not in (int, float) or not 0 <= value <= 10**6:
            return None
        if value == 0:
            return ""
        if name == "max_split_size_mb":
            return str(int(value)) if value == int(value) else None
        return f"{value:.6f}".rstrip("0")
    if not isinstance(value, str) or len(value) > 1000:
        return None
    value = "".join(value.split()) if name == "roundup_power2_divisions" else value
    if value in ("", LEAVE):
        return ""
    return _SWITCH.get(value) if name == "expandable_segments" else value


# ----------------------------------------------------------------------------------------- merging
def plan(choice: Mapping[str, str], found: Found) -> Plan:
    """What to set, so that the choice holds and nothing that was set outside is changed.

    Without a choice that can have an effect it is what ComfyUI alone would have set.
    """
    origin = origin_of(found)
    usual = Plan(_hosts_text(origin, found.host_added), None, origin, {}, ())
    if not choice:
        return usual
    if reason := found.machine.reason_for_nothing():
        return usual._replace(notes=(reason,))
    try:
        outside = parse(origin.text)
    except ValueError as error:
        return usual._replace(notes=(f"{origin.variable} was set outside ComfyUI, and {error}",))
    decided = outside.get("backend", found.flag)
    if found.flag and decided != found.flag:
        return usual._replace(notes=(f"{origin.variable} and the command line differ",))
    backend, notes = _backend(choice, found, decided, origin if "backend" in outside else None)
    added: dict[str, str] = {}
    for name, value in choice.items():
        if name == "backend":
            continue
        if name in outside:
            if outside[name] != value:
                notes.append(f"{name} stays {outside[name]}: {_by(origin)}")
        elif reason := found.machine.reason_against(name, value, backend):
            notes.append(f"{name}: {reason}")
        else:
            added[name] = value
    if not added and backend == (ASYNC if found.host_added else NATIVE):
        return usual._replace(notes=tuple(notes))
    # Native goes without saying, and so it does no harm if ComfyUI appends its own once more: in a
    # restart in place (os.execv) of an installation that no longer has this pack.
    merged = {**outside, **added, **({"backend": ASYNC} if backend == ASYNC else {})}
    if not decided and choice.get("backend") == backend:
        added = {"backend": backend, **added}
    return Plan(to_text(merged) or None, backend, origin, added, tuple(notes))


def _backend(
    choice: Mapping[str, str], found: Found, decided: str, origin: Origin | None
) -> tuple[str, list[str]]:
    """The backend that there will be, and why it is not the chosen one."""
    usual = decided or (ASYNC if found.host_added else NATIVE)
    wanted = choice.get("backend", usual)
    if wanted == usual:
        return usual, []
    if decided:
        by = _by(origin) if origin else "the command line says so"
        return usual, [f"backend stays {usual}: {by}"]
    reason = found.machine.reason_against("backend", wanted, wanted)
    return (usual, [reason]) if reason else (wanted, [])


def _by(origin: Origin) -> str:
    return (
        f"{origin.variable} was set outside ComfyUI, or before a restart inside it (then close "
        "ComfyUI and start it anew)"
    )


def _hosts_text(origin: Origin, host_added: bool) -> str | None:
    """What VARIABLE would be without us."""
    own = origin.text if origin.variable == VARIABLE else None
    if not host_added:
        return own
    return HOSTS_OWN if own is None else f"{own},{HOSTS_OWN}"


def origin_of(found: Found) -> Origin:
    """What the user set outside, without what ComfyUI and an earlier start of ours added."""
    text = found.variables.get(VARIABLE)
    if found.host_added and text is not None:
        text = None if text == HOSTS_OWN else text.removesuffix(f",{HOSTS_OWN}")
    earlier = read_marker(found.variables)
    if earlier is not None and text == earlier.set:
        if earlier.origin.variable == VARIABLE:
            return earlier.origin
        text = None
    if text is not None:
        return Origin(VARIABLE, text)
    for name in (AMD_VARIABLE, GENERAL_VARIABLE)[0 if found.machine.amd else 1 :]:
        if name in found.variables:
            return Origin(name, found.variables[name])
    return Origin()


# ------------------------------------------------------------------------------------- the marker
class Marker(NamedTuple):
    """What a start found and left behind; `set` is VARIABLE as it was left."""

    origin: Origin
    set: str | None
    added: Mapping[str, str]
    notes: tuple[str, ...]


def marker_of(made: Plan) -> str:
    """The value of MARKER after a start."""
    return json.dumps([*made.origin, made.text, dict(made.added), list(made.notes)])


def read_marker(variables: Mapping[str, str]) -> Marker | None:
    """What an earlier start noted; None if there is nothing that can be believed."""
    try:
        variable, text, left, added, notes = json.loads(variables.get(MARKER, ""))
        if not (variable in ("", *VARIABLES) and isinstance(text, str)):
            return None
        if not (left is None or isinstance(left, str)):
            return None
        if not all(is_valid(name, value) for name, value in added.items()):
            return None
        return Marker(Origin(variable, text), left, dict(added), tuple(map(str, notes)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def log_line(made: Plan, problems: list[str]) -> str:
    """What a start says about itself, in one line; "" if there is nothing to say."""
    parts = []
    if made.added:
        text = f"{VARIABLE}={made.text}" if made.text else f"{VARIABLE} not set"
        parts.append(f"{text}, backend {made.backend}, by ComfyUI's settings")
    if made.notes or problems:
        parts.append("Not applied: " + "; ".join([*made.notes, *problems]))
    return f"Memory allocator: {'. '.join(parts)}." if parts else ""
