"""A test-only extension: stock loaders take tiny checkpoints, so that both ways can be compared.

Nothing of the pack is used here: the stock side of a comparison must not share our code. And the
vocabulary is read once, not with each tiny text encoder, which takes longer than to encode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import comfy.controlnet
import comfy.latent_formats
import comfy.ops
import comfy.supported_models
import nodes
import torch
import transformers
from comfy.ldm.qwen_image import controlnet
from comfy.text_encoders import llama, qwen_vl


class TinyQwenImage(comfy.supported_models.QwenImage):
    """The host's QwenImage with the dimensions of tiny_qwen_image.safetensors."""

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        if state_dict is None or not super().matches(unet_config, state_dict, unet_key_prefix):
            return False
        return state_dict[f"{unet_key_prefix}img_in.weight"].shape[0] == 128

    def get_model(self, state_dict, prefix="", device=None):
        self.unet_config.update(
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            axes_dims_rope=(4, 14, 14),
        )
        return super().get_model(state_dict, prefix, device)


@dataclasses.dataclass
class TinyConfig(llama.Qwen25_7BVLI_Config):
    """The host's text configuration with the dimensions of tiny_qwen_2.5_vl.safetensors."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4


@dataclasses.dataclass
class AnimalsConfig(TinyConfig):
    """The same with the dimensions of the embedded text encoder."""

    intermediate_size: int = 64


TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_layers": 2}
ANIMALS_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "num_layers": 1}


@contextlib.contextmanager
def tiny_sizes(clip_name):
    """While the stock CLIPLoader runs, and no longer."""
    config, vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    embedded = "animals" in clip_name
    sizes = ANIMALS_VISION if embedded else TINY_VISION

    def tiny_vision(**given):
        return vision(**{**given, **sizes})

    llama.Qwen25_7BVLI_Config = AnimalsConfig if embedded else TinyConfig
    qwen_vl.Qwen2VLVisionTransformer = tiny_vision
    try:
        yield
    finally:
        llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer = config, vision


stock_load_clip = nodes.CLIPLoader.load_clip


@functools.wraps(stock_load_clip)
def load_clip(self, clip_name, *args, **kwargs):
    with tiny_sizes(clip_name):
        return stock_load_clip(self, clip_name, *args, **kwargs)


read_tokenizer = transformers.Qwen2Tokenizer.from_pretrained


@functools.cache
def shared_tokenizer(path):
    tokenizer = read_tokenizer(path)
    vocabulary = tokenizer.get_vocab()
    tokenizer.get_vocab = lambda: vocabulary
    return tokenizer


transformers.Qwen2Tokenizer.from_pretrained = shared_tokenizer
nodes.CLIPLoader.load_clip = load_clip
comfy.supported_models.models.insert(0, TinyQwenImage)


class TinyControlNet:
    """An InstantX ControlNet for tiny_qwen_image.safetensors, random but always the same."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "build"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def build(self):
        model = controlnet.QwenImageControlNetModel(
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            axes_dims_rope=(4, 14, 14),
            operations=comfy.ops.disable_weight_init,
            dtype=torch.float32,
            device="cpu",
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.05, generator=generator)
        latent_format = comfy.latent_formats.Wan21()
        return (
            comfy.controlnet.ControlNet(model, latent_format=latent_format, compression_ratio=1),
        )


NODE_CLASS_MAPPINGS = {"TestTinyControlNet": TinyControlNet}
