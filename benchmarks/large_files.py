"""Random full-size files in other types, written piece by piece: 40.9 GB in bf16, and a LoRA.

Every block of the transformer holds the same numbers (time and memory do not depend on them), so
that a file costs little more than its writing. Needs COMFYUI_PATH's modules on the path.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .full_size_checkpoints import LAYERS, WEIGHT_SCALE, shapes_of, use_comfyui

DTYPES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.")
SHORT, SHORT_LORA = "diffusion_models/short_bf16.safetensors", "loras/short.safetensors"
SHORT_RANK = 16
Shapes = Mapping[str, tuple[int, ...]]


def transformer_shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Of Qwen-Image's transformer with so many blocks."""
    import comfy.ldm.qwen_image.model as transformer
    import comfy.ops

    with torch.device("meta"):
        model = transformer.QwenImageTransformer2DModel(
            num_layers=layers, dtype=torch.bfloat16, device="meta",
            operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    return {name: tuple(shape) for name, shape in shapes_of(model).items()}


def text_encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Of Qwen2.5-VL-7B."""
    import comfy.ops
    from comfy.text_encoders import llama

    with torch.device("meta"):
        model = llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", comfy.ops.disable_weight_init)
    return {name: tuple(shape) for name, shape in shapes_of(model).items()}


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether it is stored in the file's small type."""
    return len(shape) >= 2 and min(shape) > 1


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal matrices, unit norms, zero biases, in RAM."""
    if not is_matrix(shape):
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = torch.randn(shape, device=device, dtype=torch.bfloat16) * WEIGHT_SCALE
    return made.to(dtype).cpu()


def pieces(shapes: Shapes, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensors in the order of the names; those of the first block serve all of them."""
    first: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        match = BLOCK.match(name)
        if match is None:
            yield values(name, shape, dtype)
            continue
        rest = name[match.end() :]
        if rest not in first:
            first[rest] = values(name, shape, dtype)
        yield first[rest]


def write_file(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """One safetensors file; matrices in `dtype`, the rest in bf16."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        kind = dtype if is_matrix(shape) else torch.bfloat16
        begin, end = end, end + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in pieces(shapes, dtype):
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
    partial.replace(path)


def write_lora(path: Path, shapes: Shapes, rank: int) -> None:
    """A LoRA of all linear layers of the blocks, in bf16, under ComfyUI's names."""
    own: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2 and BLOCK.match(name):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            own[f"{layer}.lora_A.weight"] = (rank, shape[1])
            own[f"{layer}.lora_B.weight"] = (shape[0], rank)
    write_file(path, own, torch.bfloat16)


def main() -> None:
    """python -m benchmarks.large_files MODELS LAYERS: a short bf16 transformer and its LoRA."""
    models, layers = Path(sys.argv[1]), int(sys.argv[2])
    use_comfyui()
    shapes = transformer_shapes(layers)
    write_file(models / SHORT, shapes, torch.bfloat16)
    write_lora(models / SHORT_LORA, shapes, SHORT_RANK)


if __name__ == "__main__":
    main()
