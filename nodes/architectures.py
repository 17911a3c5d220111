"""Qwen-Image's three models as ComfyUI objects, with every dimension read from the file.

ComfyUI's own loaders know only the published widths. Here its classes get the dimensions by their
ordinary constructor arguments and hooks, so one path serves the 20 B checkpoint and a 2 MB one.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import comfy.hooks
import comfy.model_detection
import comfy.model_management as mm
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import llama, qwen_image, qwen_vl
from comfy.text_encoders.hunyuan_video import llama_detect

from ..core import checkpoint
from ..core.shared import Loaded
from ..core.sign_codes import sign_codes
from . import finite_check, fp8_ops, missing_weights
from .pinning import plain_patcher
from .quantized_loading import Weights, inputs_of, naming_the_file, read_weights
from .quantized_ops import operations
from .unmerged_patcher import patcher_for

log = logging.getLogger("qwen_vram")

Handle = TypeVar("Handle", comfy.sd.CLIP, comfy.sd.VAE)


def model_options(dtype: torch.dtype | None, device: str) -> dict[str, Any]:
    """ComfyUI's model_options for a dtype and a device option. Raises ValueError."""
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    target = resolve_device(device)
    if target is not None:
        options["load_device"] = target
        if target.type == "cpu":
            options["offload_device"] = target
    return options


def resolve_device(device: str) -> torch.device | None:
    """None for the host's choice. Raises ValueError for a device that this machine lacks."""
    target = mm.resolve_gpu_device_option(device)
    if target is None and device != "default":
        raise ValueError(
            f"This machine has no device {device}; choose default, or one that the node lists."
        )
    return target


def load_transformer(
    path: str, options: dict[str, Any], disable_dynamic: bool = False
) -> ModelPatcher:
    """Load fresh weights of a Qwen-Image transformer. Raises CheckpointError, OSError.

    Follows comfy.sd.load_diffusion_model_state_dict (ComfyUI 0.33), less what is not Qwen-Image.
    """
    header = checkpoint.read_header(path)
    checkpoint.require(header, checkpoint.TRANSFORMER)
    weights = read_weights(header, options, checkpoint.transformer_prefix(header.tensors) or "")
    with naming_the_file(header):
        config = transformer_config(header, weights)
    load_device = options.get("load_device", mm.get_torch_device())
    offload_device = options.get("offload_device", mm.unet_offload_device())
    set_dtypes(config, weights.state, options, load_device)
    apart = weights.ours or takes_loras_apart(config, options)
    if apart:
        config.custom_operations = operations_for(config, load_device)
    model = config.get_model(weights.state, "")
    patcher = patcher_around(model, load_device, offload_device, apart, disable_dynamic)
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    missing = missing_weights.Record()
    hook = model.diffusion_model.register_load_state_dict_post_hook(missing)
    with naming_the_file(header):
        model.load_model_weights(weights.state, "", assign=patcher.is_dynamic())
    hook.remove()
    missing_weights.refuse(header, missing.names)
    patcher.cached_patcher_init = (load_transformer, (path, options))
    return patcher


def transformer_config(
    header: checkpoint.Header, weights: Weights
) -> comfy.supported_models.QwenImage:
    """The host's configuration, with the dimensions of this file."""
    found = comfy.model_detection.detect_unet_config(weights.state, "", metadata=weights.metadata)
    config = comfy.supported_models.QwenImage(found)
    config.unet_config.update(checkpoint.transformer_config(header))
    prefix = checkpoint.transformer_prefix(header.tensors) or ""
    # The host counts up to the first gap; what lies behind it would be left out without a word.
    config.unet_config["num_layers"] = header.count(f"{prefix}transformer_blocks.")
    config.unet_config["in_channels"] = inputs_of(weights.state, "img_in")
    config.quant_config = comfy.utils.detect_layer_quantization(weights.state, "")
    if weights.ours:
        config.quant_config = {"mixed_ops": True}
    return config


def takes_loras_apart(config: comfy.supported_models.QwenImage, options: dict[str, Any]) -> bool:
    """Whether LoRAs of a model are not merged: in plain fp8 that was asked for.

    In files that bring scales they are: whatever else changes weights is the host's there.
    """
    return options.get("unmerged_loras", False) and config.quant_config is None


def operations_for(config: comfy.supported_models.QwenImage, load_device: torch.device) -> type:
    """This pack's operations, for a file with quantised layers or for a model held in fp8."""
    if config.quant_config is None:
        return fp8_ops.operations(config)
    compute_dtype = config.manual_cast_dtype or config.unet_config["dtype"]
    return operations(compute_dtype, False, load_device)


def patcher_around(
    model: torch.nn.Module,
    load_device: torch.device,
    offload_device: torch.device,
    apart: bool,
    disable_dynamic: bool,
) -> ModelPatcher:
    """As the host's, or this pack's for layers whose patches stay apart."""
    if apart:
        return patcher_for(model, load_device, offload_device, disable_dynamic)
    return plain_patcher(model, load_device, offload_device, disable_dynamic)


def set_dtypes(
    config: comfy.supported_models.QwenImage,
    sd: dict[str, torch.Tensor],
    options: dict[str, Any],
    load_device: torch.device,
) -> None:
    """Choose storage and compute dtype as the host does for its own loader."""
    supported = list(config.supported_inference_dtypes)
    quantised = config.quant_config is not None
    dtype = options.get("dtype")
    if dtype is None:
        dtype = mm.unet_dtype(
            model_params=comfy.utils.calculate_parameters(sd),
            supported_dtypes=supported,
            weight_dtype=None if quantised else comfy.utils.weight_dtype(sd),
        )
    cast = mm.unet_manual_cast(None if quantised else dtype, load_device, supported)
    config.set_inference_dtype(dtype, cast, device=load_device)
    if options.get("fp8_optimizations"):
        config.optimizations["fp8"] = True


class AnySizeQwen25VL(llama.Qwen25_7BVLI):
    """The host's Qwen2.5-VL, with the dimensions of the vision tower as an argument too."""

    def __init__(
        self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any
    ) -> None:
        torch.nn.Module.__init__(self)
        dimensions = dict(config_dict)
        vision = dimensions.pop("vision", {"hidden_size": 1280})  # the rest: the host's defaults
        config = llama.Qwen25_7BVLI_Config(**dimensions)
        factory = {"device": device, "dtype": dtype, "ops": operations}
        self.num_layers = config.num_hidden_layers
        self.model = llama.Llama2_(config, **factory)
        self.visual = qwen_vl.Qwen2VLVisionTransformer(
            output_hidden_size=config.hidden_size, **vision, **factory
        )
        self.dtype = dtype
        self.missing = missing_weights.Record()
        self.register_load_state_dict_post_hook(self.missing)


class AnySizeQwen25VLModel(comfy.sd1_clip.SDClipModel):
    """What comfy.text_encoders.qwen_image.Qwen25_7BVLIModel is, around the class above."""

    def __init__(
        self,
        device: str = "cpu",
        layer: str = "last",
        layer_idx: int | None = None,
        dtype: torch.dtype | None = None,
        attention_mask: bool = True,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            device=device,
            layer=layer,
            layer_idx=layer_idx,
            textmodel_json_config={},
            dtype=dtype,
            special_tokens={"pad": 151643},
            layer_norm_hidden_state=False,
            model_class=AnySizeQwen25VL,
            enable_attention_masks=attention_mask,
            return_attention_masks=attention_mask,
            model_options=model_options or {},
        )

    def forward(self, tokens: Any) -> tuple[Any, ...]:
        """As the host's, but a sentence where fp16 overflowed."""
        encoded = super().forward(tokens)
        finite_check.check_text(encoded[0], self.transformer.dtype)
        return encoded


def load_text_encoder(
    path: str, options: dict[str, Any], disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """Load fresh weights of a Qwen2.5-VL text encoder. Raises CheckpointError, OSError.

    Follows comfy.sd.load_text_encoder_state_dicts (ComfyUI 0.33), less what is not Qwen-Image.
    """
    header = checkpoint.read_header(path)
    checkpoint.require(header, checkpoint.TEXT_ENCODER)
    config = checkpoint.text_encoder_config(header)
    weights = read_weights(header, options)
    sd = weights.state
    if checkpoint.TOKEN_TABLE not in sd:  # then the file says that it is to be computed
        dtype = sd["model.norm.weight"].dtype
        sd[checkpoint.TOKEN_TABLE] = sign_codes(config["hidden_size"]).to(dtype)
    traits = llama_detect(sd)
    if "dtype" in options:  # the host's loader always takes what the file's norms have
        traits["dtype_llama"] = options["dtype"]
    sized = {
        **options,
        "qwen25_7b_class": AnySizeQwen25VLModel,
        "qwen25_7b_model_config": config,
    }
    target = comfy.supported_models_base.ClipTarget(
        qwen_image.QwenImageTokenizer, qwen_image.te(**traits)
    )
    build = quantized_clip if weights.ours else host_clip
    with naming_the_file(header):
        clip = build(target, sd, sized, disable_dynamic)
    require_text_weights(header, clip)
    clip.patcher.cached_patcher_init = (reload_text_encoder, (path, options))
    return clip


def require_text_weights(header: checkpoint.Header, clip: comfy.sd.CLIP) -> None:
    """Raise CheckpointError if the file lacks weights of the encoder that was loaded from it.

    Without a vision tower it still encodes text; with one, all of that has to be there.
    """
    inside = clip.cond_stage_model
    missing = getattr(inside, inside.clip).transformer.missing
    parts = ("model.", "visual.") if header.count("visual.blocks.") else ("model.",)
    missing_weights.refuse(header, missing.names, parts)


def host_clip(
    target: comfy.supported_models_base.ClipTarget,
    sd: dict[str, torch.Tensor],
    options: dict[str, Any],
    disable_dynamic: bool,
) -> comfy.sd.CLIP:
    """The host's own CLIP around the weights."""
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(sd),
        state_dict=[sd],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )


def quantized_clip(
    target: comfy.supported_models_base.ClipTarget,
    sd: dict[str, torch.Tensor],
    options: dict[str, Any],
    disable_dynamic: bool,
) -> comfy.sd.CLIP:
    """A CLIP as comfy.sd.CLIP's constructor makes it, around this pack's patcher.

    The constructor would hand its own patcher to the memory manager before it could be replaced.
    """
    load_device = options.get("load_device", mm.text_encoder_device())
    offload_device = options.get("offload_device", mm.text_encoder_offload_device())
    dtype = sd["model.norm.weight"].dtype
    options = {**options, "custom_operations": operations(dtype, True, load_device)}
    model = target.clip(device=offload_device, dtype=dtype, model_options=options)
    if not all(mm.supports_cast(load_device, dt) for dt in model.dtypes):
        load_device = offload_device
    mm.archive_model_dtypes(model)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = model
    clip.tokenizer = target.tokenizer(
        embedding_directory=folder_paths.get_folder_paths("embeddings"), tokenizer_data={}
    )
    clip.patcher = patcher_for(model, load_device, offload_device, disable_dynamic)
    clip.patcher.set_model_compute_dtype(torch.float32)  # to which the host's encoders upcast
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.apply_hooks_to_conds = clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    missing, _ = clip.load_sd(sd)
    if missing:
        log.warning("%s", f"text encoder: missing {missing}")
    return clip


def reload_text_encoder(
    path: str, options: dict[str, Any], disable_dynamic: bool = False
) -> ModelPatcher:
    """Fresh weights for the host's multi-GPU and non-dynamic clones; the registry is not asked."""
    return load_text_encoder(path, options, disable_dynamic).patcher


def load_vae(path: str, dtype: torch.dtype | None, device: str) -> comfy.sd.VAE:
    """Load fresh weights of a Qwen-Image VAE. Raises CheckpointError, OSError."""
    header = checkpoint.read_header(path)
    checkpoint.require(header, checkpoint.VAE)
    sd, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    vae = comfy.sd.VAE(sd=sd, device=resolve_device(device), dtype=dtype, metadata=metadata)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (reload_vae, (path, dtype, device))
    return vae


def reload_vae(
    path: str, dtype: torch.dtype | None, device: str, disable_dynamic: bool = False
) -> ModelPatcher:
    """Fresh weights for the host's clones; its VAE class takes no disable_dynamic either."""
    return load_vae(path, dtype, device).patcher


def split(handle: comfy.sd.CLIP | comfy.sd.VAE, model_name: str) -> Loaded:
    """Take a CLIP or VAE apart into the patcher, which can be shared, and its light parts."""
    parts = {k: v for k, v in vars(handle).items() if k not in ("patcher", model_name)}
    return Loaded(handle.patcher, parts)


def join(
    handle_class: type[Handle], patcher: ModelPatcher, parts: dict[str, Any], model_name: str
) -> Handle:
    """Build a CLIP or VAE around `patcher`; changing its settings touches no other handle."""
    handle = handle_class.__new__(handle_class)
    vars(handle).update(
        {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in parts.items()}
    )
    handle.patcher = patcher
    setattr(handle, model_name, patcher.model)
    return handle
