"""Small models whose layers are quantised, as the loaders build them, and LoRAs for them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from pack.tests.host import Host
from safetensors.torch import load_file, save_file

WIDTH = 128  # of both small transformers
FP8 = torch.float8_e4m3fn  # the one format here that is not quantised


def parts(host: Host) -> SimpleNamespace:
    """The modules under test, of the pack that ComfyUI loaded."""
    names = {"ops": "nodes.quantized_ops", "patcher": "nodes.unmerged_patcher"}
    names |= {"layers": "core.quantized_layers", "plans": "core.quantization"}
    names |= {"low_rank": "nodes.low_rank", "architectures": "nodes.architectures"}
    names |= {"fp8": "nodes.fp8_ops"}
    load = importlib.import_module
    return SimpleNamespace(
        **{short: load(f"{host.pack.__name__}.{name}") for short, name in names.items()}
    )


def state_of(host: Host, name: str) -> dict[str, torch.Tensor]:
    """A transformer's plain weights."""
    return load_file(host.models / "diffusion_models" / name)


def quantized_state(
    host: Host,
    plain: Mapping[str, torch.Tensor],
    format: str,
    preset: str = "smallest",
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """The same with the entries of the layers that the preset chooses; "fp8_e4m3fn": all matrices."""
    if format == "fp8_e4m3fn":
        return {k: t.to(FP8) if t.ndim == 2 else t for k, t in plain.items()}
    it = parts(host)
    layers = {k[:-7]: t.shape for k, t in plain.items() if k.endswith(".weight") and t.ndim == 2}
    rules = it.plans.presets()["diffusion_models"][preset]
    state = dict(plain)
    for layer, chosen in it.plans.plan(layers, format, rules).items():
        entries = it.layers.encode(state.pop(f"{layer}.weight").to(device), chosen)
        state.update({f"{layer}.{name}": entry.cpu() for name, entry in entries.items()})
    return state


def model_of(
    host: Host,
    plain: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    disable_dynamic: bool = False,
) -> Any:
    """A patcher around a transformer with these entries, computing in `dtype` where ComfyUI does."""
    import comfy.model_detection
    import comfy.model_management
    import comfy.supported_models

    it, cpu, device = parts(host), torch.device("cpu"), comfy.model_management.get_torch_device()
    config = comfy.supported_models.QwenImage(
        comfy.model_detection.detect_unet_config(dict(plain), "")
    )
    checkpoint = importlib.import_module(f"{host.pack.__name__}.core.checkpoint")
    rows = {k: checkpoint.Tensor("BF16", tuple(t.shape)) for k, t in plain.items()}
    config.unet_config.update(checkpoint.transformer_config(checkpoint.Header("", rows)))
    config.quant_config = None
    if any(t.dtype is FP8 for name, t in state.items() if name.endswith(".weight")):
        config.set_inference_dtype(FP8, dtype, device=device)
        config.custom_operations = it.fp8.operations(config)
    else:
        config.set_inference_dtype(dtype, None, device=device)
        config.custom_operations = it.ops.operations(dtype, full_precision=False, device=device)
    model = config.get_model(dict(state), "")
    patcher = it.patcher.patcher_for(model, device, cpu, disable_dynamic)
    model.load_model_weights(dict(state), "", assign=True)
    patcher.cached_patcher_init = (model_of, (host, plain, state, dtype))
    return patcher


def quantized(host: Host, name: str, format: str, **options: Any) -> Any:
    """A quantised model of one of the small files."""
    plain = state_of(host, name)
    return model_of(host, plain, quantized_state(host, plain, format), **options)


def others_w4a8(weight: torch.Tensor, rotation: int) -> dict[str, torch.Tensor]:
    """A layer in W4A8 that is rotated as this pack would not, quantised on the CPU."""
    import comfy_kitchen
    from comfy_kitchen.tensor import AsymW4A8Int8Layout as Layout
    from pack.core import host_formats

    with comfy_kitchen.use_backend("eager"):
        codes, params = Layout.quantize(weight, convrot_groupsize=rotation)
    entries = {f"weight{n}": t for n, t in Layout.state_dict_tensors(codes, params).items()}
    settings = host_formats.settings_of("asym_w4a8_int8", params)
    return {**entries, host_formats.CONFIGURATION: host_formats.pack_json(settings)}


def write_lora(
    host: Host,
    name: str,
    layers: Mapping[str, tuple[int, int]],
    rank: int = 4,
    alpha: float | None = None,
    gain: float = 0.1,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, str] = ("lora_up.weight", "lora_down.weight"),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A random LoRA in models/loras: {layer: (out, in)}; returns each layer's difference, fp32."""
    made, generator, differences = {}, torch.Generator().manual_seed(seed), {}
    for layer, (outputs, inputs) in layers.items():
        up = (torch.randn(outputs, rank, generator=generator) * gain).to(dtype)
        down = (torch.randn(rank, inputs, generator=generator) * inputs**-0.5).to(dtype)
        made |= {f"{layer}.{names[0]}": up, f"{layer}.{names[1]}": down}
        scale = 1.0
        if alpha is not None:
            made[f"{layer}.alpha"], scale = torch.tensor(alpha), alpha / rank
        differences[layer] = scale * up.float() @ down.float()
    (host.models / "loras").mkdir(exist_ok=True)
    save_file(made, host.models / "loras" / name)
    return differences


def lora_on(host: Host, model: Any, name: str, strength: float = 1.0) -> Any:
    """ComfyUI's own node."""
    import folder_paths

    folder_paths.get_filename_list("loras")
    return host.nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def draw(host: Host, model: Any, steps: int = 2) -> torch.Tensor:
    """The latent that ComfyUI's own sampler makes."""
    generator = torch.Generator().manual_seed(3)
    text = [[torch.randn(1, 8, 64, generator=generator), {}]]
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    inputs = (1, steps, 1.0, "euler", "simple", text, text, latent)
    return host.nodes.common_ksampler(model, *inputs)[0]["samples"]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, by the norm."""
    return ((a - b).norm() / b.norm()).item()
