"""ComfyUI's own modules, small, with an initialisation to train from and files to load them by."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.use_pytorch_cross_attention = True
args.cpu = not torch.cuda.is_available()
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.latent_formats import Wan21  # noqa: E402
from comfy.ldm.qwen_image.model import (  # noqa: E402
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,  # noqa: F401
)
from comfy.ldm.wan import vae as wan  # noqa: E402
from comfy.text_encoders import llama, qwen_vl  # noqa: E402

comfy.model_management.in_training = True  # rope without the kernel that has no gradient

VOCABULARY = 152064
TEXT_HIDDEN = 64
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "num_layers": 1}
ATTENTION_GAIN = 0.02  # untrained attention must not blur the words
VAE_DIM = 8
LAYERS, HEADS, HEAD_DIM, ROPE_AXES = 6, 4, 32, (4, 14, 14)

TRANSFORMER_FILE = "diffusion_models/tiny_animals_edit.safetensors"
TEXT_ENCODER_FILE = "text_encoders/tiny_animals_text.safetensors"
VAE_FILE = "vae/tiny_animals_vae.safetensors"


def initialise(module: torch.nn.Module, seed: int, zero: tuple[str, ...] = ()) -> None:
    """Ones for norms, zeros for biases and `zero`, the rest keeps the scale of what passes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name.endswith("bias") or any(part in name for part in zero):
                parameter.zero_()
            elif parameter.ndim == 1 or name.endswith("gamma"):
                parameter.fill_(1.0)
            else:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter[0].numel() ** -0.5)


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes under a temporary name first, readable by everyone."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.chmod(0o644)
    os.replace(partial, path)


# -------------------------------------------------------------------------------- transformer
def new_transformer() -> QwenImageTransformer2DModel:
    """A transformer that at first predicts nothing at all."""
    model = QwenImageTransformer2DModel(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=ROPE_AXES,
        default_ref_method="index_timestep_zero",
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    initialise(model, 10, ("img_mod.1.", "txt_mod.1.", "norm_out.linear.", "proj_out."))
    return model


# ------------------------------------------------------------------------------- text encoder
def sign_codes() -> torch.Tensor:
    """The vocabulary: fixed signs from integer arithmetic (splitmix64 of the row), never stored."""
    words = (TEXT_HIDDEN + 63) // 64
    x = np.arange(VOCABULARY * words, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    bits = np.unpackbits(x.view(np.uint8).reshape(VOCABULARY, words * 8), axis=1)
    return torch.from_numpy(bits[:, :TEXT_HIDDEN].astype(np.float32)) * 2 - 1


class TextEncoder(torch.nn.Module):
    """Qwen2.5-VL's parts under their names in the file."""

    def __init__(self) -> None:
        super().__init__()
        config = llama.Qwen25_7BVLI_Config(
            vocab_size=1,  # the codes are looked up outside
            hidden_size=TEXT_HIDDEN,
            intermediate_size=TEXT_HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        place = {"device": "cpu", "dtype": torch.float32, "ops": comfy.ops.disable_weight_init}
        self.model = llama.Llama2_(config, **place)
        self.visual = qwen_vl.Qwen2VLVisionTransformer(
            output_hidden_size=TEXT_HIDDEN, **VISION, **place
        )
        initialise(self, 11)
        with torch.no_grad():
            self.model.layers[0].self_attn.o_proj.weight.mul_(ATTENTION_GAIN)
            self.model.layers[0].mlp.down_proj.weight.mul_(0.3)

    def features(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of embeddings, but for the attention, which is nearly off."""
        layer = self.model.layers[0]
        x = embeddings + layer.mlp(layer.post_attention_layernorm(embeddings))
        return self.model.norm(x)

    def save(self, path: Path) -> None:
        """Writes everything but the vocabulary."""
        state = {k: v.half() for k, v in self.state_dict().items() if "embed_tokens" not in k}
        hints = {"vision_heads": VISION["num_heads"], "vocabulary": "sign_codes"}
        save(state, path, {"qwen_vram": json.dumps(hints)})


# ---------------------------------------------------------------------------------------- VAE
def new_vae() -> wan.WanVAE:
    """A Wan 2.1 VAE of which only the last tap in time is used: single pictures see no other."""
    vae = wan.WanVAE(
        dim=VAE_DIM,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    initialise(vae, 12, ("residual.6.weight", ".proj.weight"))
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 5:
                if "time_conv" in name:
                    parameter.zero_()
                elif parameter.shape[2] == 3:
                    parameter.mul_(3**0.5)[:, :, :2] = 0
    return vae


def flat_convolution(
    self: wan.CausalConv3d, x: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    """A causal convolution of one frame, in two dimensions: the same numbers, faster."""
    weight = self.weight[:, :, -1]
    y = F.conv2d(x.squeeze(2), weight, self.bias, self.stride[1:], self.padding[1:])
    return y.unsqueeze(2)


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Wan 2.1's published mean and deviation of each latent channel."""
    form = Wan21()
    return form.latents_mean.flatten(), form.latents_std.flatten()


def fold_statistics(vae: wan.WanVAE, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Gives the latents Wan 2.1's published statistics, by its two 1x1x1 convolutions."""
    goal_mean, goal_std = (s.to(mean) for s in statistics())
    gain = goal_std / std
    with torch.no_grad():
        weight, bias = vae.conv1.weight, vae.conv1.bias
        weight[:16] *= gain.view(-1, 1, 1, 1, 1)
        bias[:16] = (bias[:16] - mean) * gain + goal_mean
        weight, bias = vae.conv2.weight, vae.conv2.bias
        bias += weight[:, :, 0, 0, 0] @ (mean - goal_mean / gain)
        weight /= gain.view(1, -1, 1, 1, 1)


def to_model(latents: torch.Tensor) -> torch.Tensor:
    """Latents of the VAE, (B, 16, 1, h, w), as the transformer sees them."""
    mean, std = (s.view(1, -1, 1, 1, 1).to(latents) for s in statistics())
    return (latents - mean) / std


def from_model(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_model`."""
    mean, std = (s.view(1, -1, 1, 1, 1).to(latents) for s in statistics())
    return latents * std + mean
