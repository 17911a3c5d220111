"""Formats of quantised weights, and which layer of a model gets which of them.

A plan is made from names and shapes alone, before a byte of the weights is read: from a format and
a preset, which is a list of rules. The first rule that matches a layer's name decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path
from typing import Any

from .qwen_layers import TIME_TABLE, TOKEN_TABLE, published

KEEP, MAIN, EIGHT_BIT = "keep", "main", "8 bit"  # what a rule may say beside a format's name

BITSANDBYTES, COMFY_KITCHEN = "bitsandbytes", "comfy-kitchen"
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
NESTED_BLOCK = 256  # of these scales that share one of their own (double quantisation)
MAPS = 4 * 16 + 4 * 256  # bytes of the levels of weights and of scales
GROUP, CODEBOOK = 16, 64  # weights that share a scale in W4A8, and bytes of its levels
INT4_GROUP = 64  # the width of ComfyUI's int4 product
# Sizes of ConvRot's Hadamard matrices, the best first, that comfy-kitchen quantises, multiplies and
# dequantises with on every device (0.2.31): CUDA's kernels of W4A8 know 256 alone.
ROTATIONS = {"int8": (256, 64, 16), "w4a8": (256,), "w4a4": (256, 64, 16)}
WIDTHS = {"w4a8": min(ROTATIONS["w4a8"]), "w4a4": INT4_GROUP}  # what has to divide the inputs


@dataclass(frozen=True)
class Format:
    """How the weights of one linear layer are stored."""

    name: str
    package: str  # that quantises, and computes with it
    bits: int  # of one weight, without its share of the scales
    eight_bit: str  # the format that takes its place where eight bits are asked for


FORMATS = {
    f.name: f
    for f in (
        Format("bnb_int8", BITSANDBYTES, 8, "bnb_int8"),
        Format("bnb_nf4", BITSANDBYTES, 4, "bnb_int8"),
        Format("bnb_fp4", BITSANDBYTES, 4, "bnb_int8"),
        Format("int8", COMFY_KITCHEN, 8, "int8"),  # int8_tensorwise by rows, ConvRot where it fits
        Format("w4a8", COMFY_KITCHEN, 4, "int8"),  # asym_w4a8_int8
        Format("w4a4", COMFY_KITCHEN, 4, "int8"),  # convrot_w4a4
    )
}


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` (*, ?, [abc]) get `format`."""

    pattern: str
    format: str  # KEEP, MAIN, EIGHT_BIT or a name of FORMATS


@dataclass(frozen=True)
class Preset:
    """A named list of rules; a layer that none of them matches gets the main format."""

    name: str
    title: str
    rules: tuple[Rule, ...]

    def format_of(self, layer: str, main: str) -> str:
        """KEEP or the name of a format, for one layer."""
        said = next((r.format for r in self.rules if fnmatchcase(layer, r.pattern)), MAIN)
        if said == MAIN:
            return main
        return FORMATS[main].eight_bit if said == EIGHT_BIT else said


def rotation_of(format: str, inputs: int) -> int | None:
    """The largest ConvRot matrix that divides a layer's inputs, or None.

    Never by the device that quantises: what it writes is to open on all of them.
    """
    return next((size for size in ROTATIONS[format] if inputs % size == 0), None)


def fits(format: str, shape: Sequence[int]) -> bool:
    """Whether a weight of this shape (out, in) can be stored so."""
    outputs, inputs = shape
    if format in WIDTHS:
        return inputs % WIDTHS[format] == 0
    if FORMATS[format].bits == 4:
        return outputs * inputs % 2 == 0
    return True


def bytes_of(format: str, shape: Sequence[int]) -> int:
    """Bytes of one quantised weight (out, in) with its scales; descriptions in JSON not counted."""
    outputs, inputs = shape
    size = outputs * inputs * FORMATS[format].bits // 8
    if FORMATS[format].package == COMFY_KITCHEN:
        groups = outputs * inputs // GROUP + CODEBOOK if format == "w4a8" else 0
        return size + 4 * outputs + groups
    if format == "bnb_int8":
        return size + 4 * outputs
    blocks = ceil(outputs * inputs / BLOCK)
    return size + blocks + 4 * ceil(blocks / NESTED_BLOCK) + MAPS


def plan(layers: Mapping[str, Sequence[int]], format: str, preset: Preset) -> dict[str, str]:
    """The name of a format for every layer that is to be quantised.

    `layers` maps the name of each linear layer, without ".weight" and without the prefix of an
    all-in-one file, to the shape (out, in) of its weight. A layer that a format does not fit gets
    the format's eight bits; layers that are kept are absent. Tables may be among them: ComfyUI can
    look tokens up in int8, and other rows as they are.
    """
    wanted = {name: preset.format_of(name, format) for name in layers}
    if FORMATS.get(wanted.get(TOKEN_TABLE, KEEP), FORMATS["w4a4"]).bits == 8:
        wanted[TOKEN_TABLE] = "int8"
    else:
        wanted.pop(TOKEN_TABLE, None)
    wanted.pop(TIME_TABLE, None)
    return {name: _fitting(f, layers[name]) for name, f in wanted.items() if f != KEEP}


def _fitting(format: str, shape: Sequence[int]) -> str:
    return format if fits(format, shape) else FORMATS[format].eight_bit


# ---------------------------------------------------------------------------------------- presets
PRESETS_FILE = Path(__file__).with_name("quantization_presets.json")
KINDS = ("diffusion_models", "text_encoders")
DEFAULT_PRESET = "balanced"


def parse_presets(text: str, source: str) -> dict[str, dict[str, Preset]]:
    """Presets by kind of model and name; a kind may be absent.

    Raises ValueError: one sentence that names `source`, the place in it, and what may stand there.
    """
    try:
        if not text.strip():
            raise ValueError("it is empty; write presets into it, or delete it")
        table = _object(json.loads(text, object_pairs_hook=_unique), "it")
        unknown = sorted(table.keys() - set(KINDS))
        if unknown:
            raise ValueError(f"{unknown[0]} is no kind of model; write {' or '.join(KINDS)}")
        return {
            kind: {
                name: _preset(kind, name, _object(given, f"{kind}, {name}"))
                for name, given in _object(table.get(kind, {}), kind).items()
            }
            for kind in KINDS
        }
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not a list of presets: {error}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose names stand once each: else the last one would take the others' place."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name} stands twice in it; keep one, or rename it")
        made[name] = value
    return made


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object in braces")
    return value


def _preset(kind: str, name: str, given: dict[str, Any]) -> Preset:
    where, title, rules = f"{kind}, {name}", given.get("title", ""), given.get("rules")
    if not name.strip():
        raise ValueError(f"{kind}: a preset has an empty name; give it one")
    unknown = sorted(given.keys() - {"title", "rules"})
    if unknown or not isinstance(title, str):
        raise ValueError(f"{where}: a preset has a title (text) and rules, nothing else")
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{where}: rules must be a list of at least one [pattern, format]")
    return Preset(name, title, tuple(_rule(kind, where, rule) for rule in rules))


def _rule(kind: str, where: str, rule: object) -> Rule:
    if not (isinstance(rule, list) and len(rule) == 2 and all(isinstance(x, str) for x in rule)):
        raise ValueError(f"{where}: {json.dumps(rule)} is not a rule; write [pattern, format]")
    pattern, format = rule
    known = (KEEP, MAIN, EIGHT_BIT, *FORMATS)
    if format not in known:
        raise ValueError(f"{where}: {format} is no format; write {', '.join(known)}")
    if not any(fnmatchcase(layer, pattern) for layer in published()[kind]):
        example = next(reversed(published()[kind]))
        raise ValueError(
            f"{where}: the pattern {pattern} matches no layer; a layer is called {example}"
        )
    return Rule(pattern, format)


def presets() -> dict[str, dict[str, Preset]]:
    """The presets that the pack brings."""
    return parse_presets(PRESETS_FILE.read_text(encoding="utf-8"), PRESETS_FILE.name)
