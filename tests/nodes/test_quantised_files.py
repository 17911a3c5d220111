"""Files in the host's own quantised formats go through our loaders as through stock ones."""

from __future__ import annotations

import pytest
import torch
from pack.tests.graphs import CLIP, UNET, encode, loader, preview, text_to_image
from pack.tests.nodes.quantized_models import others_w4a8
from safetensors.torch import load_file, save_file


def scaled_fp8(state: dict[str, torch.Tensor], layers: str) -> dict[str, torch.Tensor]:
    """The layout of the official fp8_scaled files: a scale beside every fp8 matrix."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        out[name] = tensor
        if name.startswith(layers) and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max().float() / 448
            out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            out[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    return out


@pytest.mark.parametrize(
    ("folder", "name", "layers"),
    [("text_encoders", CLIP, "model.layers."), ("diffusion_models", UNET, "transformer_blocks.")],
)
def test_fp8_scaled_files_load_stay_small_and_come_close(fresh, folder, name, layers) -> None:
    source, target = fresh.models / folder / name, fresh.models / folder / "scaled.safetensors"
    plain = load_file(source)
    save_file(scaled_fp8(plain, layers), target, {"qwen_vram": '{"vision_heads": 2}'})
    graph = text_to_image()
    exact = fresh.run(graph)
    key = {"text_encoders": "clip", "diffusion_models": "unet"}[folder]
    kind = {"clip": "TextEncoder", "unet": "DiffusionModel"}[key]
    graph[key] = loader(kind, target.name)
    close = fresh.run(graph)
    assert close.status(key)["bytes"] < exact.status(key)["bytes"]
    a, b = exact.outputs["sampler"][0][0]["samples"], close.outputs["sampler"][0][0]["samples"]
    error = ((a - b).norm() / a.norm()).item()
    assert 0 < error < 0.2
    target.unlink()


@pytest.mark.parametrize(("rotation", "ours"), [(256, False), (64, True)])
def test_w4a8_of_others_opens_with_what_computes_its_rotation(
    fresh, caplog, rotation, ours
) -> None:
    """CUDA's kernels know 256 alone; stock ComfyUI then stops at the first layer."""
    place, layer = fresh.models / "diffusion_models", "transformer_blocks.0.img_mlp.net.2"
    state = load_file(place / UNET)
    entries = others_w4a8(state[f"{layer}.weight"], rotation).items()
    state |= {f"{layer}.{name}": tensor for name, tensor in entries}
    save_file(state, place / "others.safetensors")
    header = fresh.part("core.checkpoint").read_header(str(place / "others.safetensors"))
    assert fresh.part("nodes.quantized_loading").read_weights(header, {}).ours == ours
    graph = text_to_image()
    exact = fresh.run(graph).outputs["sampler"][0][0]["samples"]
    graph["unet"] = loader("DiffusionModel", "others.safetensors")
    close = fresh.run(graph).outputs["sampler"][0][0]["samples"]
    assert 0 < float((close - exact).norm() / exact.norm()) < 0.2
    assert ("others.safetensors has layers rotated in groups" in caplog.text) == ours
    (place / "others.safetensors").unlink()


def test_an_fp8_scaled_encoder_without_a_vocabulary_computes_it(fresh) -> None:
    folder = fresh.models / "text_encoders"
    state = scaled_fp8(load_file(folder / CLIP), "model.layers.")
    shape = state.pop("model.embed_tokens.weight").shape
    codes = fresh.part("core.sign_codes").sign_codes(shape[1]).to(torch.bfloat16)
    hints = {"qwen_vram": '{"vision_heads": 2, "vocabulary": "sign_codes"}'}
    save_file(state, folder / "bare_fp8.safetensors", hints)
    save_file(
        {**state, "model.embed_tokens.weight": codes}, folder / "table_fp8.safetensors", hints
    )
    graph = {}
    for name in ("bare", "table"):
        graph[name] = loader("TextEncoder", f"{name}_fp8.safetensors")
        graph[f"{name}_e"] = encode("a fox", clip=name)
        graph.update(preview(f"{name}_e"))
    run = fresh.run(graph)
    bare, table = (run.outputs[f"{name}_e"][0][0][0][0] for name in ("bare", "table"))
    assert torch.equal(bare, table)
    assert run.status("bare")["bytes"] == run.status("table")["bytes"]
    for name in ("bare", "table"):
        (folder / f"{name}_fp8.safetensors").unlink()


def test_a_transformer_inside_an_all_in_one_checkpoint_loads(fresh) -> None:
    target = fresh.models / "diffusion_models" / "whole.safetensors"
    plain = load_file(fresh.models / "diffusion_models" / UNET)
    whole = {f"model.diffusion_model.{k}": v for k, v in plain.items()}
    save_file({**whole, "vae.something": torch.ones(1)}, target)
    graph = text_to_image()
    expected = fresh.run(graph).outputs["sampler"][0][0]["samples"]
    graph["unet"] = loader("DiffusionModel", target.name)
    assert torch.equal(fresh.run(graph).outputs["sampler"][0][0]["samples"], expected)
    target.unlink()


def test_the_dtype_of_the_encoder_changes_what_it_encodes(fresh) -> None:
    graph = {"clip": loader("TextEncoder", CLIP), "e": encode("a fox"), **preview("e")}
    default = fresh.run(graph).outputs["e"][0][0][0][0]
    graph["clip"] = loader("TextEncoder", CLIP, weight_dtype="fp8_e4m3fn")
    other = fresh.run(graph).outputs["e"][0][0][0][0]
    assert other.shape == default.shape and not torch.equal(other, default)
