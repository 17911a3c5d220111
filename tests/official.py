"""The official templates, untouched, as API graphs on the embedded model."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path, PurePosixPath
from typing import Any

from pack.core.sign_codes import sign_codes
from pack.demo.conversion import to_api
from pack.demo.embedded import FOLDER, TEXT_ENCODER, TRANSFORMER, VAE
from pack.demo.substitutions import MODEL_FILES, substitute
from safetensors.torch import load_file, save_file

STOCK_TEXT_ENCODER = "animals_with_vocabulary.safetensors"
_LORA = "tiny_animals_lora.safetensors"
_TRANSFORMER = PurePosixPath(TRANSFORMER).name
FILES = {
    **MODEL_FILES,
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": STOCK_TEXT_ENCODER,
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": _TRANSFORMER,
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors": _LORA,
}

NARROW_VAE = "narrow_animals_vae.safetensors"
OUTER_SIDES = {  # of its tensors: channels of the picture and of the latent
    **{f"{name}.{kind}": (0, 1) for name in ("conv1", "conv2") for kind in ("weight", "bias")},
    **{f"{name}.conv1.weight": (1,) for name in ("encoder", "decoder")},
    **{f"{n}.head.2.{kind}": (0,) for n in ("encoder", "decoder") for kind in ("weight", "bias")},
}


def write_stock_text_encoder(models: Path) -> None:
    """The embedded encoder with its vocabulary written out, which the stock loader needs."""
    tensors = load_file(FOLDER / TEXT_ENCODER)
    norm = tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = sign_codes(len(norm)).to(norm.dtype)
    save_file(tensors, models / "text_encoders" / STOCK_TEXT_ENCODER)


def write_narrow_vae(models: Path) -> None:
    """The embedded VAE with a quarter of its channels: quick where a picture need not be good."""
    tensors = load_file(FOLDER / VAE)
    for name, tensor in tensors.items():
        for side in range(min(tensor.ndim, 2)):
            if tensor.shape[side] > 1 and side not in OUTER_SIDES.get(name, ()):
                tensor = tensor.narrow(side, 0, tensor.shape[side] // 4)
        tensors[name] = tensor.contiguous()
    save_file(tensors, models / "vae" / NARROW_VAE)


def rename(graph: dict[str, Any], files: dict[str, str]) -> None:
    """Other files for all nodes of a graph."""
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str):
                node["inputs"][name] = files.get(value, value)


def template(name: str, object_info: dict[str, Any], seed: int = 7) -> dict[str, Any]:
    """A template of comfyui-workflow-templates with small files, sizes and a fixed seed."""
    folder = importlib.resources.files("comfyui_workflow_templates_json") / "templates"
    workflow = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    pictures = {
        node["inputs"]["image"]: node["inputs"]["image"]
        for node in to_api(workflow, object_info).values()
        if node["class_type"] == "LoadImage"
    }
    graph = substitute(to_api(workflow, object_info), {**FILES, **pictures})
    for node in graph.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = seed
    return graph
