"""Write a quantised model layer by layer: one file, the same from the node and the command line."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import checkpoint
from .checkpoint import Header
from .layer_source import LayerSource
from .quantized_entries import pack_json, unpack_json
from .tensor_writer import Entry, TensorWriter

Entries = dict[str, torch.Tensor]
Tell = Callable[[int, int], None]  # bytes written, of all

VERSION = 1
FOLDERS = {
    checkpoint.TRANSFORMER: "diffusion_models",
    checkpoint.TEXT_ENCODER: "text_encoders",
}
STATE = ".quant_state."  # within the name of bitsandbytes' description, in JSON
STATE_BYTES = 256  # room for it: its length is known only when the layer is quantised
HOST_DESCRIPTION = "_quantization_metadata"  # ComfyUI's, of a source whose layers are decoded


@dataclass(frozen=True)
class Quantised:
    """What a file is to hold of the quantised layers."""

    format: str  # that was asked for, a name of core.quantization.FORMATS
    preset: str
    layers: Mapping[str, str]  # the format of each layer
    entry: Mapping[str, Entry]  # dtype and shape of every entry, under its full name

    def counts(self) -> dict[str, int]:
        """How many layers have each format."""
        return dict(sorted(Counter(self.layers.values()).items()))


def stored(entries: Mapping[str, torch.Tensor]) -> Entries:
    """Entries as they are written: each of a length that is known before it is made."""
    return {name: _padded(tensor) if STATE in name else tensor for name, tensor in entries.items()}


def with_dtype(entries: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Entries:
    """The same, said to come from this dtype: a model in memory says which one it computes in."""
    name = str(dtype).removeprefix("torch.")
    return {
        key: pack_json({**unpack_json(entry, key), "dtype": name}) if STATE in key else entry
        for key, entry in entries.items()
    }


def _padded(state: torch.Tensor) -> torch.Tensor:
    """JSON takes spaces at its end, as the header of a safetensors file does."""
    room = max(0, STATE_BYTES - state.numel())
    return torch.nn.functional.pad(state, (0, room), value=ord(" "))


def described(entries: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """dtype and shape of each."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entries.items()}


def metadata_of(source: Header, quantised: Quantised) -> dict[str, str]:
    """The metadata of the new file: the source's, and in `qwen_vram` how it was quantised."""
    about = {
        "format": quantised.format,
        "preset": quantised.preset,
        "source": os.path.basename(source.path),
        "layers": quantised.counts(),
        "version": VERSION,
    }
    hints = {**source.hints(), "quantization": about}
    kept = {k: v for k, v in source.metadata.items() if k != HOST_DESCRIPTION}
    return {"format": "pt", **kept, "qwen_vram": json.dumps(hints, ensure_ascii=False)}


def source_of(path: str | Path) -> tuple[str, LayerSource]:
    """The kind of a model and its tensors. Raises CheckpointError if it cannot be quantised."""
    header = checkpoint.read_header(str(path))
    kind = checkpoint.kind_of(header)
    if kind not in FOLDERS:
        raise checkpoint.CheckpointError(
            f"{os.path.basename(path)} is {kind}; what can be quantised is "
            f"{checkpoint.TRANSFORMER} or {checkpoint.TEXT_ENCODER}."
        )
    return kind, LayerSource(header, checkpoint.transformer_prefix(header.tensors) or "")


def kept_names(source: LayerSource, layers: Mapping[str, str]) -> list[str]:
    """The tensors that are written as they are read."""
    weights = {f"{layer}.weight" for layer in layers}
    return [name for name in source.names() if name not in weights]


def write_quantised(
    path: str | Path,
    source: LayerSource,
    quantised: Quantised,
    steps: Iterable[Entries],
    tell: Tell,
) -> int:
    """Write all `steps`, of the quantised layers and of the rest. Returns the bytes of the file.

    `tell` hears of the progress after each step, and may raise to end it: then no file is left.
    Raises ValueError, OSError.
    """
    kept = {name: source.entry(name) for name in kept_names(source, quantised.layers)}
    metadata = metadata_of(source.header, quantised)
    with TensorWriter(path, {**quantised.entry, **kept}, metadata) as writer:
        done = writer.header_bytes
        for entries in steps:
            done += _write_all(writer, stored(entries))
            del entries  # before the next ones are made
            tell(done, writer.bytes)
        return writer.bytes


def _write_all(writer: TensorWriter, entries: Entries) -> int:
    for name, tensor in entries.items():
        writer.write(name, tensor)
    return sum(tensor.nbytes for tensor in entries.values())
