"""From file to quantised model: every format, for both kinds of model, drawn by the real host."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.benchmarks import quantized_cycles
from pack.core import quantize_file
from pack.core.quantized_layers import missing_package
from pack.tests.conftest import missing
from pack.tests.graphs import (
    CLIP,
    LORA,
    UNET,
    embedded_text_to_image,
    encode,
    keeping_nothing,
    loader,
    node,
    preview,
)
from pack.tests.host import RunError
from pack.tests.live_bytes import LiveBytes
from safetensors.torch import load_file, save_file

from .test_quantised_files import scaled_fp8

FOLDERS = {"DiffusionModel": "diffusion_models", "TextEncoder": "text_encoders"}
FILES = {"DiffusionModel": UNET, "TextEncoder": CLIP}
# Relative error of the latent after a step with both models quantised: half as much again as
# measured.
BOUNDS = {"bnb_int8": 0.04, "int8": 0.045, "int4": 0.45, "bnb_nf4": 0.45, "bnb_fp4": 0.6, "auto": 0}
LACKING = {
    "DiffusionModel": ("transformer_blocks.1.img_mod.1.", "transformer_blocks.1.attn.to_q."),
    "TextEncoder": ("model.layers.1.self_attn.o_proj.", "model.layers.1.mlp.down_proj."),
}
SMALLEST = {"preset": "smallest"}  # every layer of a block in the same format
LAYERS = 28  # of the two blocks of the small transformer


@pytest.fixture(autouse=True)
def bitsandbytes(host: Any) -> None:
    """Most of these need it."""
    if problem := missing_package("bnb_nf4"):
        missing(problem)


@pytest.fixture
def folder(fresh) -> Iterator[Path]:
    """Where models lie; files called q_... are removed again."""
    yield fresh.models
    for path in fresh.models.rglob("q_*"):
        path.unlink()


def load(host, kind: str = "DiffusionModel", name: str | None = None, **options: Any):
    """Run one loader; returns its patcher and what it showed."""
    graph = {
        "load": loader(kind, name or FILES[kind], **options),
        "out": node("PreviewAny", source=["load", 0]),
    }
    run = host.run(graph)
    output = run.outputs["load"][0][0]
    return getattr(output, "patcher", output), run.status("load")


def refused(host, kind: str = "DiffusionModel", name: str | None = None, **options: Any) -> str:
    """What the user reads when a loader refuses."""
    with pytest.raises(RunError) as failed:
        load(host, kind, name, **options)
    return str(failed.value).strip()


def weights(patcher) -> dict[str, torch.Tensor]:
    """The entries of a model, less what samplers set."""
    state = patcher.model.state_dict().items()
    return {k: t for k, t in state if not k.startswith("model_sampling.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def velocity(patcher) -> torch.Tensor:
    """What a small transformer predicts for fixed numbers."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 1, 8, 8), (1, 6, 64)))
    with torch.inference_mode():
        return patcher.model.diffusion_model(x, torch.tensor([0.5]), text)


def drawn(host, **formats):
    """The latent of one small step of the embedded model, and what happened."""
    graph = embedded_text_to_image("a red fox", width=64, height=64)
    graph["sampler"]["inputs"].update(steps=1, cfg=1.0)
    for name, options in formats.items():
        graph[name]["inputs"].update(options)
    graph["out"] = node("PreviewAny", source=["sampler", 0])
    run = host.run(keeping_nothing(graph), targets=["out"])
    return run.outputs["sampler"][0][0]["samples"], run


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to `b`."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def plain(host):
    """What the models draw without quantisation."""
    host.forget_everything()
    return drawn(host)[0]


def quantised(host, path: Path, format: str) -> dict[str, torch.Tensor]:
    """The state dict of a file, quantised while it is read on the CPU."""
    loading, checkpoint = host.part("nodes.quantized_loading"), host.part("core.checkpoint")
    rules = host.part("core.quantization").presets()[path.parent.name]["smallest"]
    header = checkpoint.read_header(str(path))
    asked = loading.Quantization(format, rules)
    return loading.quantized_state_dict(header, asked, torch.device("cpu"))


# ------------------------------------------------------------------------------------ every format
@pytest.mark.parametrize("weight_dtype", BOUNDS)
def test_every_format_loads_and_draws_with_both_models(fresh, plain, weight_dtype) -> None:
    option = {"weight_dtype": weight_dtype}
    latent, run = drawn(fresh, unet=option, clip=option)
    assert error(latent, plain) <= BOUNDS[weight_dtype]
    for name in ("unet", "clip"):
        shown = run.status(name)
        if weight_dtype == "auto":
            assert " · auto: " in shown["text"] and "kept as" in shown["text"]
        else:
            assert sum(shown["formats"].values()) > 0
            for format, count in shown["formats"].items():
                assert f"{count} layers {format}" in shown["text"]


def test_formats_and_plain_weights_of_one_file_are_used_side_by_side(fresh) -> None:
    alone = {}
    for weight_dtype in ("default", "bnb_nf4", "int8"):
        alone[weight_dtype] = velocity(load(fresh, weight_dtype=weight_dtype)[0])
        fresh.restart()
    graph = {}
    for weight_dtype in alone:
        for keep in (False, True):  # another key for the host
            name = f"{weight_dtype}{keep}"
            graph[name] = loader(
                "DiffusionModel", UNET, weight_dtype=weight_dtype, keep_loaded=keep
            )
            graph[f"{name}_out"] = node("PreviewAny", source=[name, 0])
    run = fresh.run(graph)
    for weight_dtype, expected in alone.items():
        both = [f"{weight_dtype}{keep}" for keep in (False, True)]
        assert sorted(run.status(name)["reused"] for name in both) == [False, True]
        assert all(torch.equal(velocity(run.outputs[name][0][0]), expected) for name in both)


def test_a_preset_counts_by_its_rules(fresh, monkeypatch) -> None:
    _, first = load(fresh, weight_dtype="bnb_nf4")
    _, smaller = load(fresh, weight_dtype="bnb_nf4", **SMALLEST)
    assert smaller["bytes"] < first["bytes"] and not smaller["reused"]
    assert smaller["formats"] == {"bnb_nf4": LAYERS}
    rules = fresh.part("core.quantization").presets()["diffusion_models"]["smallest"]
    choice = fresh.part("nodes.weight_choice")
    monkeypatch.setattr(choice, "preset_of", lambda *_: rules)  # the user's file was edited
    assert load(fresh, weight_dtype="bnb_nf4")[1]["formats"] == smaller["formats"]


def test_a_preset_that_quantises_nothing_is_refused(fresh, monkeypatch) -> None:
    plans = fresh.part("core.quantization")
    nothing = plans.Preset("none", "", (plans.Rule("*", "keep"),))
    monkeypatch.setattr(fresh.part("nodes.weight_choice"), "preset_of", lambda *_: nothing)
    says = refused(fresh, weight_dtype="int8")
    assert says.startswith(f"The preset none quantises no layer of {UNET}; choose another")


@pytest.mark.parametrize("kind", FOLDERS)
def test_clones_for_other_gpus_are_quantised_alike(fresh, kind) -> None:
    patcher, _ = load(fresh, kind, weight_dtype="bnb_nf4")
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert same(weights(again), weights(patcher)) and type(again) is type(patcher)
    assert any(name.endswith("absmax") for name in weights(again))


# --------------------------------------------------------------------------------- kinds of source
def as_source(state: dict[str, torch.Tensor], layout: str):
    """A transformer's tensors in a layout, its metadata, and its weights decoded."""
    if layout == "plain fp8":
        state = {k: t.to(torch.float8_e4m3fn) for k, t in state.items()}
        return state, {}, {k: t.to(torch.bfloat16) for k, t in state.items()}
    if layout == "fp32":
        state = {k: t.float() for k, t in state.items()}
        return state, {}, state
    state = scaled_fp8(state, "transformer_blocks.")
    scales = {k.removesuffix(".scale_weight"): k for k in state if k.endswith(".scale_weight")}
    decoded = {k: t for k, t in state.items() if k not in scales.values() and k != "scaled_fp8"}
    for layer, name in scales.items():
        weight = f"{layer}.weight"
        decoded[weight] = (state[weight].float() * state[name]).to(torch.bfloat16)
    if layout == "scaled_fp8":
        return state, {}, decoded
    del state["scaled_fp8"]
    state = {k.replace("scale_weight", "weight_scale"): t for k, t in state.items()}
    settings = {"format": "float8_e4m3fn"}
    if layout == "metadata":
        told = {"layers": dict.fromkeys(scales, settings)}
        return state, {"_quantization_metadata": json.dumps(told)}, decoded
    row = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return {**state, **{f"{n}.comfy_quant": row.clone() for n in scales}}, {}, decoded


@pytest.mark.parametrize("layout", ["plain fp8", "scaled_fp8", "comfy_quant", "metadata", "fp32"])
def test_other_sources_are_decoded_and_then_quantised(fresh, folder, layout) -> None:
    place = folder / "diffusion_models"
    state, metadata, decoded = as_source(load_file(place / UNET), layout)
    save_file(state, place / "q_source.safetensors", metadata)
    save_file(decoded, place / "q_decoded.safetensors")
    asked = {"weight_dtype": "int8", **SMALLEST}
    found, shown = load(fresh, name="q_source.safetensors", **asked)
    assert same(weights(found), weights(load(fresh, name="q_decoded.safetensors", **asked)[0]))
    assert shown["formats"] == {"int8": LAYERS} and velocity(found).isfinite().all()


@pytest.mark.parametrize("format", ["bnb_nf4", "bnb_int8", "int8", "w4a4"])
def test_a_quantised_file_opens_as_it_is(fresh, folder, format) -> None:
    weight_dtype = format if format in BOUNDS else "int4"
    state = quantised(fresh, folder / "diffusion_models" / UNET, format)
    save_file(state, folder / "diffusion_models" / "q_saved.safetensors")
    asked, shown = load(fresh, name="q_saved.safetensors", weight_dtype=weight_dtype)
    assert shown["formats"] == {format: LAYERS}
    if format != "w4a4":  # int4 is w4a8 on a CPU
        at_load, _ = load(fresh, weight_dtype=weight_dtype, **SMALLEST)
        assert same(weights(asked), weights(at_load))
    as_it_is, shown = load(fresh, name="q_saved.safetensors")
    assert shown["formats"] == {format: LAYERS} and shown["dtype"] == format
    assert error(velocity(as_it_is), velocity(asked)) < 1e-6


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_is_of_the_format_it_was_made_in_whatever_its_preset(host, kind) -> None:
    loading, plans = host.part("nodes.quantized_loading"), host.part("core.quantization")
    choice = host.part("nodes.quantization_choice")
    path = str(host.models / FOLDERS[kind] / FILES[kind])
    header = host.part("core.checkpoint").read_header(path)
    layers = host.part("core.layer_source").LayerSource(header).layers
    eight = plans.Preset("mine", "", (plans.Rule("*attn*", "8 bit"), plans.Rule("*", "keep")))
    for preset in (*plans.presets()[FOLDERS[kind]].values(), eight):
        for format in plans.FORMATS:
            stored = plans.plan(layers, format, preset)
            asked = loading.Quantization(format, preset)
            about = json.dumps({**header.hints(), "quantization": {"format": format}})
            ours = replace(header, metadata={"qwen_vram": about})
            loading.check_choice(ours, stored, asked, None)
            if format in stored.values():  # theirs say nothing of themselves
                assert loading.main_format(header, stored) == format
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(choice, "stored_formats", lambda _, stored=stored: stored)
                assert choice.file_of(ours).dtype == format


@pytest.mark.parametrize(
    ("kind", "format", "own"),
    [("TextEncoder", "bnb_nf4", "bnb_nf4"), ("DiffusionModel", "w4a8", "int4")],
)
def test_a_saved_file_is_one_model_by_whatever_it_is_asked_for(
    fresh, folder, kind, format, own
) -> None:
    place = folder / FOLDERS[kind]
    files = [str(place / FILES[kind]), str(place / "q_saved.safetensors")]
    assert quantize_file.main([*files, "--format", format, "--device", "cpu"]) == 0
    asked = ({}, {"weight_dtype": "auto"}, {"weight_dtype": own}, {"weight_dtype": own, **SMALLEST})
    graph: dict[str, Any] = {}
    for i, options in enumerate(asked):
        graph[f"load{i}"] = loader(kind, "q_saved.safetensors", **options)
        graph[f"out{i}"] = node("PreviewAny", source=[f"load{i}", 0])
    run = fresh.run(graph)
    shown = [run.status(f"load{i}") for i in range(len(asked))]
    assert sorted(facts["reused"] for facts in shown) == [False, True, True, True]
    assert all(facts["formats"] == shown[0]["formats"] for facts in shown)
    assert shown[0]["formats"][format] and shown[0]["formats"].keys() > {format}
    assert any(f"auto: {format} file" in facts["text"] for facts in shown)


def test_the_preset_does_not_count_for_what_is_quantised(fresh, folder) -> None:
    """Of a file of others in ComfyUI's format, default has ComfyUI's operations: another model."""
    path = folder / "diffusion_models" / "q_theirs.safetensors"
    save_file(quantised(fresh, path.parent / UNET, "int8"), path)
    wanted, key = fresh.part("nodes.weight_choice").wanted, ("diffusion_models", str(path))
    ours = {wanted(*key, "int8", "default", name).key for name in ("balanced", "smallest")}
    assert len(ours) == 1 and wanted(*key, "default", "default", "balanced").key not in ours


def test_a_text_encoder_in_the_layout_of_transformers_opens_as_it_is(fresh, folder) -> None:
    place = folder / "text_encoders"
    state = quantised(fresh, place / CLIP, "bnb_nf4")
    hints = fresh.part("core.checkpoint").read_header(str(place / CLIP)).metadata
    theirs = {"model.": "model.language_model.", "visual.": "model.visual."}
    renamed = {"lm_head.weight": torch.ones(4, 4)}  # which ComfyUI does not use
    for name, tensor in state.items():
        start = next(s for s in theirs if name.startswith(s))
        renamed[theirs[start] + name.removeprefix(start)] = tensor
    names = sorted(renamed)
    for i, half in enumerate((names[::2], names[1::2]), start=1):  # layers are torn apart
        shard = place / f"q_te-{i:05}-of-00002.safetensors"
        save_file({k: renamed[k] for k in half}, shard, hints)
    expected, _ = load(fresh, "TextEncoder", weight_dtype="bnb_nf4", **SMALLEST)
    for number in (2, 1):
        name = f"q_te-{number:05}-of-00002.safetensors"
        found, shown = load(fresh, "TextEncoder", name)
        assert same(weights(found), weights(expected))
    assert shown["reused"]  # whichever shard is picked, it is one model


def test_a_transformer_in_several_files_loads_and_is_quantised(fresh, folder) -> None:
    place = folder / "diffusion_models"
    state = load_file(place / UNET)
    names = sorted(state)
    for i in range(3):
        part = {k: state[k] for k in names[i::3]}
        save_file(part, place / f"q_model-{i + 1:05}-of-00003.safetensors")
    second = "q_model-00002-of-00003.safetensors"
    for weight_dtype in ("default", "bnb_nf4"):
        one, _ = load(fresh, weight_dtype=weight_dtype)
        several, _ = load(fresh, name=second, weight_dtype=weight_dtype)
        assert same(weights(several), weights(one))
    (place / "q_model-00003-of-00003.safetensors").unlink()
    assert refused(fresh, name=second, weight_dtype="bnb_nf4") == (
        f"{second} is one of 3 files of a model, and q_model-00003-of-00003.safetensors is not "
        "beside it; download that one too."
    )


def test_a_quantised_img_in_still_tells_its_inputs(fresh, folder) -> None:
    """diffusers quantises every linear layer unless told otherwise."""
    place = folder / "diffusion_models"
    state = quantised(fresh, place / UNET, "bnb_nf4")
    encode_layer = fresh.part("core.quantized_layers").encode
    for layer in ("img_in", "proj_out", "txt_in"):
        entries = encode_layer(state.pop(f"{layer}.weight"), "bnb_nf4")
        state.update({f"{layer}.{k}": t for k, t in entries.items()})
    save_file(state, place / "q_all.safetensors")
    found, shown = load(fresh, name="q_all.safetensors")
    assert shown["formats"] == {"bnb_nf4": LAYERS + 3} and velocity(found).isfinite().all()
    assert found.model.diffusion_model.in_channels == 64


def test_a_table_of_the_time_embedding_stays_whatever_a_preset_says(
    fresh, folder, monkeypatch
) -> None:
    """Qwen-Image-Layered has one, of two rows; every other matrix of a transformer is linear."""
    place, plans = folder / "diffusion_models", fresh.part("core.quantization")
    table = torch.arange(256.0).reshape(2, 128).bfloat16()
    name = "time_text_embed.addition_t_embedding.weight"
    save_file({**load_file(place / UNET), name: table}, place / "q_layered.safetensors")
    everything = plans.Preset("all", "", (plans.Rule("*", "main"),))
    monkeypatch.setattr(fresh.part("nodes.weight_choice"), "preset_of", lambda *_: everything)
    found, shown = load(fresh, name="q_layered.safetensors", weight_dtype="bnb_nf4")
    assert shown["formats"]["bnb_nf4"] > LAYERS
    assert torch.equal(weights(found)[f"diffusion_model.{name}"], table)
    assert velocity(found).isfinite().all()


# -------------------------------------------------------------------------------------- wrong things
class TestWrongThings:
    """One sentence each, that names the file and the remedy."""

    def write(self, host, format: str = "bnb_nf4", lack: str = "", other: str = "") -> str:
        """A quantised file, with a layer in another format or without one of its entries."""
        place = host.models / "diffusion_models"
        state = quantised(host, place / UNET, format)
        if other:
            plain, layer = load_file(place / UNET), "transformer_blocks.0.img_mod.1"
            state = {k: t for k, t in state.items() if not k.startswith(f"{layer}.weight")}
            entries = host.part("core.quantized_layers").encode(plain[f"{layer}.weight"], other)
            state.update({f"{layer}.{k}": t for k, t in entries.items()})
        save_file({k: t for k, t in state.items() if k != lack}, place / "q_bnb.safetensors")
        return "q_bnb.safetensors"

    def test_a_missing_absmax(self, fresh, folder) -> None:
        layer = "transformer_blocks.1.attn.to_q"
        name = self.write(fresh, lack=f"{layer}.weight.absmax")
        says = refused(fresh, name=name)
        assert says.startswith(f"{name}, layer {layer}: ") and "absmax" in says

    def test_scales_that_do_not_fit_the_weight(self, fresh, folder) -> None:
        for kind, layer in (
            ("DiffusionModel", "transformer_blocks.1.attn.to_q"),
            ("TextEncoder", "model.layers.1.mlp.up_proj"),
        ):
            place = folder / FOLDERS[kind]
            hints = fresh.part("core.checkpoint").read_header(str(place / FILES[kind])).metadata
            state = quantised(fresh, place / FILES[kind], "bnb_nf4")
            state[f"{layer}.weight.absmax"] = state[f"{layer}.weight.absmax"][1:].clone()
            save_file(state, place / "q_short.safetensors", hints)
            says = refused(fresh, kind, "q_short.safetensors")
            assert says.startswith("q_short.safetensors: ") and layer in says and "absmax" in says

    def test_damaged_layers_of_the_hosts_formats(self, fresh, folder) -> None:
        layer = "transformer_blocks.0.attn.to_q"
        name = self.write(fresh, "int8", lack=f"{layer}.comfy_quant")
        says = refused(fresh, name=name)
        assert says.startswith(f"{name}, layer {layer}: comfy_quant is missing")
        path = folder / "diffusion_models" / self.write(fresh, "int8")
        state = load_file(path)
        state[f"{layer}.weight"] = state[f"{layer}.weight"][:, 1:].clone()
        save_file(state, path, {"qwen_vram": '{"quantization": {}}'})  # it opens as what we wrote
        says = refused(fresh, name=name)
        assert says.startswith(f"{name}: Layer ") and f"{layer}: The file has 128 x 127" in says

    def test_another_format_than_the_file_has(self, fresh, folder) -> None:
        name = self.write(fresh, other="bnb_int8")
        for wanted in ("bnb_int8", "bnb_fp4", "int8"):
            assert refused(fresh, name=name, weight_dtype=wanted) == (
                f"{name} is quantised as bnb_nf4, not as {wanted}; choose weight_dtype default to "
                "open it as it is, or quantise a file in bf16, fp16 or fp8."
            )
        for wanted in ("bf16", "fp8_e4m3fn"):
            says = refused(fresh, name=name, weight_dtype=wanted)
            assert says.startswith(f"{name} is quantised as bnb_int8 and bnb_nf4, and stays so;")

    def test_a_dtype_for_what_others_quantised(self, fresh, folder) -> None:
        name = self.write(fresh, "int8")
        for wanted in ("bf16", "fp8_e4m3fn_fast"):
            assert refused(fresh, name=name, weight_dtype=wanted) == (
                f"{name} is quantised as int8, and stays so; choose weight_dtype default, or a "
                "file in bf16."
            )

    @pytest.mark.parametrize("kind", FOLDERS)
    def test_a_file_that_lacks_weights(self, fresh, folder, kind) -> None:
        place, (first, second) = folder / FOLDERS[kind], LACKING[kind]
        hints = fresh.part("core.checkpoint").read_header(str(place / FILES[kind])).metadata
        plain = load_file(place / FILES[kind])
        packed = quantised(fresh, place / FILES[kind], "int8")
        for state, options in (
            *((plain, {"weight_dtype": w}) for w in ("default", "bf16", "bnb_nf4")),
            (packed, {}),
            (packed, {"weight_dtype": "int8"}),
        ):
            left = {k: t for k, t in state.items() if not k.startswith((first, second))}
            save_file(left, place / "q_lacks.safetensors", hints)
            says = refused(fresh, kind, "q_lacks.safetensors", **options)
            if options == {"weight_dtype": "bnb_nf4"}:
                assert says.startswith("q_lacks.safetensors")
                continue
            assert says.startswith(f"q_lacks.safetensors lacks the weight {first}weight and ")
            assert says.endswith("more of the model's weights; download the complete file.")

    def test_a_block_that_is_missing_between_others(self, fresh, folder) -> None:
        place, gap = folder / "diffusion_models", "transformer_blocks.1."
        state = load_file(place / UNET)
        state = {k.replace(gap, "transformer_blocks.2."): t for k, t in state.items()}
        save_file(state, place / "q_gap.safetensors")
        says = refused(fresh, name="q_gap.safetensors")
        assert f"q_gap.safetensors lacks the weight {gap}" in says and "more of the" in says

    def test_an_encoder_without_eyes_reads_but_not_with_half_of_them(self, fresh, folder) -> None:
        place = folder / "text_encoders"
        plain = load_file(place / CLIP)
        blind = {k: t for k, t in plain.items() if not k.startswith("visual.")}
        save_file(blind, place / "q_blind.safetensors")
        assert load(fresh, "TextEncoder", "q_blind.safetensors")[0]
        lost = "visual.merger.mlp.0.weight"
        save_file(
            {k: t for k, t in plain.items() if k != lost},
            place / "q_half.safetensors",
            {"qwen_vram": '{"vision_heads": 2}'},
        )
        assert refused(fresh, "TextEncoder", "q_half.safetensors") == (
            f"q_half.safetensors lacks the weight {lost}; download the complete file."
        )

    @pytest.mark.parametrize("hints", [{}, {"qwen_vram": '{"quantization": {}}'}])
    def test_damaged_settings_and_scales_whoever_opens_the_file(self, fresh, folder, hints) -> None:
        layer = "transformer_blocks.0.attn.to_q"
        path = folder / "diffusion_models" / self.write(fresh, "int8")
        whole = load_file(path)
        for entry, bad, sentence in (
            ("comfy_quant", torch.ones(3), "comfy_quant cannot be read"),
            ("comfy_quant", {"format": ["int8_tensorwise"]}, "says the format ['int8_tensorwise']"),
            ("comfy_quant", {"convrot": 1}, "the format None"),
            (
                "comfy_quant",
                {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 7},
                "says convrot_groupsize 7",
            ),
            ("weight_scale", whole[f"{layer}.weight_scale"] * torch.nan, "values that are not num"),
        ):
            if isinstance(bad, dict):
                bad = torch.tensor(list(json.dumps(bad).encode()), dtype=torch.uint8)
            save_file({**whole, f"{layer}.{entry}": bad}, path, hints)
            says = refused(fresh, name=path.name)
            assert path.name in says and layer in says and sentence in says, says

    def test_quantising_what_is_quantised(self, fresh, folder) -> None:
        path = folder / "diffusion_models" / self.write(fresh, "int8")
        header = fresh.part("core.checkpoint").read_header(str(path))
        with pytest.raises(ValueError, match=r"is quantised already \(int8\) and would lose twice"):
            fresh.part("core.layer_source").LayerSource(header)

    def test_half_a_file(self, fresh, folder) -> None:
        path = folder / "diffusion_models" / self.write(fresh)
        for source, options in ((path, {}), (path.parent / UNET, {"weight_dtype": "bnb_nf4"})):
            whole = source.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            assert refused(fresh, name=path.name, **options).startswith(f"{path.name} is incompl")

    def test_no_bitsandbytes_or_an_old_one(self, fresh, folder, monkeypatch) -> None:
        name = self.write(fresh)
        formats = fresh.part("core.bitsandbytes_formats")
        for problem in ("It is not installed.", "0.41 is too old."):
            monkeypatch.setattr(formats, "problem", lambda problem=problem: problem)
            assert problem in refused(fresh, weight_dtype="bnb_nf4")
            assert problem in refused(fresh, "TextEncoder", weight_dtype="bnb_fp4")
            says = refused(fresh, name=name)
            assert says.startswith(f"{name} is quantised as bnb_nf4") and problem in says
        assert load(fresh, weight_dtype="bnb_int8")  # whose arithmetic is torch's
        options = fresh.nodes.NODE_CLASS_MAPPINGS["QwenVRAMLoadTextEncoder"].INPUT_TYPES()
        assert {"bnb_nf4", "bnb_int8"} <= set(options["required"]["weight_dtype"][1]["options"])

    def test_a_format_that_the_card_cannot_run(self, fresh, monkeypatch) -> None:
        choice = fresh.part("nodes.quantization_choice")
        old = {"device": "cuda", "name": "GTX 1080", "capability": (6, 1), "cuda": (12, 8)}
        here = replace(choice.machine(torch.device("cpu")), **old)
        monkeypatch.setattr(choice, "machine", lambda device: here)
        says = refused(fresh, weight_dtype="int4")
        assert says.startswith("w4a8 needs a card of compute capability 7.5 (RTX 20) or newer; GTX")
        assert says.endswith("Choose default, or bnb_nf4.")

    def test_another_kind_of_file(self, fresh, folder) -> None:
        shutil.copy(fresh.models / "loras" / LORA, folder / "diffusion_models" / "q_lora.sft")
        for weight_dtype in ("auto", "bnb_nf4"):
            assert "is a LoRA" in refused(fresh, name="q_lora.sft", weight_dtype=weight_dtype)


# ------------------------------------------------------------------------------ memory and manners
@pytest.mark.parametrize("format", ["bnb_nf4", "bnb_int8", "int8"])
def test_memory_never_holds_more_than_the_result_and_what_one_layer_takes(
    fresh, folder, format, monkeypatch
) -> None:
    path = folder / "diffusion_models" / "q_wide.safetensors"
    generator = torch.Generator().manual_seed(1)
    names = [f"transformer_blocks.{i}.attn.to_q.weight" for i in range(32)]
    made = {n: torch.randn(256, 256, generator=generator).bfloat16() for n in names}
    save_file(made, path)
    layer = 256 * 256 * 2
    quantised(fresh, path, format)  # what is made once (libraries, rotations) is made
    monkeypatch.setattr(fresh.part("core.tensor_reader"), "LEAST_OWN", 1 << 40)  # torch makes all
    with LiveBytes() as live:
        state = quantised(fresh, path, format)
    held = sum(t.untyped_storage().nbytes() for t in state.values())
    assert held == sum(t.nbytes for t in state.values()) < path.stat().st_size
    # The layer in bf16, and what an encoder makes of it on the way: a few copies in fp32.
    assert live.peak <= held + 9 * layer


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="torch's memory is all there is")
@pytest.mark.parametrize("format", ["bnb_nf4", "int8"])
def test_what_was_quantised_lies_in_memory_of_its_own(fresh, monkeypatch, format) -> None:
    """Pages of its own go back to the system; what lies in torch's stays with the process."""
    monkeypatch.setattr(fresh.part("core.tensor_reader"), "LEAST_OWN", 1)
    state = quantised(fresh, fresh.models / "diffusion_models" / UNET, format)
    assert [n for n, t in state.items() if t.data_ptr() % mmap.PAGESIZE] == []
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


def test_an_interrupt_between_layers_leaves_nothing_and_the_next_run_loads(
    fresh, monkeypatch
) -> None:
    import comfy.model_management as mm

    loading, seen = fresh.part("nodes.quantized_loading"), []

    def say(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            mm.interrupt_current_processing()

    monkeypatch.setattr(loading, "say", say)
    with pytest.raises(RunError):
        load(fresh, weight_dtype="bnb_nf4", **SMALLEST)
    assert seen == [f"quantising {n} of {LAYERS} layers" for n in (1, 2, 3)]
    assert not fresh.part("nodes.loaders").REGISTRY.live()
    mm.interrupt_current_processing(False)
    assert load(fresh, weight_dtype="bnb_nf4")[1]["formats"]


def test_progress_is_told_in_bytes_and_ends(fresh) -> None:
    import comfy.utils

    states: list[tuple[int, int]] = []
    before, path = comfy.utils.PROGRESS_BAR_HOOK, fresh.models / "diffusion_models" / UNET
    comfy.utils.set_progress_bar_global_hook(lambda n, of, _, **more: states.append((n, of)))
    try:
        quantised(fresh, path, "int8")
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    size = sum(t.nbytes for t in load_file(path).values())
    assert states[-1] == (size, size) and states[0][0] < size


def test_what_quantising_freed_goes_back_to_the_system(fresh, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(fresh.part("nodes.quantized_loading"), "trim", lambda: asked.append(1))
    assert load(fresh, weight_dtype="int8") and asked == [1]


def test_cycles_of_formats_and_loras_leave_no_weights_behind(fresh, monkeypatch) -> None:
    """A short run of the benchmark's cycles; that one counts 200, and the process's memory."""
    seen = []
    monkeypatch.setattr(fresh.part("core.tensor_reader"), "LEAST_OWN", 1 << 40)  # torch makes all
    with LiveBytes() as live:
        for weight_dtype, both in islice(quantized_cycles.graphs(UNET, CLIP, LORA, 32), 4):
            for graph in both:
                assert fresh.run(graph).executed, weight_dtype
            fresh.restart()
            seen.append(live.now)
    assert seen[0] <= 100_000 and seen[1] == seen[2] == seen[3]  # ConvRot's matrices stay


# ------------------------------------------------------------------------- keys of what is cached
def test_cached_conditioning_depends_on_what_was_quantised(fresh, monkeypatch) -> None:
    def result(**option) -> str:
        graph = {"clip": loader("TextEncoder", CLIP, **option), "e": encode("a fox")}
        graph.update(preview("e"))
        fresh.restart()
        return fresh.run(graph).status("e")["result"]

    choice = fresh.part("nodes.weight_choice")
    resolve, taken = choice.resolve, ["default"]

    def deciding(weight_dtype, *args):
        if weight_dtype != "auto":
            return resolve(weight_dtype, *args)
        return choice.Choice(taken[0], "auto: a test")

    monkeypatch.setattr(choice, "resolve", deciding)
    monkeypatch.setattr(choice, "_decided", {})
    assert result() == "miss"
    assert result(**SMALLEST) == "hit"  # which quantises nothing without a format
    assert result(weight_dtype="bnb_nf4") == "miss"
    assert result(weight_dtype="bnb_nf4", **SMALLEST) == "miss"
    assert result(weight_dtype="auto") == "miss"
    taken[0] = "bnb_nf4"
    assert result(weight_dtype="auto") == "hit"  # decided once
    choice._decided.clear()  # as after a restart
    assert result(weight_dtype="auto") == "miss"


def test_auto_decides_once_although_free_memory_changes(fresh, monkeypatch) -> None:
    choice, answers = fresh.part("nodes.weight_choice"), iter(("int8", "bnb_nf4"))
    monkeypatch.setattr(choice, "_decided", {})
    monkeypatch.setattr(
        choice, "resolve", lambda *_: choice.Choice(next(answers), "auto: the free RAM")
    )
    for _ in range(2):
        _, shown = load(fresh, weight_dtype="auto", **SMALLEST)
        assert shown["formats"] == {"int8": LAYERS}
        assert shown["text"].endswith("auto: the free RAM")
        fresh.restart()
