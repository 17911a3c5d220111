"""What a loader's weight_dtype and preset mean for a file: options of the load, and a reason."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..core import checkpoint
from ..core.file_identity import identify
from ..core.layer_source import stored_formats
from ..core.quantization import FORMATS, Preset
from ..core.quantization_choice import Choice
from . import architectures
from .quantization_choice import resolve
from .quantization_presets import preset as preset_of
from .quantized_loading import Quantization, is_ours, main_format

DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
QUANTISED = ("auto", "int8", "int4", "bnb_int8", "bnb_nf4", "bnb_fp4")
WEIGHT_DTYPES = (*DTYPES, *QUANTISED)
TEXT_DTYPES = tuple(name for name in WEIGHT_DTYPES if name != "fp8_e4m3fn_fast")
VAE_DTYPES = ("default", "bf16", "fp16", "fp32")  # the host's VAEs cannot hold fp8 weights

FP8 = ("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
ASKED = (*QUANTISED, *FP8)  # about the machine, before anything is loaded
INT4 = ("w4a8", "w4a4")
AS_STORED = Preset("", "", ())  # of a file that is quantised: no preset of the user's counts
NEEDED = {"diffusion_models": checkpoint.TRANSFORMER, "text_encoders": checkpoint.TEXT_ENCODER}

# What auto took for a version of a file on a device. It looks at free memory, which the model
# itself then takes: without a memory, the next look would end in another model and another key.
_decided: dict[Hashable, Choice] = {}


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded: a dtype of the host, or a format and the layers that get it."""

    name: str
    why: str
    device: str
    quantization: Quantization | None

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What makes two loads of one file the same. A preset counts by its rules."""
        rules = self.quantization.preset.rules if self.quantization else None
        return (self.name, self.device, rules)

    def options(self) -> dict[str, Any]:
        """ComfyUI's model_options, with this pack's own beside them. Raises ValueError."""
        options = architectures.model_options(DTYPES.get(self.name), self.device)
        if self.name == "fp8_e4m3fn_fast":
            options["fp8_optimizations"] = True
        if self.name in FP8:  # text encoders do not ask
            options["unmerged_loras"] = True
        if self.quantization:
            options["quantization"] = self.quantization
        return options


def wanted(folder: str, path: str, weight_dtype: str, device: str, preset: str) -> Wanted:
    """Decide what the values of a loader mean for this file. Raises ValueError, OSError."""
    if weight_dtype not in ASKED:
        return Wanted(weight_dtype, "", device, None)
    rules = preset_of(folder, preset) if weight_dtype in QUANTISED else None
    choice, quantised = _decide(folder, path, weight_dtype, device, rules)
    return Wanted(choice.weight_dtype, choice.why, device, quantised)


def _decide(
    folder: str, path: str, weight_dtype: str, device: str, preset: Preset | None
) -> tuple[Choice, Quantization | None]:
    key = (tuple(identify(path)), weight_dtype, device, preset)
    if key in _decided:
        return _decided[key], _quantization(folder, _decided[key], preset)
    header = checkpoint.read_header(path)
    checkpoint.require(header, NEEDED[folder])
    stored = stored_formats(header)
    main = main_format(header, stored) if stored else ""
    if weight_dtype == "int4" and main in INT4:
        weight_dtype = main  # it is what was asked for, whichever suits the card
    choice = resolve(weight_dtype, header, device, preset)
    if weight_dtype == "auto":
        _decided[key] = choice
    if stored and choice.weight_dtype == main:  # the file's layers decide, so one model of it:
        if is_ours(header, stored):
            return Choice("default", choice.why), None
        preset = AS_STORED  # with this pack's operations, where default has the host's
    return choice, _quantization(folder, choice, preset)


def _quantization(folder: str, choice: Choice, preset: Preset | None) -> Quantization | None:
    name = choice.weight_dtype
    preset = preset_of(folder, choice.preset) if choice.preset else preset
    return Quantization(name, preset) if preset and name in FORMATS else None
