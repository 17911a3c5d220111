"""Every file that a loader may be given: what it is, and one sentence on what to do with it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core import checkpoint, file_kinds
from pack.core.checkpoint import CheckpointError, Header, Tensor

Shapes = dict[str, tuple[int, ...]]

QWEN = {
    "txt_norm.weight": (3584,),
    "img_in.weight": (3072, 64),
    "proj_out.weight": (64, 3072),
    "transformer_blocks.0.attn.norm_q.weight": (128,),
}
LAYERED = {**QWEN, "time_text_embed.addition_t_embedding.weight": (2, 3072)}
# As ComfyUI 0.37 tells it apart (comfy/model_detection.py).
QWEN_21 = {
    "txt_in.text_norm.weight": (4096,),
    "modulation.1.weight": (16384, 4096),
    "transformer_blocks.0.attn.norm_q.weight": (128,),
    "transformer_blocks.0.img_mlp.gate_up.weight": (24576, 4096),
    "img_in.weight": (4096, 64),
    "proj_out.weight": (64, 4096),
}
NUNCHAKU = {
    **QWEN,
    "transformer_blocks.0.attn.to_qkv.qweight": (9216, 1536),
    "transformer_blocks.0.attn.to_qkv.wscales": (48, 9216),
    "transformer_blocks.0.attn.to_qkv.proj_down": (3072, 128),
    "transformer_blocks.0.attn.to_qkv.proj_up": (9216, 128),
    "transformer_blocks.0.attn.to_qkv.smooth_factor": (3072,),
}
OLD_NUNCHAKU = {  # its low-rank part has the names of a LoRA
    "transformer_blocks.0.qkv_proj.qweight": (9216, 1536),
    "transformer_blocks.0.qkv_proj.wscales": (48, 9216),
    "transformer_blocks.0.qkv_proj.lora_down": (3072, 32),
}
ENCODER = {
    "model.layers.0.self_attn.k_proj.bias": (512,),
    "model.layers.0.self_attn.k_proj.weight": (512, 3584),
}
GPTQ = {
    **ENCODER,
    "model.layers.0.mlp.gate_proj.qweight": (448, 18944),
    "model.layers.0.mlp.gate_proj.qzeros": (28, 2368),
}
QWEN3_VL = {  # as read_header has the names
    "model.layers.0.self_attn.q_norm.weight": (128,),
    "visual.deepstack_merger_list.0.norm.weight": (4608,),
}
VAE = {
    "decoder.head.0.gamma": (96, 1, 1, 1),
    "decoder.head.2.weight": (3, 96, 3, 3, 3),
    "encoder.conv1.weight": (96, 3, 3, 3, 3),
}
LAYERED_VAE = {
    **VAE,
    "decoder.head.2.weight": (4, 96, 3, 3, 3),
    "encoder.conv1.weight": (96, 4, 3, 3, 3),
}
STAGES = "decoder.upsamples.0.upsamples.0.residual.2.weight"
WAN_22_VAE = {**VAE, STAGES: (8,), "decoder.head.2.weight": (12, 96, 3, 3, 3)}
QWEN_21_VAE = {**VAE, STAGES: (8,), "decoder.head.2.weight": (4, 96, 1, 3, 3)}
MAGE_FLOW = {**QWEN, "txt_norm.weight": (2560,), "proj_out.weight": (128, 3072)}

CASES: list[tuple[Shapes, str, str]] = [
    (QWEN, file_kinds.TRANSFORMER, "models/diffusion_models"),
    (LAYERED, file_kinds.TRANSFORMER, "models/diffusion_models"),
    (ENCODER, file_kinds.TEXT_ENCODER, "models/text_encoders"),
    (VAE, file_kinds.VAE, "models/vae"),
    (LAYERED_VAE, file_kinds.VAE, "models/vae"),
    (QWEN_21, "a Qwen-Image 2.1 diffusion model", "Load Diffusion Model, of ComfyUI 0.37"),
    (QWEN_21_VAE, "the VAE of Qwen-Image 2.1", "ComfyUI's own Load VAE, of ComfyUI 0.37"),
    (QWEN3_VL, "a Qwen3-VL text encoder", "ComfyUI's own Load CLIP, of ComfyUI 0.37"),
    (NUNCHAKU, "a Nunchaku (SVDQuant) model", "Nunchaku Qwen-Image DiT Loader"),
    (OLD_NUNCHAKU, "a Nunchaku (SVDQuant) model", "ComfyUI-nunchaku"),
    (GPTQ, "a model quantised with GPTQ or AWQ", "bf16, fp16 or fp8_scaled"),
    (
        {**QWEN, "transformer_blocks.0.attn.to_q.lora_down.weight": (4, 8)},
        "a LoRA",
        "models/loras and choose it in Load LoRA",
    ),
    ({"transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "a LoRA", "models/loras"),
    (
        {"controlnet_blocks.0.y_rms.weight": (8,), "img_in.weight": (8, 8)},
        "a DiffSynth ControlNet patch for Qwen-Image",
        "models/model_patches and choose it in Load Model Patch",
    ),
    ({**QWEN, "controlnet_blocks.0.weight": (8,)}, "a ControlNet", "models/controlnet"),
    ({"control_img_in.weight": (8,)}, "a ControlNet", "Load ControlNet Model"),
    ({"control_all_x_embedder.2-1.weight": (8,)}, "a Z-Image ControlNet", "Load Model Patch"),
    (MAGE_FLOW, "a Mage-Flow diffusion model", "ComfyUI's own Load Diffusion Model"),
    (WAN_22_VAE, "a Wan 2.2 VAE", "ComfyUI's own Load VAE"),
    (
        {"conditioner.embedders.1.model.ln_final.weight": (8,)},
        "an SDXL checkpoint",
        "models/checkpoints",
    ),
    (
        {"model.diffusion_model.input_blocks.0.0.weight": (8,)},
        "a Stable Diffusion checkpoint",
        "Load Checkpoint",
    ),
    ({"double_blocks.0.img_attn.qkv.weight": (8,)}, "a Flux", "Load Diffusion Model"),
    ({"single_transformer_blocks.0.attn.to_q.weight": (8,)}, "a Flux", "Load Diffusion Model"),
    (
        {"joint_blocks.0.context_block.attn.qkv.weight": (8,)},
        "a Stable Diffusion 3",
        "Load Diffusion Model",
    ),
    ({"noise_refiner.0.attention.qkv.weight": (8,)}, "a Z-Image", "Load Diffusion Model"),
    ({"head.modulation": (1, 2, 8)}, "a Wan video model", "Load Diffusion Model"),
    ({"decoder.up.0.block.0.norm1.weight": (8,)}, "a Stable Diffusion or Flux VAE", "Load VAE"),
    ({"taesd_decoder.1.weight": (8, 4)}, "a small preview decoder", "models/vae_approx"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": (8,)}, "a CLIP", "Load CLIP"),
    ({"encoder.block.0.layer.0.SelfAttention.k.weight": (8,)}, "a T5", "Load CLIP"),
    ({"model.layers.0.self_attn.q_norm.weight": (8,)}, "of another family", "Load CLIP"),
    ({"something": (1,)}, "an unknown model (its first tensor is something)", "its author names"),
    ({}, "an empty file", "download it again"),
]
OURS = (file_kinds.TRANSFORMER, file_kinds.TEXT_ENCODER, file_kinds.VAE)


def header(shapes: Shapes) -> Header:
    """A header without a file."""
    return Header("x.safetensors", {k: Tensor("BF16", s) for k, s in shapes.items()})


@pytest.mark.parametrize(("shapes", "what", "remedy"), CASES, ids=[case[1] for case in CASES])
def test_every_kind_is_told_with_what_to_do(shapes: Shapes, what: str, remedy: str) -> None:
    kind = checkpoint.kind_of(header(shapes))
    assert what in kind and (kind in OURS) is (what in OURS)
    for expected in OURS:
        if kind == expected:
            checkpoint.require(header(shapes), expected)
            continue
        with pytest.raises(CheckpointError) as error:
            checkpoint.require(header(shapes), expected)
        sentence = str(error.value)
        assert sentence.startswith(f"x.safetensors is {kind}, and this node needs {expected}: ")
        assert remedy in sentence and sentence.endswith(".")
        assert not re.search(r"\. [A-Z]", sentence)  # one sentence


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_model_inside_another_file_is_told_too(prefix: str) -> None:
    for shapes in (QWEN, QWEN_21, NUNCHAKU):
        inside = {prefix + name: shape for name, shape in shapes.items()}
        assert checkpoint.kind_of(header(inside)) == checkpoint.kind_of(header(shapes))


@given(st.sampled_from([QWEN, ENCODER, VAE, QWEN_21, NUNCHAKU, QWEN_21_VAE]), st.randoms())
def test_the_order_of_the_tensors_says_nothing(shapes: Shapes, chance) -> None:
    items = list(shapes.items())
    chance.shuffle(items)
    assert checkpoint.kind_of(header(dict(items))) == checkpoint.kind_of(header(shapes))


def test_what_is_not_supported_yet_is_marked_so() -> None:
    marked = {kind.what for kind in file_kinds.KINDS if file_kinds.NOT_YET in kind.what}
    assert len(marked) == 4  # Nunchaku, GPTQ and AWQ, Qwen-Image 2.1 and its VAE
    told = [kind for kind in file_kinds.KINDS if file_kinds.HELP in kind.remedy]
    assert {kind.what for kind in told} < marked
