"""What the three loaders share: one model per file and options, and what the node shows of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core import checkpoint
from ..core.file_identity import FileIdentity, identify
from ..core.host_formats import OUR_NAMES
from ..core.shared import Acquired, Loaded, ModelKey, SharedRegistry
from . import environment
from .quantized_loading import formats_in
from .status import shown, size_text

REGISTRY: SharedRegistry[ModelPatcher] = SharedRegistry()

KEEP_TOOLTIP = (
    "Keep the model in RAM although no graph uses it any more. ComfyUI may still move it out of "
    "VRAM. Switch it off and run to let go."
)
DEVICE_TOOLTIP = "Where the model computes; default is ComfyUI's choice."


def device_options() -> list[str]:
    """default, cpu and every accelerator, under ComfyUI's own names (gpu:0, gpu:1 ...)."""
    count = len(comfy.model_management.get_all_torch_devices())
    gpus = [] if comfy.model_management.cpu_mode() else [f"gpu:{i}" for i in range(count)]
    return ["default", "cpu", *gpus]


class FileNames(list[str]):
    """Names to choose from. ComfyUI's check of a graph asks whether a name is `in` them, and then
    says no more than "not in list": a GGUF file passes, so that `resolve` says what opens it."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or checkpoint.is_gguf(name)


def files_in(folder: str) -> FileNames:
    """The safetensors files of a models folder; other formats cannot be read without pickle."""
    names = folder_paths.get_filename_list(folder)
    return FileNames(n for n in names if n.lower().endswith(checkpoint.SAFETENSORS_SUFFIXES))


def resolve(folder: str, name: str) -> str:
    """The path of a file of a models folder. Raises ValueError that names folder and remedy."""
    if checkpoint.is_gguf(name):  # there or not: to put it there would be no remedy
        kind = checkpoint.GGUF_VAE if folder == "vae" else checkpoint.GGUF
        raise ValueError(f"{name} is {kind}")
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{name} is not in models/{folder}; put it there, "
            "or pick another file and press R to refresh."
        )
    return path


class SharedLoader(io.ComfyNode):
    """What the three loaders have in common."""

    FOLDER: str
    FILE_INPUT: str
    NEUTRAL_INPUTS = frozenset({"keep_loaded"})

    @classmethod
    def common_inputs(cls) -> list[io.Input]:
        """device and keep_loaded."""
        return [
            io.Combo.Input(
                "device", options=device_options(), tooltip=DEVICE_TOOLTIP, advanced=True
            ),
            io.Boolean.Input("keep_loaded", default=False, tooltip=KEEP_TOOLTIP, advanced=True),
        ]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[Any]:
        """The version of the file: when it is replaced, ComfyUI runs the loader again."""
        name = inputs[cls.FILE_INPUT]
        if not isinstance(name, str):
            return ["computed by another node"]
        path = folder_paths.get_full_path(cls.FOLDER, name)
        try:
            files = identify(path) if path else []
            decided = cls.decided(**inputs) if path else []
        except (OSError, ValueError) as error:  # execute says it in a sentence
            return ["unreadable", str(error)]
        if not files:
            return ["missing"]
        if not inputs.get("keep_loaded"):  # here, because a cached prompt spares the loader its run
            REGISTRY.let_go(cls.keeper(), first_shard(files).path)
        rows = [value for file in files for value in (file.path, file.size, file.mtime_ns)]
        return [*rows, *decided]

    @classmethod
    def decided(cls, **inputs: Any) -> list[Any]:
        """What else decides the numbers of the model, and no input tells. Raises ValueError."""
        return []

    @classmethod
    def keeper(cls) -> str:
        """Who keeps a model loaded: the loader node that runs now."""
        context = get_executing_context()
        return f"{cls.FOLDER}:{context.node_id if context else ''}"

    @classmethod
    def acquire(
        cls, path: str, options: tuple[Any, ...], keep: bool, load: Callable[[], Loaded]
    ) -> Acquired:
        """The one model of this file and these options, loaded now or shared."""
        files = identify(path)

        def load_unchanged() -> Loaded:
            loaded = load()
            if identify(path) != files:
                raise ValueError(f"{os.path.basename(path)} changed while it was read; run again.")
            return loaded

        first = first_shard(files)
        key = ModelKey(first, (cls.FOLDER, *options, *sorted(f for f in files if f != first)))
        try:
            acquired = REGISTRY.acquire(key, load_unchanged, cls.keeper() if keep else None)
        except checkpoint.CheckpointError as error:
            # ComfyUI shows the type before the sentence; a built-in one has the shorter name.
            raise ValueError(str(error)) from None
        for file in files:
            environment.LOADED.record(acquired.model.model, file)
        return acquired

    @classmethod
    def output(
        cls, handle: Any, patcher: ModelPatcher, acquired: Acquired, why: str = ""
    ) -> io.NodeOutput:
        """Hand out `handle` and show what it is, and why it was loaded so."""
        acquired.entry.handles.add(handle)
        formats = formats_in(patcher.model)
        facts = {
            "bytes": patcher.model_size(),
            "dtype": weight_dtype_name(patcher),
            "formats": formats,
            "why": why,
            "device": str(patcher.load_device),
            "holders": len(acquired.entry.handles),
            "reused": acquired.reused,
            "seconds": round(acquired.seconds, 3),
        }
        sharing = f"shared by {facts['holders']}" if facts["holders"] > 1 else "not shared"
        seconds = f"{acquired.seconds:.2f} s"
        load = f"reused (load took {seconds})" if acquired.reused else f"loaded in {seconds}"
        weights = ", ".join(f"{n} layers {short_name(f)}" for f, n in sorted(formats.items()))
        parts = (
            *(size_text(facts["bytes"]), weights or facts["dtype"], facts["device"]),
            *(sharing, load, why),
        )
        return shown(handle, text=" · ".join(part for part in parts if part), **facts)


def first_shard(files: list[FileIdentity]) -> FileIdentity:
    """The file that stands for a model of several: whichever of them was picked."""
    return min(files)


def weight_dtype_name(patcher: ModelPatcher) -> str:
    """The dtype or format that most of the model's weights have when loaded, by its short name.

    With dynamic VRAM the weights stay as the file has them until they are used; what they are
    cast to then stands beside them (comfy.model_management.archive_model_dtypes).
    """
    sizes: Counter[str] = Counter()
    for module in patcher.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                kind = module.quant_format
            else:
                dtype = getattr(module, f"{name}_comfy_model_dtype", parameter.dtype)
                kind = str(dtype).removeprefix("torch.")
            sizes[kind] += parameter.numel()
    return short_name(sizes.most_common(1)[0][0])


def short_name(kind: str) -> str:
    """The field's name for a dtype of torch's or a format of ComfyUI's."""
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", **OUR_NAMES}
    return known.get(kind, kind.replace("float8", "fp8"))
