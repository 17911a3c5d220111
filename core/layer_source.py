"""The linear layers of a file as plain weights, one after the other, on their way into a format.

Plain weights are bf16, fp16, fp32, fp64 (read as fp32), or fp8 with or without a scale beside
them: what a file can be quantised from. What is quantised already is refused, for it would lose
twice.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from math import prod

import torch

from .checkpoint import CheckpointError, Header
from .quantized_layers import QuantizedFileError, encode, layers_of
from .tensor_reader import DTYPES, TensorReader, own_memory

PLAIN = ("BF16", "F16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
READ_AS = {"F64": torch.float32} | dict.fromkeys(FP8, torch.bfloat16)  # the rest: as it is
SCALES = ("scale_weight", "weight_scale")  # of the older and of ComfyUI's own fp8 files
# What else an fp8 layer may have: its layer computes with plain weights from here on.
_OF_NO_USE = ("scale_input", "input_scale", "comfy_quant")
MARK = "scaled_fp8"


@dataclass(frozen=True)
class Step:
    """What was made of one layer, or of one other tensor: entries of a state dict."""

    layer: str  # "" for what is no layer that was quantised
    entries: dict[str, torch.Tensor]
    read: int  # bytes


class LayerSource:
    """The tensors of a file whose names begin with `strip`, less that beginning."""

    def __init__(self, header: Header, strip: str = "") -> None:
        """Raises CheckpointError if the file is quantised."""
        self.header, self.strip = header, strip
        self._reader = TensorReader(header)
        self._names = {n[len(strip) :]: n for n in header.tensors if n.startswith(strip)}
        self._refuse_quantised()
        self.layers = {
            name.removesuffix(".weight"): header.tensors[full].shape
            for name, full in self._names.items()
            if name.endswith(".weight") and self._is_matrix(full)
        }
        self._scales = {
            layer: f"{layer}.{scale}"
            for layer in self.layers
            for scale in SCALES
            if f"{layer}.{scale}" in self._names
        }
        self._refuse_other_scales()
        taken = (f"{layer}.{end}" for layer in self.layers for end in (*SCALES, *_OF_NO_USE))
        self._dropped = {MARK, *taken}

    def names(self) -> list[str]:
        """Every tensor of the model, in the order of the file."""
        places = {n: self.header.tensors[full] for n, full in self._names.items()}
        found = sorted(places, key=lambda n: (places[n].path, places[n].start))
        return [name for name in found if name not in self._dropped]

    def steps(self, plan: Mapping[str, str], device: torch.device) -> Iterator[Step]:
        """Everything, in the order of the file; layers of `plan` (name -> format) quantised.

        Entries of quantised layers are on `device`, the rest in RAM. Raises CheckpointError,
        OSError.
        """
        names, planned = self.names(), {f"{layer}.weight" for layer in plan}
        stored = self._one_by_one(names) if device.type == "cpu" else self._ahead(names, planned)
        for name, tensor in stored:
            layer, read = name.removesuffix(".weight"), self.header.tensors[self._names[name]].bytes
            if name in planned:
                weight = self._plain(name, tensor.to(device))
                del tensor
                entries = self._encoded(layer, weight, plan[layer])
                del weight
                yield Step(layer, entries, read)
                del entries
            else:
                yield Step("", {name: self._plain(name, tensor)}, read)
                del tensor

    def _encoded(self, layer: str, weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
        try:
            return {f"{layer}.{key}": value for key, value in encode(weight, format).items()}
        except QuantizedFileError as error:
            raise QuantizedFileError(f"{self._file}, layer {layer}: {error}") from None

    def _one_by_one(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """What the file holds of each, in memory of its own."""
        yield from ((name, self._reader.read(self._names[name])) for name in names)

    def _ahead(
        self, names: Sequence[str], planned: Collection[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same; while one is at work another thread reads the next one.

        Those of `planned` lie in two buffers by turns, so copy one before you ask for the next.
        """
        sizes = [self.header.tensors[self._names[name]].bytes for name in planned]
        buffers = cycle([own_memory(max(sizes)) for _ in range(2)]) if sizes else cycle([None])
        with ThreadPoolExecutor(1, "qwen_vram_reader") as pool:
            waiting: list[Future[torch.Tensor]] = []
            for name, following in zip([None, *names], [*names, None], strict=True):
                tensor = waiting.pop().result() if waiting else None
                if following is not None:
                    place = next(buffers) if following in planned else None
                    waiting.append(pool.submit(self._reader.read, self._names[following], place))
                if name is not None and tensor is not None:
                    yield name, tensor
                del tensor

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one after the other, as plain weights."""
        yield from ((name, self._plain(name, tensor)) for name, tensor in self._one_by_one(names))

    def entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of what `read` returns."""
        tensor = self.header.tensors[self._names[name]]
        return READ_AS.get(tensor.dtype, DTYPES[tensor.dtype]), tensor.shape

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is; fp64 in fp32, fp8 in bf16, by its scale if it has one."""
        return self._plain(name, self._reader.read(self._names[name]))

    def _plain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the file holds of a tensor, as `read` returns it, on the tensor's device."""
        dtype = self.header.tensors[self._names[name]].dtype
        if dtype not in FP8:
            return tensor.to(READ_AS.get(dtype, tensor.dtype))
        scale = self._scales.get(name.removesuffix(".weight"))
        if scale is None:
            return tensor.to(torch.bfloat16)
        factor = self._reader.read(self._names[scale]).to(tensor.device).float()
        return (tensor.float() * factor.reshape(-1, 1)).to(torch.bfloat16)

    def _is_matrix(self, full: str) -> bool:
        tensor = self.header.tensors[full]
        return len(tensor.shape) == 2 and tensor.dtype in (*PLAIN, *FP8)

    def _refuse_quantised(self) -> None:
        stored = {f for n, f in stored_formats(self.header).items() if n.startswith(self.strip)}
        if stored:
            raise CheckpointError(
                f"{self._file} is quantised already ({', '.join(sorted(stored))}) and would lose "
                "twice; open it with weight_dtype default, or quantise a file in bf16, fp16 or fp8."
            )

    def _refuse_other_scales(self) -> None:
        """fp8 weights are only read with one scale, or one for each row, as they are here."""
        for name, full in self._names.items():
            layer, _, end = name.rpartition(".")
            weight = self._names.get(f"{layer.removesuffix('.weight')}.weight", "")
            if "scale" not in end or end in _OF_NO_USE or not self._is_fp8(weight):
                continue
            rows, scale = self.header.tensors[weight].shape[:1], self.header.tensors[full].shape
            known = end in SCALES and self._is_matrix(weight)
            if not known or (prod(scale) != 1 and scale not in (rows, (*rows, 1))):
                raise CheckpointError(
                    f"{self._file} has {name} {tuple(scale)} for an fp8 weight "
                    f"{tuple(self.header.tensors[weight].shape)}, and only matrices with one scale "
                    "or one for each row can be read; use a file in bf16."
                )

    def _is_fp8(self, full: str) -> bool:
        return full in self.header.tensors and self.header.tensors[full].dtype in FP8

    @property
    def _file(self) -> str:
        return os.path.basename(self.header.path)


def stored_formats(header: Header) -> dict[str, str]:
    """The layers of a file that are quantised, fp8 apart: name -> format. QuantizedFileError."""
    return {n: f for n, f in layers_of(header).items() if not f.startswith("float8")}
