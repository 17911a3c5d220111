"""Shared lazy loaders: one model per file and options, whatever its size."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core import checkpoint
from ..core.file_identity import FileIdentity
from ..core.shared import Acquired, Loaded, ModelKey, SharedRegistry
from . import architectures, environment
from .status import shown, size_text

REGISTRY: SharedRegistry[ModelPatcher] = SharedRegistry()

DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
TEXT_DTYPES = tuple(name for name in DTYPES if name != "fp8_e4m3fn_fast")
VAE_DTYPES = ("default", "bf16", "fp16", "fp32")  # the host's VAEs cannot hold fp8 weights

KEEP_TOOLTIP = (
    "Keep the model in RAM although no graph uses it any more. ComfyUI may still move it out of "
    "VRAM. Switch it off and run to let go."
)
DTYPE_TOOLTIP = (
    "The type of the weights in memory; default is ComfyUI's choice for file and device."
)
TEXT_DTYPE_TOOLTIP = "The type of the weights in memory; default is the file's own."
DEVICE_TOOLTIP = "Where the model computes; default is ComfyUI's choice."


def device_options() -> list[str]:
    """default, cpu and every accelerator, under ComfyUI's own names (gpu:0, gpu:1 ...)."""
    count = len(comfy.model_management.get_all_torch_devices())
    gpus = [] if comfy.model_management.cpu_mode() else [f"gpu:{i}" for i in range(count)]
    return ["default", "cpu", *gpus]


def files_in(folder: str) -> list[str]:
    """The safetensors files of a models folder; other formats cannot be read without pickle."""
    names = folder_paths.get_filename_list(folder)
    return [n for n in names if n.lower().endswith(checkpoint.SAFETENSORS_SUFFIXES)]


def resolve(folder: str, name: str) -> str:
    """The path of a file of a models folder. Raises ValueError that names folder and remedy."""
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
            file = FileIdentity.of(path) if path else None
        except OSError as error:  # execute says it in a sentence
            return ["unreadable", str(error)]
        if file is None:
            return ["missing"]
        if not inputs.get("keep_loaded"):  # here, because a cached prompt spares the loader its run
            REGISTRY.let_go(cls.keeper(), file.path)
        return [file.path, file.size, file.mtime_ns]

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
        file = FileIdentity.of(path)

        def load_unchanged() -> Loaded:
            loaded = load()
            if FileIdentity.of(path) != file:
                raise ValueError(f"{os.path.basename(path)} changed while it was read; run again.")
            return loaded

        key = ModelKey(file, (cls.FOLDER, *options))
        try:
            acquired = REGISTRY.acquire(key, load_unchanged, cls.keeper() if keep else None)
        except checkpoint.CheckpointError as error:
            # ComfyUI shows the type before the sentence; a built-in one has the shorter name.
            raise ValueError(str(error)) from None
        environment.LOADED.record(acquired.model.model, file)
        return acquired

    @classmethod
    def output(cls, handle: Any, patcher: ModelPatcher, acquired: Acquired) -> io.NodeOutput:
        """Hand out `handle` and show what it is."""
        acquired.entry.handles.add(handle)
        facts = {
            "bytes": patcher.model_size(),
            "dtype": weight_dtype_name(patcher),
            "device": str(patcher.load_device),
            "holders": len(acquired.entry.handles),
            "reused": acquired.reused,
            "seconds": round(acquired.seconds, 3),
        }
        sharing = f"shared by {facts['holders']}" if facts["holders"] > 1 else "not shared"
        seconds = f"{acquired.seconds:.2f} s"
        load = f"reused (load took {seconds})" if acquired.reused else f"loaded in {seconds}"
        text = " · ".join(
            (size_text(facts["bytes"]), facts["dtype"], facts["device"], sharing, load)
        )
        return shown(handle, text=text, **facts)


def weight_dtype_name(patcher: ModelPatcher) -> str:
    """The dtype that most of the model's weights have when loaded, in the field's short names.

    With dynamic VRAM the weights stay as the file has them until they are used; what they are
    cast to then stands beside them (comfy.model_management.archive_model_dtypes).
    """
    sizes: dict[torch.dtype, int] = {}
    for module in patcher.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", parameter.dtype)
            sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(
        name, name.replace("float8", "fp8")
    )


class LoadDiffusionModel(SharedLoader):
    """Load a Qwen-Image transformer of any size."""

    FOLDER = "diffusion_models"
    FILE_INPUT = "unet_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMLoadDiffusionModel.md."""
        return io.Schema(
            node_id="QwenVRAMLoadDiffusionModel",
            display_name="Load Diffusion Model (Qwen VRAM)",
            category="Qwen VRAM/loaders",
            description=(
                "Loads a Qwen-Image transformer once per file, "
                "however many nodes and graphs use it."
            ),
            search_aliases=["unet loader", "qwen image", "load diffusion model", "shared"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=files_in(cls.FOLDER),
                    tooltip="A Qwen-Image .safetensors file in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(DTYPES), tooltip=DTYPE_TOOLTIP, advanced=True
                ),
                *cls.common_inputs(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, device: str, keep_loaded: bool
    ) -> io.NodeOutput:
        """Return a clone, so that no graph can change what another one uses."""
        path = resolve(cls.FOLDER, unet_name)
        options = architectures.model_options(DTYPES[weight_dtype], device)
        if weight_dtype == "fp8_e4m3fn_fast":
            options["fp8_optimizations"] = True
        acquired = cls.acquire(
            path,
            (weight_dtype, device),
            keep_loaded,
            lambda: Loaded(architectures.load_transformer(path, options), {}),
        )
        handle = acquired.model.clone()
        return cls.output(handle, handle, acquired)


class LoadTextEncoder(SharedLoader):
    """Load a Qwen2.5-VL text encoder of any size."""

    FOLDER = "text_encoders"
    FILE_INPUT = "clip_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMLoadTextEncoder.md."""
        return io.Schema(
            node_id="QwenVRAMLoadTextEncoder",
            display_name="Load Text Encoder (Qwen VRAM)",
            category="Qwen VRAM/loaders",
            description=(
                "Loads the Qwen2.5-VL text encoder once per file. Behind Cached Text Encode it is "
                "not even opened when the prompt is known."
            ),
            search_aliases=["clip loader", "qwen 2.5 vl", "load clip", "shared"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=files_in(cls.FOLDER),
                    tooltip="A Qwen2.5-VL .safetensors file in models/text_encoders.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(TEXT_DTYPES),
                    tooltip=TEXT_DTYPE_TOOLTIP,
                    advanced=True,
                ),
                *cls.common_inputs(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls, clip_name: str, weight_dtype: str, device: str, keep_loaded: bool
    ) -> io.NodeOutput:
        """Return a CLIP of its own around the shared weights."""
        path = resolve(cls.FOLDER, clip_name)
        options = architectures.model_options(DTYPES[weight_dtype], device)
        acquired = cls.acquire(
            path,
            (weight_dtype, device),
            keep_loaded,
            lambda: architectures.split(
                architectures.load_text_encoder(path, options), "cond_stage_model"
            ),
        )
        clip = architectures.join(
            comfy.sd.CLIP, acquired.model.clone(), acquired.parts, "cond_stage_model"
        )
        return cls.output(clip, clip.patcher, acquired)


class LoadVAE(SharedLoader):
    """Load a Qwen-Image (Wan 2.1 architecture) VAE of any size."""

    FOLDER = "vae"
    FILE_INPUT = "vae_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMLoadVAE.md."""
        return io.Schema(
            node_id="QwenVRAMLoadVAE",
            display_name="Load VAE (Qwen VRAM)",
            category="Qwen VRAM/loaders",
            description=(
                "Loads the Qwen-Image VAE once per file, however many nodes and graphs use it."
            ),
            search_aliases=["vae loader", "qwen image vae", "wan vae", "shared"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=files_in(cls.FOLDER),
                    tooltip="A Qwen-Image VAE, a .safetensors file in models/vae.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(VAE_DTYPES), tooltip=DTYPE_TOOLTIP, advanced=True
                ),
                *cls.common_inputs(),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(
        cls, vae_name: str, weight_dtype: str, device: str, keep_loaded: bool
    ) -> io.NodeOutput:
        """Return a VAE of its own around the shared weights."""
        path = resolve(cls.FOLDER, vae_name)
        acquired = cls.acquire(
            path,
            (weight_dtype, device),
            keep_loaded,
            lambda: architectures.split(
                architectures.load_vae(path, DTYPES[weight_dtype], device), "first_stage_model"
            ),
        )
        vae = architectures.join(
            comfy.sd.VAE, acquired.model.clone(), acquired.parts, "first_stage_model"
        )
        return cls.output(vae, vae.patcher, acquired)


NODES = [LoadDiffusionModel, LoadTextEncoder, LoadVAE]
