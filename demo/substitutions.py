"""The one table by which a bundled workflow runs on the embedded model; nothing else is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from . import embedded

Prompt = dict[str, dict[str, Any]]


def _name(path: str) -> str:
    return PurePosixPath(path).name


MODEL_FILES = {
    "qwen_image_2512_fp8_e4m3fn.safetensors": _name(embedded.TRANSFORMER),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": _name(embedded.TEXT_ENCODER),
    "qwen_image_vae.safetensors": _name(embedded.VAE),
    "qwen_image_edit_2511_fp8mixed.safetensors": _name(embedded.TRANSFORMER),
    "Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors": "tiny_animals_lora.safetensors",
    "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors": "tiny_animals_lora.safetensors",
}
NUMBERS: dict[str, int | float] = {
    **{"width": 256, "height": 256, "steps": 8, "cfg": 2.0},
    **{"megapixels": 0.06, "tile_size": 256, "overlap": 64},
}
PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat")

_MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


class UnknownModelFile(ValueError):
    """The workflow names a model file for which the table has no tiny stand-in."""


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _tiny_file(
    files: Mapping[str, str], value: str, node_id: str, node: dict[str, Any], name: str
) -> str:
    if not value.lower().endswith(_MODEL_SUFFIXES):
        return value
    if value not in files:
        raise UnknownModelFile(
            f"Node {node_id} ({node['class_type']}) names the model file {value!r} in {name!r}, "
            "for which demo/substitutions.py has no tiny checkpoint: add it to MODEL_FILES."
        )
    return files[value]


def _set_number(prompt: Prompt, node_id: str, name: str, number: float, seen: set[str]) -> None:
    """Sets an input to a number, following links through switches to the numbers behind it."""
    inputs = prompt[node_id]["inputs"]
    if not _is_link(inputs[name]):
        inputs[name] = number
        return
    source = inputs[name][0]
    if source in seen or source not in prompt:
        return
    seen.add(source)
    if prompt[source]["class_type"] in PRIMITIVES:
        prompt[source]["inputs"]["value"] = number
        return
    for key, value in prompt[source]["inputs"].items():
        if _is_link(value):
            _set_number(prompt, source, key, number, seen)


def substitute(prompt: Prompt, files: Mapping[str, str] = MODEL_FILES) -> Prompt:
    """A copy of an API-format prompt with model files, sizes and steps replaced by the table."""
    prompt = copy.deepcopy(prompt)
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if name in NUMBERS and (_is_link(value) or isinstance(value, (int, float))):
                _set_number(prompt, node_id, name, NUMBERS[name], set())
            elif isinstance(value, str):
                node["inputs"][name] = _tiny_file(files, value, node_id, node, name)
    return prompt
