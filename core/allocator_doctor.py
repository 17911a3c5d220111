"""What PyTorch's GPU memory allocator really does in a process, from what was observed there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .allocator import (
    AMD_VARIABLE,
    ASYNC,
    LEAVE,
    NATIVE,
    OPTIONS,
    VARIABLE,
    VARIABLES,
    Machine,
    Origin,
    parse,
    to_text,
)

LIVE, IGNORED, HARMFUL, UNSET = "live", "ignored", "harmful here", "not set"
UNKNOWN = "not measurable"
COARSE_DIVISIONS = 4  # up to here rounding up may take a quarter more memory


MEASURED = (
    "Measured on an H200: with dynamic VRAM held down to 12 GB, sampling of 4 steps at 1328x1328; "
    "without it held down to 23.5 GiB, 30 generations of 1 step, 512 to 2048 pixels."
)


class Observed(NamedTuple):
    """What the running process shows. None: not measurable, and `why` says for which reason.

    `read` holds the options as PyTorch itself gives them (native backend only), `text` the
    allocator string that it was started with or was given later, `sizes` each device with its
    reserved, allocated and inactive split bytes, `fraction` the part of the memory that the
    process may take. `flag` is NATIVE where --disable-cuda-malloc was given.
    """

    machine: Machine
    device: str
    backend: str | None
    text: str
    variable: str
    origin: Origin
    added: Mapping[str, str]
    notes: tuple[str, ...]
    choice: Mapping[str, str]
    problems: tuple[str, ...]
    shadowed: tuple[str, ...]
    dynamic_vram: bool
    read: Mapping[str, Any] | None = None
    fraction: float | None = None
    sizes: tuple[tuple[str, int, int, int], ...] | None = None
    why: str = ""
    flag: str = ""


class Verdict(NamedTuple):
    """One option: its value ("" for none), its state, the reason, and when a change counts."""

    name: str
    value: str
    state: str
    why: str
    change: str


class Finding(NamedTuple):
    """For the memory report: severity is info, warning or problem."""

    id: str
    severity: str
    text: str
    action: str


class Diagnosis(NamedTuple):
    """All that the doctor says."""

    seen: Observed
    verdicts: tuple[Verdict, ...]
    suggestion: str
    launcher: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]


def diagnose(seen: Observed) -> Diagnosis:
    """Judge every option."""
    verdicts = tuple(_verdict(name, seen) for name in OPTIONS)
    return Diagnosis(seen, verdicts, _suggestion(seen), launcher(seen), _findings(seen, verdicts))


def entries_of(text: str) -> dict[str, str]:
    """The options of a text that PyTorch has already accepted; empty if it is none to us."""
    try:
        return parse(text)
    except ValueError:
        return {}


# ---------------------------------------------------------------------------------------- options
def _verdict(name: str, seen: Observed) -> Verdict:
    now = "can be changed now" if seen.read is not None else "needs a restart"
    now = "needs native" if seen.backend == ASYNC else now
    nothing = seen.machine.reason_for_nothing() or (seen.why if not seen.device else None)
    if name == "backend":
        state = IGNORED if nothing else (LIVE if seen.backend else UNKNOWN)
        return Verdict(name, seen.backend or "", state, nothing or seen.why, "needs a restart")
    value = entries_of(seen.text).get(name, "")
    if not value:
        return Verdict(name, "", UNSET, "", now)
    reason = nothing or seen.machine.reason_against(name, value, seen.backend or "")
    if reason or seen.backend is None:
        return Verdict(name, value, IGNORED if reason else UNKNOWN, reason or seen.why, now)
    state, why = _native_state(name, value, seen)
    return Verdict(name, value, state, why, now)


def _native_state(name: str, value: str, seen: Observed) -> tuple[str, str]:
    """State and reason of an option that is set under the native backend on a GPU."""
    if seen.read is None:
        return UNKNOWN, seen.why
    if not is_in_effect(name, value, seen.read):
        return IGNORED, f"PyTorch does not have it in effect on {seen.machine.system}"
    if name == "garbage_collection_threshold":
        if seen.fraction is None:
            return UNKNOWN, "this PyTorch does not tell whether the process has a memory fraction"
        if seen.fraction >= 1:
            return IGNORED, "the process has no memory fraction, and only then it counts"
    if name == "expandable_segments" and value == "True" and seen.dynamic_vram:
        return HARMFUL, "with dynamic VRAM it made sampling slower on an H200 held down to 12 GB"
    if name == "roundup_power2_divisions":
        coarse = [n for n in _divisions(value) if 1 < n <= COARSE_DIVISIONS]
        if coarse:
            return HARMFUL, f"up to {100 // min(coarse)} % more memory is taken for a tensor"
    return LIVE, ""


def _divisions(value: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?:^|:)(\d+)", value)]


def is_in_effect(name: str, value: str, read: Mapping[str, Any]) -> bool:
    """Whether PyTorch's own account of its options (`read`) has this value."""
    if name == "max_split_size_mb":
        return read.get("max_split_size") == int(value) << 20
    if name == "garbage_collection_threshold":
        return read.get(name) == float(value)
    if name == "expandable_segments":
        return read.get(name) == (value == "True")
    found = set((read.get(name) or {}).values())
    return found <= set(_divisions(value)) | {0} and bool(found & set(_divisions(value)))


# ------------------------------------------------------------------------------- what to do about
def _suggestion(seen: Observed) -> str:
    if reason := seen.machine.reason_for_nothing():
        return f"Nothing to set: {reason}."
    if not seen.device:
        return f"Nothing to set: {seen.why}."
    if seen.dynamic_vram:
        return (
            "Leave it alone. With dynamic VRAM the weights lie in pages outside this allocator, so "
            "that little is left that could fragment; on an H200 held down to 12 GB no option made "
            "it faster, and expandable_segments made it slower."
        )
    if seen.backend == ASYNC:
        return (
            f"Leave it alone as long as memory suffices. {ASYNC} is NVIDIA's own and has no "
            "options. Without dynamic VRAM, on an H200 held down to 23.5 GiB, it was as fast as "
            "native in one run and 24 % slower in another: if speed matters, try both and compare."
        )
    return (
        "Leave it alone as long as memory suffices. If it runs out although enough is free, the "
        "memory is in pieces: clear the cache, then try one option at a time, and compare."
    )


def launcher(seen: Observed) -> tuple[tuple[str, str], ...]:
    """Where to write what, so that ComfyUI starts with the backend and options in effect now."""
    if seen.machine.reason_for_nothing() or seen.backend is None:
        return ()
    entries = {k: v for k, v in entries_of(seen.text).items() if k != "backend"}
    if seen.backend == ASYNC:
        entries = {}
    text = to_text(entries)
    lines = []
    if text:
        lines += [
            ("Windows .bat", f'set "{VARIABLE}={text}"'),
            ("PowerShell", f'$env:{VARIABLE} = "{text}"'),
            ("Linux, macOS", f'export {VARIABLE}="{text}"'),
        ]
    if not seen.machine.amd:  # there ComfyUI does not choose
        flag = "--cuda-malloc" if seen.backend == ASYNC else "--disable-cuda-malloc"
        lines.append(("behind main.py", flag))
    return tuple(lines)


def _findings(seen: Observed, verdicts: tuple[Verdict, ...]) -> tuple[Finding, ...]:
    found = []
    for verdict in verdicts:
        option = OPTIONS[verdict.name]
        where = "in the launcher" if verdict.name in entries_of(seen.origin.text) else _dialog()
        if verdict.state == HARMFUL:
            text = f"The allocator option {verdict.name}:{verdict.value} does harm: {verdict.why}."
            action = f"Remove it {where}, and restart ComfyUI."
            found.append(Finding(f"allocator_{option.setting}", "warning", text, action))
        elif verdict.state == IGNORED and verdict.value and verdict.name != "backend":
            text = f"The allocator option {verdict.name} has no effect: {verdict.why}."
            action = f"Remove it {where}."
            found.append(Finding(f"allocator_{option.setting}", "info", text, action))
    for name in filter(lambda name: not _is_merged(name, seen), seen.shadowed):
        text = f"{name} has no effect: PyTorch reads {seen.variable} and nothing else."
        action = f"Write its options into {seen.variable}, or start with --disable-cuda-malloc."
        found.append(Finding("allocator_shadowed", "warning", text, action))
    return tuple(found)


def _is_merged(variable: str, seen: Observed) -> bool:
    """Whether the start put what this variable says into the one that PyTorch reads."""
    if seen.origin.variable != variable:
        return False
    try:
        outside = parse(seen.origin.text)
    except ValueError:
        return False
    inside = {"backend": NATIVE, **entries_of(seen.text)}  # native goes without saying
    return all(inside.get(name) == value for name, value in outside.items())


def against_fragments(seen: Observed) -> str | None:
    """How to have cudaMallocAsync manage the memory, which is NVIDIA's against fragments.

    None where nobody chose native: then ComfyUI or the card has a reason against the other.
    """
    if seen.backend != NATIVE or seen.machine.amd:
        return None
    then = f"and restart ComfyUI, so that the driver's {ASYNC} manages the memory."
    if seen.flag == NATIVE:
        return f"Leave out --disable-cuda-malloc {then}"
    if entries_of(seen.origin.text).get("backend") == NATIVE:
        return f"Take backend:{NATIVE} out of {seen.origin.variable} in the launcher {then}"
    if seen.added.get("backend") == NATIVE:
        return f"Set Allocator back to {LEAVE!r} {_dialog()} {then}"
    return None


def _dialog() -> str:
    return "in ComfyUI's settings, Qwen VRAM, Memory allocator (CUDA)"


def shadowed(variables: Mapping[str, str], amd: bool) -> tuple[str, ...]:
    """Variables that are set and that PyTorch does not read, because it reads another one."""
    read = [n for n in VARIABLES if n in variables and (amd or n != AMD_VARIABLE)]
    return tuple(read[1:])


def text_to_apply(seen: Observed) -> str:
    """The allocator string with what is chosen now beside what was set outside, without backend."""
    merged = {**seen.choice, **entries_of(seen.origin.text)}
    kept = {k: v for k, v in merged.items() if not _is_dead(k, v, seen)}
    return to_text(kept)


def _is_dead(name: str, value: str, seen: Observed) -> bool:
    ours = name in OPTIONS
    return name == "backend" or (ours and bool(seen.machine.reason_against(name, value, NATIVE)))


# ------------------------------------------------------------------------------------------- text
def text_of(found: Diagnosis) -> str:
    """For people: a few lines per subject."""
    seen = found.seen
    if _unused(seen):
        return "\n".join([_headline(seen), *_sources(seen)])
    lines = [
        _headline(seen),
        *_sources(seen),
        "",
        "Options (PyTorch's allocator):",
        f"  {MEASURED}",
    ]
    for verdict in found.verdicts:
        lines += _option_lines(verdict)
    lines += ["", _fragmentation(seen), "", f"Suggestion: {found.suggestion}"]
    lines += [f"Finding: {f.text} {f.action}" for f in found.findings]
    if found.launcher:
        lines += ["", "To start ComfyUI like this without its settings:"]
        lines += [f"  {where}: {line}" for where, line in found.launcher]
    return "\n".join(lines)


def status_of(found: Diagnosis) -> str:
    """For the node: one line."""
    count = len(found.seen.problems)
    first = [f"{count} setting{'' if count == 1 else 's'} not understood"] if count else []
    head = _headline(found.seen).rstrip(".")
    if _unused(found.seen):
        return " · ".join([*first, head])
    states = [f"{v.name}: {v.state}" for v in found.verdicts[1:] if v.value]
    advice = found.suggestion.partition(". ")[0].rstrip(".")
    return " · ".join([*first, head, *states, advice])


def _unused(seen: Observed) -> str:
    """Why PyTorch's GPU allocator serves nothing in this process; "" if it does."""
    return seen.machine.reason_for_nothing() or ("" if seen.device else seen.why)


def _headline(seen: Observed) -> str:
    if reason := _unused(seen):
        return f"CUDA is not used: {reason}. No option of its allocator counts here."
    if seen.backend is None:
        return f"Backend: {UNKNOWN} ({seen.why})."
    dynamic = "on" if seen.dynamic_vram else "off"
    return f"Backend: {seen.backend}, on {seen.device}, dynamic VRAM {dynamic}."


def _sources(seen: Observed) -> list[str]:
    """Who set what."""
    lines = [] if _unused(seen) else [f"In effect: {seen.text or 'no option'}."]
    if seen.origin.variable:
        lines.append(f"Set outside ComfyUI: {seen.origin.variable}={seen.origin.text}")
    if seen.added:
        lines.append(f"Set by ComfyUI's settings at the start: {_pairs(seen.added)}.")
    if seen.choice:
        lines.append(f"Chosen in ComfyUI's settings now: {_pairs(seen.choice)}.")
    lines += [f"Not applied at the start: {note}." for note in seen.notes]
    return lines + [f"Not understood in the settings: {problem}." for problem in seen.problems]


def _pairs(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name}:{value}" for name, value in entries.items())


def _option_lines(verdict: Verdict) -> list[str]:
    option = OPTIONS[verdict.name]
    value = f" = {verdict.value}" if verdict.value else ""
    why = f" ({verdict.why.rstrip('.')})" if verdict.why else ""
    measured = f" Measured: {option.measured}." if option.measured else " Not measured."
    return [
        f"  {verdict.name}{value}: {verdict.state}{why}; {verdict.change}.",
        f"    {option.what}{measured}",
    ]


def _fragmentation(seen: Observed) -> str:
    if seen.sizes is None:
        return f"Fragmentation: {UNKNOWN} ({seen.why})."
    return "\n".join(
        f"Fragmentation of {device}: PyTorch holds {reserved / 1e9:.2f} GB, "
        f"{allocated / 1e9:.2f} GB of it in use and {inactive / 1e9:.2f} GB free between pieces "
        "in use."
        for device, reserved, allocated, inactive in seen.sizes
    )
