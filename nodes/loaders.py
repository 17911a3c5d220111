"""The loaders of Qwen-Image's three models, of any size."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy_api.latest import io

from ..core import checkpoint
from ..core.quantization import DEFAULT_PRESET, FORMATS
from ..core.shared import Loaded
from . import architectures, finite_check
from .quantization_presets import all_presets
from .quantization_presets import preset as preset_of
from .shared_loader import REGISTRY as REGISTRY
from .shared_loader import SharedLoader, files_in, resolve
from .shared_loader import weight_dtype_name as weight_dtype_name
from .weight_choice import DTYPES, QUANTISED, TEXT_DTYPES, VAE_DTYPES, WEIGHT_DTYPES, Wanted, wanted

DTYPE_TOOLTIP = (
    "The type of the weights in memory; default is ComfyUI's choice for file and device. With fp8 "
    "LoRAs are added while the model computes. int8, int4 and bnb_* quantise while the file is "
    "read, to save RAM and VRAM; bnb_nf4 and bnb_fp4 need the Python package bitsandbytes. auto "
    "takes what suits file, card and memory, and says why."
)
TEXT_DTYPE_TOOLTIP = (
    "The type of the weights in memory; default is the file's own. int8, int4 and bnb_* quantise "
    "while the file is read, to save RAM and VRAM; bnb_nf4 and bnb_fp4 need the Python package "
    "bitsandbytes. auto takes what suits file, card and memory, and says why."
)
VAE_DTYPE_TOOLTIP = (
    "The type of the weights in memory; default is ComfyUI's choice for file and device."
)
PRESET_TOOLTIP = (
    "Which layers int8, int4 and bnb_* quantise: balanced keeps sensitive ones in 8 bit, best "
    "(diffusion models only) more of them, smallest fewest. auto may take smallest by itself. The "
    "help page says how to add your own. Other values of weight_dtype do not ask for it."
)


class QuantisingLoader(SharedLoader):
    """The two loaders that can quantise."""

    NEUTRAL_INPUTS = frozenset({"keep_loaded", "preset"})  # a preset's rules are in `decided`

    @classmethod
    def preset_input(cls) -> list[io.Input]:
        """Which layers are quantised. It comes last, for workflows name widgets by their order."""
        names = list(all_presets()[cls.FOLDER])
        return [
            io.Combo.Input(
                "preset",
                options=names,
                default=DEFAULT_PRESET if DEFAULT_PRESET in names else names[0],
                optional=True,
                tooltip=PRESET_TOOLTIP,
                advanced=True,
            )
        ]

    @classmethod
    def validate_inputs(cls, preset: Any = None) -> bool:
        """Let any preset pass: if the user's file is broken it is in no list, and `execute` says
        why, where ComfyUI would only say that it is not in the list."""
        return True

    @classmethod
    def wanted(
        cls, path: str, weight_dtype: str, device: str, preset: str = DEFAULT_PRESET
    ) -> Wanted:
        """What the node's values mean for this file. Raises ValueError, OSError."""
        try:
            return wanted(cls.FOLDER, path, weight_dtype, device, preset)
        except checkpoint.CheckpointError as error:
            raise ValueError(str(error)) from None  # see `acquire`

    @classmethod
    def decided(cls, **inputs: Any) -> list[Any]:
        """The format that auto and int4 took, and the rules of the preset.

        For a format by name without a look at file or package, which a cached prompt can spare.
        """
        values = {n: inputs.get(n, DEFAULT_PRESET) for n in ("weight_dtype", "device", "preset")}
        if values["weight_dtype"] not in QUANTISED:
            return []
        path = resolve(cls.FOLDER, inputs[cls.FILE_INPUT])
        if (format := values["weight_dtype"]) in FORMATS:
            rules = preset_of(cls.FOLDER, values["preset"]).rules
        else:
            found = cls.wanted(path, **values)
            format = found.name
            rules = found.quantization.preset.rules if found.quantization else ()
        return [format, [[rule.pattern, rule.format] for rule in rules]]


class LoadDiffusionModel(QuantisingLoader):
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
                    tooltip=(
                        "A Qwen-Image .safetensors file in models/diffusion_models. "
                        "Qwen-Image 2.1, GGUF and nunchaku files need other loaders, "
                        "behind which most of our nodes work: see the help page."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    tooltip=DTYPE_TOOLTIP,
                    advanced=True,
                ),
                *cls.common_inputs(),
                *cls.preset_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        device: str,
        keep_loaded: bool,
        preset: str = DEFAULT_PRESET,
    ) -> io.NodeOutput:
        """Return a clone, so that no graph can change what another one uses."""
        path = resolve(cls.FOLDER, unet_name)
        asked = cls.wanted(path, weight_dtype, device, preset)
        options = asked.options()
        acquired = cls.acquire(
            path,
            asked.key,
            keep_loaded,
            lambda: Loaded(architectures.load_transformer(path, options), {}),
        )
        handle = acquired.model.clone()
        finite_check.guard(handle)
        return cls.output(handle, handle, acquired, asked.why)


class LoadTextEncoder(QuantisingLoader):
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
                "not loaded when the prompt is known."
            ),
            search_aliases=["clip loader", "qwen 2.5 vl", "load clip", "shared"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=files_in(cls.FOLDER),
                    tooltip=(
                        "A Qwen2.5-VL .safetensors file in models/text_encoders. "
                        "The encoder of Qwen-Image 2.1, GGUF and nunchaku files need other "
                        "loaders, behind which most of our nodes work: see the help page."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(TEXT_DTYPES),
                    tooltip=TEXT_DTYPE_TOOLTIP,
                    advanced=True,
                ),
                *cls.common_inputs(),
                *cls.preset_input(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls,
        clip_name: str,
        weight_dtype: str,
        device: str,
        keep_loaded: bool,
        preset: str = DEFAULT_PRESET,
    ) -> io.NodeOutput:
        """Return a CLIP of its own around the shared weights."""
        path = resolve(cls.FOLDER, clip_name)
        asked = cls.wanted(path, weight_dtype, device, preset)
        options = asked.options()
        acquired = cls.acquire(
            path,
            asked.key,
            keep_loaded,
            lambda: architectures.split(
                architectures.load_text_encoder(path, options), "cond_stage_model"
            ),
        )
        clip = architectures.join(
            comfy.sd.CLIP, acquired.model.clone(), acquired.parts, "cond_stage_model"
        )
        return cls.output(clip, clip.patcher, acquired, asked.why)


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
                    "weight_dtype",
                    options=list(VAE_DTYPES),
                    tooltip=VAE_DTYPE_TOOLTIP,
                    advanced=True,
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
