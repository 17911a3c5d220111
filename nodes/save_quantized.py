"""Write a model that was quantised at load, so that the next load needs no bf16 file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io

from ..core.checkpoint import read_header
from ..core.file_identity import identify
from ..core.layer_source import LayerSource, stored_formats
from ..core.quantized_layers import format_of
from ..core.quantized_writing import (
    Entries,
    Quantised,
    described,
    kept_names,
    source_of,
    stored,
    with_dtype,
    write_quantised,
)
from ..core.units import size_text
from . import architectures, environment
from .quantized_layouts import entries_of
from .quantized_loading import Quantization
from .status import say, shown
from .unmerged_patcher import is_unmerged, lora_report

FOLDERS = {"model": "diffusion_models", "clip": "clip"}  # of the output folder, as ComfyUI's own
SECONDS_BETWEEN_LINES = 0.5
CHOOSE = (
    "choose a weight_dtype that quantises, as bnb_nf4 or int8, in Load Diffusion Model or Load "
    "Text Encoder (Qwen VRAM)"
)


class Origin(NamedTuple):
    """Where a quantised model came from."""

    source: LayerSource
    quantisation: Quantization
    name: str  # of the source, without its ending


class SaveQuantized(io.ComfyNode):
    """Write what our loaders quantised, as files that they and ComfyUI open."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMSaveQuantized.md."""
        return io.Schema(
            node_id="QwenVRAMSaveQuantized",
            display_name="Save Quantized Model (Qwen VRAM)",
            category="Qwen VRAM/loaders",
            description=(
                "Writes a model that was quantised while it was loaded to one safetensors file. "
                "The next load is faster and no longer needs the original file."
            ),
            search_aliases=["export model", "model save", "quantize", "nf4", "int8"],
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="A diffusion model, quantised by its loader."
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="A text encoder, quantised by its loader."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="%source%_%format%",
                    tooltip=(
                        "How the file is called, in diffusion_models or clip of ComfyUI's output "
                        "folder. %source% is the original file, %format% the format that was taken "
                        "(for int4: w4a8 or w4a4); a number is put behind."
                    ),
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        filename_prefix: str,
        model: ModelPatcher | None = None,
        clip: comfy.sd.CLIP | None = None,
    ) -> io.NodeOutput:
        """Write one file for each input that is connected."""
        if model is None and clip is None:
            raise ValueError("Nothing is connected: connect model, clip or both.")
        saved = []
        if model is not None:
            saved.append(save("model", model, model.model.diffusion_model, filename_prefix))
        if clip is not None:
            inside = clip.cond_stage_model
            root = getattr(inside, inside.clip).transformer
            saved.append(save("clip", clip.patcher, root, filename_prefix))
        return shown(text="\n".join(file.pop("text") for file in saved), files=saved)


def save(kind: str, patcher: ModelPatcher, root: torch.nn.Module, prefix: str) -> dict[str, Any]:
    """Write the quantised layers of `root` and what else its source holds. Returns the facts.

    Raises ValueError: one sentence that names the input `kind`.
    """
    start = time.monotonic()
    origin = origin_of(kind, patcher)
    chosen = origin.quantisation
    layers = Layers(root, origin.source)
    quantised = layers.described(chosen)
    path = target(kind, prefix.replace("%source%", origin.name).replace("%format%", chosen.format))
    steps = layers.steps(quantised)
    size = write_quantised(path, origin.source, quantised, steps, Progress(path.name))
    relative = path.relative_to(folder_paths.get_output_directory())
    missing = left_out(patcher)
    parts = [
        size_text(size),
        ", ".join(f"{n} layers {f}" for f, n in quantised.counts().items()),
        f"output/{relative.as_posix()}",
        f"written in {time.monotonic() - start:.1f} s",
        *([f"not in the file: {missing}"] if missing else []),
    ]
    return {
        "text": " · ".join(parts),
        "path": str(path),
        "bytes": size,
        "layers": quantised.counts(),
    }


# ------------------------------------------------------------------------------ what was quantised
def origin_of(kind: str, patcher: ModelPatcher) -> Origin:
    """The file that a model was quantised from. Raises ValueError."""
    factory, arguments, *_ = patcher.cached_patcher_init or (None, ())
    if factory not in (architectures.load_transformer, architectures.reload_text_encoder):
        raise ValueError(f"The {kind} does not come from a loader of Qwen VRAM; {CHOOSE}.")
    path, options = arguments
    name = os.path.basename(path)
    refuse_other_patches(kind, patcher)
    try:
        if stored_formats(read_header(path)):
            raise ValueError(f"{name} is a quantised file already; use it as it is.")
        if "quantization" not in options:
            raise ValueError(f"{name} was not quantised when it was loaded; {CHOOSE}.")
        changed = environment.LOADED.doubt(patcher.model, identify(path))
        _, source = source_of(path)
    except OSError as error:
        raise ValueError(
            f"{path} is needed for what stays as it is, and cannot be read ({error.strerror}); "
            "put it back."
        ) from None
    if changed:
        raise ValueError(f"{changed}; load it again, then save.")
    return Origin(source, options["quantization"], os.path.splitext(name)[0])


def refuse_other_patches(kind: str, patcher: ModelPatcher) -> None:
    """Raise ValueError if there are patches that whoever saves must expect to be in the file."""
    layers = patcher.run_time_patches.layers.values() if is_unmerged(patcher) else ()
    if not all(layer.low_rank for layer in layers):
        raise ValueError(
            f"What was merged or patched into {kind} cannot be written ({lora_report(patcher)}); "
            "connect the loader itself, or merge in bf16 and quantise the result."
        )


def left_out(patcher: ModelPatcher) -> str:
    """What the model carries and its file does not; "" without any."""
    parts = [lora_report(patcher)] if lora_report(patcher) else []
    if patcher.patches:
        parts.append(f"{len(patcher.patches)} patches of other weights")
    if patcher.injections:
        parts.append(f"{len(patcher.injections)} injected adapters")
    return "; ".join(parts)


class Layers:
    """The quantised layers of a model, wherever their weights are at the moment."""

    def __init__(self, root: torch.nn.Module, source: LayerSource) -> None:
        self._source = source
        self._modules = {
            name: module
            for name, module in root.named_modules()
            if isinstance(getattr(module, "weight", None), QuantizedTensor)
        }

    def described(self, chosen: Quantization) -> Quantised:
        """Formats, and dtypes and shapes of all entries; nothing is copied."""
        formats, entries = {}, {}
        for name, module in self._modules.items():
            formats[name] = format_of(entries_of(module.weight)) or chosen.format
            entries |= described(stored(self._entries(name, module)))
        return Quantised(chosen.format, chosen.preset.name, formats, entries)

    def steps(self, quantised: Quantised) -> Iterator[Entries]:
        """The quantised layers from memory, then the rest from the file.

        What that holds is what was loaded: other weights in memory may have been cast or patched.
        """
        for name, module in self._modules.items():
            yield self._entries(name, module)
        kept = kept_names(self._source, quantised.layers)
        yield from ({name: tensor} for name, tensor in self._source.read_all(kept))

    def _entries(self, name: str, module: torch.nn.Module) -> Entries:
        entries = {f"{name}.{key}": tensor for key, tensor in entries_of(module.weight).items()}
        return with_dtype(entries, self._source.entry(f"{name}.weight")[0])


# ------------------------------------------------------------------------------------ where it goes
def target(kind: str, prefix: str) -> Path:
    """A path that nothing has yet, in the folder where our loaders look. Raises ValueError."""
    parts = Path(prefix).parts
    if not parts or ".." in parts or Path(prefix).is_absolute() or "\0" in prefix:
        raise ValueError(
            f"filename_prefix must be a name, or folders and a name, not {prefix!r}: files go to "
            f"{FOLDERS[kind]} in ComfyUI's output folder."
        )
    folder, name, counter, *_ = folder_paths.get_save_image_path(
        f"{FOLDERS[kind]}/{prefix}", folder_paths.get_output_directory()
    )
    return Path(folder, f"{name}_{counter:05}_.safetensors")


class Progress:
    """The bar and the text on the node; an interrupt ends the writing."""

    def __init__(self, name: str) -> None:
        self._name, self._told = name, 0.0
        self._bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            self._bar.update_absolute(done, total)
            say(f"{size_text(done)} of {size_text(total)} written to {self._name}")


NODES = [SaveQuantized]
