"""Quantise a file on a machine without a display, and without ComfyUI.

In the pack's folder: `python -m core.quantize_file SOURCE TARGET --format bnb_nf4`, or `--list`
in place of the target to see what there is and how large it would be.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch

from . import checkpoint, quantization, quantized_layers
from .format_support import PLAIN_TORCH, int4_for
from .layer_source import LayerSource
from .quantization import FORMATS, Preset
from .quantized_writing import (
    FOLDERS,
    Quantised,
    described,
    kept_names,
    source_of,
    stored,
    write_quantised,
)
from .qwen_layers import TOKEN_TABLE
from .tensor_writer import Entry
from .units import size_text

INT4 = "int4"
ABOUT = {  # every value of --format
    "bnb_int8": "8 bit, as bitsandbytes has it, which need not be installed; any device",
    "bnb_nf4": "4 bit, as bitsandbytes has it",
    "bnb_fp4": "the same with other levels; loses more",
    "int8": "8 bit, as ComfyUI has it; cards from RTX 20 on",
    "w4a8": "4 bit, as ComfyUI has it; cards from RTX 30 on",
    "w4a4": "4 bit, as ComfyUI has it, for RTX 20; loses more",
    INT4: "w4a4 if --device is an RTX 20 card, else w4a8",
}
WORDS = "; the table of words stays as it is without comfy-kitchen"
EXIT = """exit status:
  0; 1 after one sentence that says why not; 2 for wrong usage; 130 after an interrupt"""
TELL_SECONDS = {True: 0.5, False: 10.0}  # between two lines, on a terminal and in a log


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after one sentence, 130 after an interrupt, 2 for wrong usage."""
    try:
        run(_parser().parse_args(arguments))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; no file was written.\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m core.quantize_file",
        description="Quantise a Qwen-Image transformer or a Qwen2.5-VL text encoder.",
        epilog="\n".join(["formats:", *(f"  {n:9} {what}" for n, what in ABOUT.items()), "", EXIT]),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the epilog
    )
    parser.add_argument("source", help="a .safetensors file in bf16, fp16 or fp8")
    parser.add_argument("target", nargs="?", help="the .safetensors file to write")
    parser.add_argument("--format", choices=list(ABOUT), help="of most of the layers")
    parser.add_argument("--preset", default=quantization.DEFAULT_PRESET, help="which layers")
    parser.add_argument("--presets", metavar="FILE", help="a .json file with presets of your own")
    parser.add_argument("--device", default=_device(), help="that quantises (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="formats, presets and sizes; no file")
    return parser


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises ValueError, one sentence, and OSError."""
    kind, source = source_of(options.source)
    presets = _presets(options.presets)[FOLDERS[kind]]
    if options.list:
        sys.stdout.write(table(kind, source, presets))
        return
    target, preset = _target(options.target), presets.get(options.preset)
    if options.format is None:
        raise ValueError("Say --format, one of " + ", ".join(ABOUT) + "; --list shows the sizes.")
    if preset is None:
        raise ValueError(f"There is no preset {options.preset}; there is {', '.join(presets)}.")
    start, device = time.monotonic(), _usable(options.device)
    format = options.format
    if format == INT4:
        format = int4_for(_capability(device), source.layers.values())
    with torch.inference_mode():
        size = quantise(source, target, format, preset, device)
    seconds = time.monotonic() - start
    sys.stderr.write(f"{target}: {size_text(size)}, {format}, in {seconds:.0f} s\n")


def quantise(
    source: LayerSource, target: Path, format: str, preset: Preset, device: torch.device
) -> int:
    """Write the quantised model; returns its bytes. Raises ValueError, OSError."""
    plan = quantization.plan(source.layers, format, preset)
    if needs_more_for_words(plan, format) and (
        why := quantized_layers.missing_package(plan[TOKEN_TABLE])
    ):
        sys.stderr.write(f"The table of words stays as it is: {why}\n")
        del plan[TOKEN_TABLE]
    if not plan:
        raise ValueError(f"The preset {preset.name} leaves nothing to quantise in this file.")
    for lacking in filter(None, map(quantized_layers.missing_package, sorted(set(plan.values())))):
        raise ValueError(lacking)
    quantised = Quantised(format, preset.name, plan, _entries(source, plan, device))
    steps = (step.entries for step in source.steps(plan, device))
    return write_quantised(target, source, quantised, steps, _Progress())


def needs_more_for_words(plan: Mapping[str, str], format: str) -> bool:
    """Whether a text encoder's table of words is in a format of another package than the rest.

    ComfyUI can look words up in its own int8 alone, so `bnb_*` would need comfy-kitchen for it.
    """
    table = plan.get(TOKEN_TABLE)
    return table is not None and FORMATS[table].package != FORMATS[format].package


def _entries(source: LayerSource, plan: dict[str, str], device: torch.device) -> dict[str, Entry]:
    """dtype and shape of every entry: a layer of ones tells them for all layers of its shape."""
    known: dict[tuple[str, Entry], dict[str, Entry]] = {}
    found: dict[str, Entry] = {}
    for layer, format in plan.items():
        key = (format, source.entry(f"{layer}.weight"))
        if key not in known:
            dtype, shape = key[1]
            ones = torch.ones(*shape, dtype=dtype, device=device)
            entries = quantized_layers.encode(ones, format)
            known[key] = described(stored({f".{k}": v for k, v in entries.items()}))
        found |= {layer + name: entry for name, entry in known[key].items()}
    return found


# ------------------------------------------------------------------------------------- what is said
def table(kind: str, source: LayerSource, presets: dict[str, Preset]) -> str:
    """Presets, and the size of the file that each format gives with each; what is not installed."""
    wide = max(9, *map(len, presets))
    now = sum(tensor.bytes for tensor in source.header.tensors.values())
    lines = [f"{os.path.basename(source.header.path)}: {kind}, {size_text(now)}", "", "presets:"]
    lines += [f"  {name:{wide}} {preset.title}".rstrip() for name, preset in presets.items()]
    lines += ["", "formats, and the size with each preset:"]
    lines.append(f"  {'':9}" + "".join(f" {name:>{wide}}" for name in presets))
    for format in FORMATS:
        plans = [quantization.plan(source.layers, format, p) for p in presets.values()]
        alone = [
            plan
            for plan in plans
            if needs_more_for_words(plan, format) and not _found(plan[TOKEN_TABLE])
        ]
        for plan in alone:
            del plan[TOKEN_TABLE]
        words = WORDS if alone else ""
        sizes = "".join(f" {size_text(planned_bytes(source, plan)):>{wide}}" for plan in plans)
        lines.append(f"  {format:9}{sizes}  {ABOUT[format]}{_lacking(format)}{words}")
    return "\n".join([*lines, f"  {INT4:9} {ABOUT[INT4]}"]) + "\n"


def _lacking(format: str) -> str:
    """What has to be installed first. Whether that then works its import tells, in seconds."""
    return "" if _found(format) else f"; first `pip install {FORMATS[format].package}`"


def _found(format: str) -> bool:
    """Whether a format's package is installed, if it needs one."""
    package = FORMATS[format].package.replace("-", "_")
    return format == PLAIN_TORCH or find_spec(package) is not None


def planned_bytes(source: LayerSource, plan: dict[str, str]) -> int:
    """The size of the file that a plan gives, without its header and descriptions."""
    kept = [source.entry(name) for name in kept_names(source, plan)]
    size = sum(dtype.itemsize * prod(shape) for dtype, shape in kept)
    return size + sum(quantization.bytes_of(f, source.layers[layer]) for layer, f in plan.items())


class _Progress:
    """Says on stderr how far it is, and how long the rest will take."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told < TELL_SECONDS[self._terminal]:
            return
        self._told = now
        left = (now - self._start) * (total / done - 1)
        line = f"{size_text(done)} of {size_text(total)} written, {left:.0f} s left"
        sys.stderr.write(f"\r{line:60}" if self._terminal else f"{line}\n")
        sys.stderr.flush()


# ------------------------------------------------------------------------- what the options mean
def _presets(file: str | None) -> dict[str, dict[str, Preset]]:
    """The pack's presets, and those of the file beside them or in their place."""
    ours = quantization.presets()
    if file is None:
        return ours
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}; save it as UTF-8.") from None
    theirs = quantization.parse_presets(text, file)
    return {kind: {**ours[kind], **theirs.get(kind, {})} for kind in ours}


def _target(name: str | None) -> Path:
    if name is None:
        raise ValueError("Say the TARGET, the .safetensors file to write; or --list.")
    target = Path(name)
    if target.suffix.lower() not in checkpoint.SAFETENSORS_SUFFIXES:
        raise ValueError(f"{name} must end with .safetensors, or ComfyUI does not list it.")
    if not target.parent.is_dir():
        raise ValueError(f"There is no folder {target.parent} for {target.name}; make it first.")
    return target


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # meta has no numbers to give back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"This machine has no device {name} ({reason}); try cpu.") from None
    return device


def _capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability; None for other devices."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if nvidia else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no half file after either
    sys.exit(main())
