"""Writes random checkpoints with the official files' names, keys, shapes and dtypes (30 GB).

Time and memory depend on shapes and dtypes, not on values, so these stand in for the real files
where those cannot be had. Usage: COMFYUI_PATH=... python -m benchmarks.full_size_checkpoints
MODELS_DIRECTORY [LAYERS]. Values are drawn on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TRANSFORMER = "diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors"
TEXT_ENCODER = "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"
VAE = "vae/qwen_image_vae.safetensors"
WEIGHT_SCALE = 0.02
LAYERS = 60


def use_comfyui() -> None:
    """Make ComfyUI's modules importable; they take the CPU where there is no CUDA card.

    Its options are not parsed. Raises SystemExit where COMFYUI_PATH is not set.
    """
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("Set COMFYUI_PATH to the folder of ComfyUI: its code has the shapes.")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of everything that the module's checkpoint holds."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def random_weights(
    shapes: dict[str, torch.Size], matrices: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Normal matrices, unit norms, zero biases."""
    state = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and min(shape) > 1:
            values = torch.randn(shape, device=device, dtype=torch.bfloat16) * WEIGHT_SCALE
            state[name] = values.to(matrices).cpu()
        else:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            state[name] = fill(shape, dtype=torch.bfloat16)
    return state


def with_scales(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The "fp8_scaled" layout: a scale beside every fp8 matrix of the language model."""
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        scaled[name] = tensor
        if tensor.dtype == torch.float8_e4m3fn and name.startswith("model.layers."):
            scaled[name.removesuffix("weight") + "scale_weight"] = torch.ones(1)
        elif tensor.dtype == torch.float8_e4m3fn:
            scaled[name] = tensor.to(torch.bfloat16)
    return scaled


def wan_vae() -> torch.nn.Module:
    """Of the published sizes."""
    import comfy.ldm.wan.vae as vae

    return vae.WanVAE(
        dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip


def write_vae(path: Path) -> None:
    """The VAE alone."""
    with torch.device("meta"):
        shapes = shapes_of(wan_vae())
    path.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    save_file(random_weights(shapes, torch.bfloat16, device), path)


def write_all(models: Path, layers: int = LAYERS) -> None:
    """Write the files that are not there yet; a short transformer gets no text encoder."""
    import comfy.ldm.qwen_image.model as transformer
    import comfy.ops
    from comfy.text_encoders import llama

    device = "cuda" if torch.cuda.is_available() else "cpu"
    operations = comfy.ops.disable_weight_init
    torch.manual_seed(0)
    with torch.device("meta"):
        dit = transformer.QwenImageTransformer2DModel(
            num_layers=layers, dtype=torch.bfloat16, device="meta", operations=operations
        )
        text = llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", operations)
        wan = wan_vae()
    fp8 = torch.float8_e4m3fn
    for name, module, dtype in (
        (TRANSFORMER, dit, fp8),
        (TEXT_ENCODER, text, fp8),
        (VAE, wan, torch.bfloat16),
    ):
        path = models / name
        if path.exists() or (name == TEXT_ENCODER and layers != LAYERS):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        state = random_weights(shapes_of(module), dtype, device)
        save_file(with_scales(state) if name == TEXT_ENCODER else state, path)
        print(f"{name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size_checkpoints",
        description="Writes random checkpoints with the official names, keys, shapes and dtypes: "
        "30 GB (transformer 20.4, text encoder 9.0, VAE 0.25). Files that are there stay. "
        "Needs COMFYUI_PATH, the folder of ComfyUI.",
    )
    line.add_argument("models", type=Path, metavar="MODELS_DIRECTORY", help="BASE/models")
    line.add_argument(
        "layers",
        nargs="?",
        type=int,
        default=LAYERS,
        metavar="LAYERS",
        help=f"a transformer with so many of its {LAYERS} blocks, and no text encoder, for tests",
    )
    return line


if __name__ == "__main__":
    arguments = parser().parse_args()
    use_comfyui()
    write_all(arguments.models, arguments.layers)
