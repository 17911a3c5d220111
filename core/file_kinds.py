"""What kind of model a file is, by the names and shapes of its tensors, and what opens it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

TRANSFORMER = "a Qwen-Image diffusion model"
TEXT_ENCODER = "a Qwen2.5-VL text encoder"
VAE = "a Qwen-Image (Wan 2.1) VAE"

TEXT_HEAD_DIM = 128  # fixed in ComfyUI's Qwen2.5-VL for every size of model
NOT_YET = ", which Qwen VRAM does not support yet"
HELP = "what works behind that stands on this node's help page"


class Shaped(Protocol):
    """A tensor of a header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""


Tensors = Mapping[str, Shaped]


@dataclass(frozen=True)
class Kind:
    """What a file is, in words, and what to do with one that came to a loader of another kind."""

    what: str
    remedy: str
    matches: Callable[[Tensors], bool]


def transformer_prefix(tensors: Iterable[str]) -> str | None:
    """What stands before the transformer's key names ("" or an all-in-one file's prefix)."""
    marks = ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.norm_q.weight")
    names = set(tensors)
    for name in names:
        if name.endswith(marks[0]):
            prefix = name[: -len(marks[0])]
            if all(prefix + mark in names for mark in marks):
                return prefix
    return None


def _any(tensors: Tensors, *parts: str) -> bool:
    return any(part in key for key in tensors for part in parts)


def _ends(tensors: Tensors, *endings: str) -> bool:
    """Whether there is a tensor with each of the endings."""
    return all(any(key.endswith(ending) for key in tensors) for ending in endings)


def _shape(tensors: Tensors, ending: str) -> tuple[int, ...]:
    """The shape of the first tensor whose name ends so; () if there is none."""
    return next((tuple(t.shape) for key, t in tensors.items() if key.endswith(ending)), ())


def _is_nunchaku(tensors: Tensors) -> bool:
    """Its packed weights and scales have names of their own: `qweight`, `wscales`."""
    return _ends(tensors, ".qweight", ".wscales")


def _is_qwen_image_21(tensors: Tensors) -> bool:
    """One modulation for all blocks, and a projection of the text with its own norm."""
    return _ends(tensors, "txt_in.text_norm.weight", "modulation.1.weight", "img_in.weight")


def _is_mage_flow(tensors: Tensors) -> bool:
    """Qwen-Image's blocks for another text encoder and VAE; ComfyUI tells it by these widths."""
    if transformer_prefix(tensors) is None:
        return False
    return _shape(tensors, "txt_norm.weight") == (2560,) and (
        _shape(tensors, "proj_out.weight")[:1] == (128,)
    )


def _is_text_encoder(tensors: Tensors) -> bool:
    bias = tensors.get("model.layers.0.self_attn.k_proj.bias")
    return bias is not None and bias.shape == (4 * TEXT_HEAD_DIM,)


def _is_wan_vae(tensors: Tensors) -> bool:
    return "decoder.head.0.gamma" in tensors and "encoder.conv1.weight" in tensors


def _is_wan_22_vae(tensors: Tensors) -> bool:
    """Stages within stages: the layout that the VAE of Qwen-Image 2.1 has too."""
    return _is_wan_vae(tensors) and _any(tensors, "decoder.upsamples.0.upsamples.")


def _is_qwen_21_vae(tensors: Tensors) -> bool:
    """Of that layout, for single pictures: its kernels span one frame."""
    return _is_wan_22_vae(tensors) and _shape(tensors, "decoder.head.2.weight")[2:3] == (1,)


STOCK_MODEL = "open it with ComfyUI's own Load Diffusion Model"
STOCK_TEXT = "it belongs to another model; open it with ComfyUI's own Load CLIP"
STOCK_VAE = "it belongs to another model; open it with ComfyUI's own Load VAE"

# First match wins: Nunchaku files can hold LoRAs, and LoRAs and control models carry the key
# names of their base model.
KINDS: tuple[Kind, ...] = (
    Kind(
        f"a Nunchaku (SVDQuant) model{NOT_YET}",
        "open it with the loader of ComfyUI-nunchaku, Nunchaku Qwen-Image DiT Loader for "
        f"Qwen-Image; {HELP}",
        _is_nunchaku,
    ),
    Kind(
        "a LoRA",
        "put it into models/loras and choose it in Load LoRA, behind a diffusion model",
        lambda t: _any(t, ".lora_", "lora_unet_", ".lokr_", ".hada_"),
    ),
    Kind(
        "a DiffSynth ControlNet patch for Qwen-Image",
        "put it into models/model_patches and choose it in Load Model Patch, before Apply Qwen "
        "Image DiffSynth ControlNet",
        lambda t: _any(t, "controlnet_blocks.0.y_rms."),
    ),
    Kind(
        "a ControlNet",
        "put it into models/controlnet and choose it in Load ControlNet Model",
        lambda t: _any(
            t, "controlnet_blocks.", "controlnet_x_embedder", "control_img_in.", "control_model."
        ),
    ),
    Kind(
        "a Z-Image ControlNet patch",
        "put it into models/model_patches and choose it in Load Model Patch",
        lambda t: _any(t, "control_all_x_embedder."),
    ),
    Kind(
        f"a model quantised with GPTQ or AWQ{NOT_YET}",
        "take the file in bf16, fp16 or fp8_scaled",
        lambda t: _ends(t, ".qweight", ".qzeros"),
    ),
    Kind(
        f"a Qwen-Image 2.1 diffusion model{NOT_YET}",
        f"{STOCK_MODEL}, of ComfyUI 0.37 or newer; {HELP}",
        _is_qwen_image_21,
    ),
    Kind("a Mage-Flow diffusion model", STOCK_MODEL, _is_mage_flow),
    Kind(
        TRANSFORMER,
        "put it into models/diffusion_models and choose it in Load Diffusion Model (Qwen VRAM)",
        lambda t: transformer_prefix(t) is not None,
    ),
    Kind(
        TEXT_ENCODER,
        "put it into models/text_encoders and choose it in Load Text Encoder (Qwen VRAM)",
        _is_text_encoder,
    ),
    Kind(
        f"the VAE of Qwen-Image 2.1{NOT_YET}",
        "open it with ComfyUI's own Load VAE, of ComfyUI 0.37 or newer",
        _is_qwen_21_vae,
    ),
    Kind("a Wan 2.2 VAE", STOCK_VAE, _is_wan_22_vae),
    Kind(VAE, "put it into models/vae and choose it in Load VAE (Qwen VRAM)", _is_wan_vae),
    Kind(
        "an SDXL checkpoint",
        "put it into models/checkpoints and open it with Load Checkpoint",
        lambda t: _any(t, "conditioner.embedders.1."),
    ),
    Kind(
        "a Stable Diffusion checkpoint",
        "put it into models/checkpoints and open it with Load Checkpoint",
        lambda t: _any(t, "model.diffusion_model.input_blocks."),
    ),
    Kind(
        "a Flux diffusion model",
        STOCK_MODEL,
        lambda t: _any(t, "double_blocks.0.img_attn.", "single_transformer_blocks.0."),
    ),
    Kind(
        "a Stable Diffusion 3 diffusion model",
        STOCK_MODEL,
        lambda t: _any(t, "joint_blocks.0.context_block."),
    ),
    Kind(
        "a Z-Image or Lumina diffusion model",
        STOCK_MODEL,
        lambda t: _any(t, "noise_refiner.0.attention."),
    ),
    Kind("a Wan video model", STOCK_MODEL, lambda t: _ends(t, "head.modulation")),
    Kind(
        "a Stable Diffusion or Flux VAE",
        STOCK_VAE,
        lambda t: _any(t, "decoder.up.0.block.0.", "decoder.up_blocks."),
    ),
    Kind(
        "a small preview decoder (TAESD)",
        "put it into models/vae_approx, where ComfyUI's preview finds it",
        lambda t: _any(t, "taesd_decoder."),
    ),
    Kind("a CLIP text encoder", STOCK_TEXT, lambda t: _any(t, "text_model.encoder.layers.")),
    Kind(
        "a T5 text encoder",
        STOCK_TEXT,
        lambda t: _any(t, "encoder.block.0.layer.0.SelfAttention."),
    ),
    Kind(
        "a Qwen3-VL text encoder, which Qwen-Image 2.1 needs and Qwen-Image cannot use",
        "open it with ComfyUI's own Load CLIP, of ComfyUI 0.37 or newer",
        lambda t: _any(t, "visual.deepstack_merger_list."),
    ),
    Kind(
        "a Llama or Qwen language model of another family",
        STOCK_TEXT,
        lambda t: _any(t, "model.layers.0.self_attn.", "model.layers.0.linear_attn."),
    ),
)


def kind_among(tensors: Tensors) -> Kind:
    """The kind of a file with these tensors; also for a file that nobody knows."""
    for kind in KINDS:
        if kind.matches(tensors):
            return kind
    first = next(iter(tensors), None)
    if first is None:
        return Kind("an empty file", "download it again", lambda _: False)
    return Kind(
        f"an unknown model (its first tensor is {first})",
        "open it with the loader that its author names",
        lambda _: False,
    )
