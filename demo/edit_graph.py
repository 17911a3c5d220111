"""An edit as a graph in ComfyUI's API format, on the embedded model."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from .embedded import TEXT_ENCODER, TRANSFORMER, VAE
from .substitutions import Prompt


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


TITLES = {"DiffusionModel": "Load Diffusion Model", "TextEncoder": "Load Text Encoder"}


def _load(kind: str, name: str, path: str) -> dict[str, Any]:
    file = {name: PurePosixPath(path).name}
    options = {"weight_dtype": "default", "device": "default", "keep_loaded": False}
    return _node(
        f"QwenVRAMLoad{kind}", f"{TITLES.get(kind, f'Load {kind}')} (Qwen VRAM)", **file, **options
    )


def edit_graph(picture: str, instruction: str, seed: int = 0) -> Prompt:
    """Changes `picture`, a file in ComfyUI's input folder, in its own size.

    The edit node gets no VAE: it would give the model a reference of a million pixels, and this
    model has seen none beyond 512x512. ReferenceLatent gives it the picture as it is.
    """
    return {
        "unet": _load("DiffusionModel", "unet_name", TRANSFORMER),
        "clip": _load("TextEncoder", "clip_name", TEXT_ENCODER),
        "vae": _load("VAE", "vae_name", VAE),
        "picture": _node("LoadImage", "Load Image", image=picture),
        "encoded": _node("VAEEncode", "VAE Encode", pixels=["picture", 0], vae=["vae", 0]),
        "instruction": _node(
            "TextEncodeQwenImageEditPlus",
            "Instruction",
            **{"clip": ["clip", 0], "prompt": instruction, "image1": ["picture", 0]},
        ),
        "reference": _node(
            *("ReferenceLatent", "Set Reference Latent"),
            **{"conditioning": ["instruction", 0], "latent": ["encoded", 0]},
        ),
        "shift": _node("ModelSamplingAuraFlow", "Sampling shift", model=["unet", 0], shift=3.1),
        "sampler": _node(
            *("KSampler", "KSampler"),
            **{"model": ["shift", 0], "positive": ["reference", 0], "negative": ["reference", 0]},
            **{"latent_image": ["encoded", 0], "seed": seed, "steps": 8, "cfg": 1.0},
            **{"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        ),
        "decode": _node("VAEDecode", "VAE Decode", samples=["sampler", 0], vae=["vae", 0]),
        "save": _node(
            "SaveImage", "Save Image", images=["decode", 0], filename_prefix="qwen_image_edit"
        ),
    }
