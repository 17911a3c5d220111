"""Kinds and dimensions from safetensors headers, and sentences for everything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pack.core import checkpoint
from pack.core.checkpoint import CheckpointError, Header, Tensor
from pack.tests.examples import examples
from safetensors.torch import save_file

OFFICIAL_TRANSFORMER = {
    "txt_norm.weight": (3584,),
    "img_in.weight": (3072, 64),
    "img_in.bias": (3072,),
    "transformer_blocks.0.attn.norm_q.weight": (128,),
}
OFFICIAL_ENCODER = {
    "model.embed_tokens.weight": (152064, 3584),
    **{f"model.layers.{i}.mlp.gate_proj.weight": (18944, 3584) for i in range(28)},
    "model.layers.0.self_attn.q_proj.bias": (3584,),
    "model.layers.0.self_attn.k_proj.bias": (512,),
    "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    **{f"visual.blocks.{i}.mlp.gate_proj.weight": (3420, 1280) for i in range(32)},
}
SIGN_CODES = '{"vocabulary": "sign_codes"}'
LACKS = (
    "x.safetensors lacks the vocabulary model.embed_tokens.weight; download the complete file, or, "
    'if it was trained on computed codes, put {"vocabulary": "sign_codes"} into its metadata entry '
    '"qwen_vram".'
)
UNKNOWN = (
    'x.safetensors asks for the vocabulary {}, and only "sign_codes" is known; update this pack, or '
    "use a file with model.embed_tokens.weight."
)
WAN_VAE = {"decoder.head.0.gamma": (96, 1, 1, 1), "encoder.conv1.weight": (96, 3, 3, 3, 3)}


def header(shapes: dict[str, tuple[int, ...]], **metadata: str) -> Header:
    """A header without a file."""
    return Header("x.safetensors", {k: Tensor("BF16", s) for k, s in shapes.items()}, metadata)


def test_the_official_transformer_gets_its_published_dimensions() -> None:
    expected = {
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    }
    assert checkpoint.transformer_config(header(OFFICIAL_TRANSFORMER)) == expected
    inside = {f"model.diffusion_model.{k}": v for k, v in OFFICIAL_TRANSFORMER.items()}
    assert checkpoint.transformer_config(header(inside)) == expected


def test_the_official_text_encoder_gets_its_published_dimensions() -> None:
    assert checkpoint.text_encoder_config(header(OFFICIAL_ENCODER)) == {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vision": {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "num_layers": 32,
        },
    }


def test_vision_heads_come_from_the_metadata_where_the_width_cannot_tell() -> None:
    shapes = {**OFFICIAL_ENCODER, "visual.patch_embed.proj.weight": (64, 3, 2, 14, 14)}
    with pytest.raises(CheckpointError, match="vision_heads"):
        checkpoint.text_encoder_config(header(shapes))
    told = header(shapes, qwen_vram='{"vision_heads": 2}')
    assert checkpoint.text_encoder_config(told)["vision"]["num_heads"] == 2
    with pytest.raises(CheckpointError, match="broken qwen_vram metadata: .*; download"):
        checkpoint.text_encoder_config(header(shapes, qwen_vram="{"))


NO_TABLE = {k: s for k, s in OFFICIAL_ENCODER.items() if "embed_tokens" not in k}


def test_a_text_encoder_without_a_vocabulary_gets_the_dimensions_of_the_computed_one() -> None:
    told = header({**NO_TABLE, "model.norm.weight": (3584,)}, qwen_vram=SIGN_CODES)
    expected = checkpoint.text_encoder_config(header(OFFICIAL_ENCODER))
    assert checkpoint.kind_of(told) == checkpoint.TEXT_ENCODER
    assert checkpoint.text_encoder_config(told) == expected
    narrow = header({**NO_TABLE, "model.norm.weight": (64,)}, qwen_vram=SIGN_CODES)
    assert checkpoint.text_encoder_config(narrow)["hidden_size"] == 64


def test_a_vocabulary_in_the_file_comes_before_what_its_metadata_says() -> None:
    shapes = {**OFFICIAL_ENCODER, "model.embed_tokens.weight": (10, 20)}
    for hint in (SIGN_CODES, '{"vocabulary": "another"}'):
        config = checkpoint.text_encoder_config(header(shapes, qwen_vram=hint))
        assert (config["vocab_size"], config["hidden_size"]) == (10, 20)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, LACKS),
        ({"qwen_vram": '{"vision_heads": 16}'}, LACKS),
        ({"qwen_vram": '{"vocabulary": null}'}, LACKS),
        ({"qwen_vram": '["sign_codes"]'}, LACKS),
        ({"qwen_vram": '{"vocabulary": "hash"}'}, UNKNOWN.format('"hash"')),
        ({"qwen_vram": '{"vocabulary": "sign_codes2"}'}, UNKNOWN.format('"sign_codes2"')),
        ({"qwen_vram": '{"vocabulary": ["sign_codes"]}'}, UNKNOWN.format('["sign_codes"]')),
        ({"qwen_vram": SIGN_CODES}, "x.safetensors lacks the tensor model.norm.weight."),
    ],
)
def test_a_missing_vocabulary_gets_a_sentence(metadata: dict[str, str], sentence: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoint.text_encoder_config(header(NO_TABLE, **metadata))
    assert str(error.value) == sentence


@given(st.integers(1, 64).map(lambda n: n * 4))
def test_rope_axes_are_even_and_fill_the_head(head_dim: int) -> None:
    try:
        axes = checkpoint.rope_axes(head_dim)
    except CheckpointError:
        assert head_dim < 8
        return
    assert sum(axes) == head_dim and all(a > 0 and a % 2 == 0 for a in axes) and axes[1] == axes[2]


def test_a_whole_file_is_read_and_a_shortened_one_refused_with_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(10, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, path, {"k": "v"})
    read = checkpoint.read_header(str(path))
    assert read.tensors == {"a": Tensor("F32", (10, 3)), "b": Tensor("BF16", (2,))}
    assert read.metadata == {"k": "v"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    message = f"m.safetensors is incomplete: it has {len(whole) - 7:,} of {len(whole):,} bytes"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_header(str(path))


@example(content=b"GGUF")
@given(st.binary(max_size=64) | st.integers(0, 200))
@settings(max_examples=examples(50), deadline=None)
def test_damaged_files_get_one_sentence(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(30)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: content % len(whole)] if isinstance(content, int) else content)
    says = r"download (it again|the file itself|the safetensors version)|as a \.safetensors file"
    with pytest.raises(CheckpointError, match=rf"^damaged\.safetensors .*({says})\.$"):
        checkpoint.read_header(str(path))


def test_hostile_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    for table in ([], {"a": 1}, {"a": {"dtype": "F32"}}, {"__metadata__": 3}, "x" * 10):
        raw = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw)
        with pytest.raises(CheckpointError):
            checkpoint.read_header(str(path))
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(CheckpointError, match="beginning is damaged"):
        checkpoint.read_header(str(path))


def test_a_web_page_and_a_git_lfs_pointer_are_told_apart(tmp_path: Path) -> None:
    for content, says in (
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs", "a Git LFS"),
    ):
        path = tmp_path / "page.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"page.safetensors is {says}.*download the file"):
            checkpoint.read_header(str(path))


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.ckpt is not a \.safetensors file"):
        checkpoint.read_header(str(tmp_path / "m.ckpt"))
    with pytest.raises(CheckpointError, match=r"m\.GGUF is a GGUF file.* loaders of ComfyUI-GGUF"):
        checkpoint.read_header(str(tmp_path / "m.GGUF"))


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file, which Qwen VRAM does not open: open it"),
        (b"PK\x03\x04\x14\0\0\0" + bytes(64), "a PyTorch or zip file under another name"),
    ],
)
def test_a_renamed_file_is_known_by_its_first_bytes(
    tmp_path: Path, start: bytes, says: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_header(str(path))
    assert str(error.value).startswith(f"m.safetensors is {says}")
