"""Writes random tiny checkpoints with the true key names, from ComfyUI's own modules."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HEADS, HEAD_DIM, ROPE_AXES = 4, 32, (4, 14, 14)
TEXT_HIDDEN = 64
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_layers": 2}
LAYERS = 2
LORA_RANK = 4
LORA_GAIN = 4.0  # enough for a change that the eye sees in a picture of random weights
ANIMALS_LORA_GAIN = 0.3  # the embedded model still draws, but another picture
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# ComfyUI can be imported only once its folder is on the path and its arguments are parsed, so
# what comes from it is imported inside the functions.


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Ones for norms, zeros for biases, and weights that keep the scale of what passes through."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1 or name.endswith("gamma"):
                parameter.fill_(1.0)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(generator=generator)
            else:
                parameter.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)


def _save(
    tensors: Iterable[tuple[str, torch.Tensor]], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes bf16 tensors under a temporary name first, so that no half file is ever found."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    half = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors}
    save_file(half, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors writes 0600
    os.replace(partial, path)


def write_transformer(path: Path, ref_method: str = "index") -> None:
    """Writes a narrow Qwen-Image transformer; "index_timestep_zero" marks it as Edit-2511."""
    import comfy.ops
    import torch
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=ROPE_AXES,
        default_ref_method=ref_method,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    _randomise(model, seed=1)
    _save(model.state_dict().items(), path)


def write_text_encoder(path: Path) -> None:
    """Writes a narrow Qwen2.5-VL with the full vocabulary and a small vision tower."""
    import comfy.ops
    import torch
    from comfy.text_encoders import llama, qwen_vl

    config = llama.Qwen25_7BVLI_Config(
        hidden_size=TEXT_HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,  # ComfyUI recognises the encoder by 4 x 128 key-value channels
    )
    place = {"device": "cpu", "dtype": torch.float32, "ops": comfy.ops.disable_weight_init}
    encoder = torch.nn.Module()
    encoder.model = llama.Llama2_(config, **place)
    encoder.visual = qwen_vl.Qwen2VLVisionTransformer(
        output_hidden_size=TEXT_HIDDEN, **VISION, **place
    )
    _randomise(encoder, seed=2)
    # The number of vision heads is the one size that no weight tells.
    sizes = json.dumps({"vision_heads": VISION["num_heads"]})
    _save(encoder.state_dict().items(), path, metadata={"qwen_vram": sizes})


def write_vae(path: Path) -> None:
    """Writes a narrow Wan 2.1 VAE, the VAE of Qwen-Image."""
    from comfy.ldm.wan.vae import WanVAE

    vae = WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    _randomise(vae, seed=3)
    _save(vae.state_dict().items(), path)


def write_lora(path: Path, blocks: int, gain: float) -> None:
    """Writes a random LoRA for the first `blocks`; both models have the same width."""
    import torch

    generator = torch.Generator().manual_seed(4)
    width = HEADS * HEAD_DIM
    tensors: dict[str, torch.Tensor] = {}
    for block in range(blocks):
        for target in LORA_TARGETS:
            key = f"transformer_blocks.{block}.attn.{target}"
            down = torch.randn(LORA_RANK, width, generator=generator) * width**-0.5
            tensors[f"{key}.lora_down.weight"] = down
            up = torch.randn(width, LORA_RANK, generator=generator) * gain
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(float(LORA_RANK))
    _save(tensors.items(), path)


def write_all(out_dir: Path) -> None:
    """Writes every tiny checkpoint into the subfolders of a ComfyUI models folder."""
    transformers = out_dir / "diffusion_models"
    write_transformer(transformers / "tiny_qwen_image.safetensors")
    write_transformer(transformers / "tiny_qwen_image_edit.safetensors", "index_timestep_zero")
    write_text_encoder(out_dir / "text_encoders" / "tiny_qwen_2.5_vl.safetensors")
    write_vae(out_dir / "vae" / "tiny_wan_vae.safetensors")
    write_lora(out_dir / "loras" / "tiny_lightning.safetensors", LAYERS, LORA_GAIN)
    write_lora(out_dir / "loras" / "tiny_animals_lora.safetensors", 6, ANIMALS_LORA_GAIN)


def main() -> None:
    """Makes the ComfyUI of COMFYUI_PATH importable on the CPU and writes into the folder given."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    write_all(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
