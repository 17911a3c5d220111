"""ComfyUI's own modules, small, with an initialisation to train from and files to load them by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .host import QwenImageTransformer2DModel, Wan21, operations, wan

VAE_DIM = 8
LAYERS, HEADS, HEAD_DIM, ROPE_AXES = 6, 4, 32, (4, 14, 14)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.chmod(0o644)
    os.replace(partial, path)


# -------------------------------------------------------------------------------- transformer
def new_transformer(text_width: int) -> QwenImageTransformer2DModel:
    """A transformer that at first predicts nothing at all."""
    model = QwenImageTransformer2DModel(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=text_width,
        axes_dims_rope=ROPE_AXES,
        default_ref_method="index_timestep_zero",
        dtype=torch.float32,
        device="cpu",
        operations=operations,
    )
    initialise(model, 10, ("img_mod.1.", "txt_mod.1.", "norm_out.linear.", "proj_out."))
    return model


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
