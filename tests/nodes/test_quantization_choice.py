"""auto and int4 on machines as ComfyUI describes them; what this machine is."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from pack.tests.graphs import CLIP, UNET, loader, node, text_to_image
from pack.tests.host import RunError
from pack.tests.nodes.quantized_models import FP8, draw, quantized_state, state_of, write_lora
from pack.tests.nodes.test_loaders import load
from pack.tests.nodes.test_quantised_files import scaled_fp8
from safetensors.torch import save_file

GIB = 2**30


@pytest.fixture
def choice(host, monkeypatch):
    """The module, on a machine that the test can change: an RTX 3060 with 32 GB of RAM."""
    module = host.part("nodes.quantization_choice")
    here = module.machine(torch.device("cpu"))
    known = {"device": "cuda", "name": "NVIDIA GeForce RTX 3060", "capability": (8, 6)}
    known |= {"cuda": (13, 0), "vram_total": 12 * GIB, "vram_free": 11 * GIB, "dynamic_vram": True}
    module.here = replace(here, ram_total=32 * GIB, ram_free=29 * GIB, **known)
    monkeypatch.setattr(module, "machine", lambda device: module.here)
    monkeypatch.setattr(module, "_capability", lambda device: module.here.capability)
    yield module
    del module.here


def header(host, folder: str, name: str):
    return host.part("core.checkpoint").read_header(str(host.models / folder / name))


def test_a_file_is_what_its_header_says(host, choice) -> None:
    head = header(host, "diffusion_models", UNET)
    file = choice.file_of(head)
    assert file.kind == host.part("core.checkpoint").TRANSFORMER
    assert (file.dtype, file.bytes) == ("bf16", sum(t.bytes for t in head.tensors.values()))
    assert file.parameters * 2 == file.bytes
    assert file.sizes["w4a8"] < file.sizes["int8"] < file.bytes
    assert file.smallest["bnb_nf4"] < file.sizes["bnb_nf4"]


@pytest.mark.parametrize("format", ["int8", "w4a8", "bnb_int8", "bnb_nf4"])
def test_the_size_foretold_is_the_size_of_what_is_loaded(host, choice, format) -> None:
    loading = host.part("nodes.quantized_loading")
    head = header(host, "diffusion_models", UNET)
    preset = host.part("nodes.quantization_presets").preset("diffusion_models", "balanced")
    state = loading.quantized_state_dict(
        head, loading.Quantization(format, preset), torch.device("cpu")
    )
    small = ("comfy_quant", "bitsandbytes__", "codebook", "weight_format")
    weights = sum(t.nbytes for name, t in state.items() if not any(s in name for s in small))
    assert weights == pytest.approx(choice.file_of(head, preset).sizes[format], rel=0.01)


@pytest.fixture(scope="module")
def in_fp8(host) -> str:
    """A diffusion model's file in plain fp8."""
    path = host.models / "diffusion_models" / "choice_fp8.safetensors"
    save_file(quantized_state(host, state_of(host, UNET), "fp8_e4m3fn"), path)
    yield path.name
    path.unlink()


@pytest.mark.parametrize(("vram", "apart"), [(12, True), (24, True), (40, False)])
def test_auto_keeps_loras_apart_unless_the_card_holds_both(
    host, choice, in_fp8, monkeypatch, vram: int, apart: bool
) -> None:
    """The file stands for the official one, of 20.4 GB."""
    weights, of = host.part("nodes.weight_choice"), choice.file_of
    monkeypatch.setattr(weights, "_decided", {})
    monkeypatch.setattr(choice, "file_of", lambda *a: replace(of(*a), bytes=20_430_000_000))
    choice.here = replace(choice.here, vram_free=vram * GIB - GIB // 2)
    path = str(host.models / "diffusion_models" / in_fp8)
    found = weights.wanted("diffusion_models", path, "auto", "default", "balanced")
    options = found.options()
    assert (options.get("dtype"), options.get("unmerged_loras", False)) == (
        (FP8, True) if apart else (None, False)
    )
    assert ("LoRAs added as it computes" in found.why) is apart and "kept as fp8" in found.why


def test_auto_leaves_files_with_scales_to_comfyui(host, choice) -> None:
    path = host.models / "diffusion_models" / "choice_scales.safetensors"
    plain = {k: t.float() for k, t in state_of(host, UNET).items()}
    save_file(scaled_fp8(plain, "transformer_blocks."), path)
    choice.here = replace(choice.here, vram_free=0)
    found = choice.resolve("auto", header(host, "diffusion_models", path.name), "default")
    path.unlink()
    assert found.weight_dtype == "default" and "LoRA" not in found.why


@pytest.mark.parametrize("computes_in_fp8", [True, False])
def test_without_a_lora_it_draws_what_default_draws_on_a_card(
    host, in_fp8, monkeypatch, computes_in_fp8
) -> None:
    """Where ComfyUI keeps fp8: on cards that compute in it, and on those too small for bf16."""
    load_transformer = host.part("nodes.architectures").load_transformer
    weights = host.part("nodes.weight_choice")
    mm = host.part("nodes.architectures").mm
    path = str(host.models / "diffusion_models" / in_fp8)
    taken = weights.wanted("diffusion_models", path, "auto", "default", "balanced")
    ours = load_transformer(path, taken.options())
    monkeypatch.setattr(mm, "supports_fp8_compute", lambda *_: computes_in_fp8)
    monkeypatch.setattr(mm, "maximum_vram_for_weights", lambda *_: 0)
    stock = load_transformer(path, {})
    assert stock.model.model_config.unet_config["dtype"] is FP8
    assert taken.name == "fp8_e4m3fn" and torch.equal(draw(host, ours), draw(host, stock))


def test_what_auto_takes_for_an_fp8_file_draws_with_a_lora_and_says_so(fresh, in_fp8) -> None:
    """On this CPU, as on a small card."""
    write_lora(fresh, "choice.safetensors", {"transformer_blocks.0.attn.to_q": (128, 128)})
    importlib.import_module("folder_paths").get_filename_list("loras")
    graph = text_to_image()
    lora = {"lora_name": "choice.safetensors", "strength_model": 1.0, "model": ["unet", 0]}
    graph["lora"] = node("LoraLoaderModelOnly", **lora)
    graph["shift"]["inputs"]["model"] = ["lora", 0]
    drawn = {}
    for weight_dtype in ("auto", "fp8_e4m3fn"):
        graph["unet"] = loader("DiffusionModel", in_fp8, weight_dtype=weight_dtype)
        run = fresh.run(graph)
        drawn[weight_dtype] = run.outputs["sampler"][0][0]["samples"]
        patched = run.outputs["lora"][0][0]
        assert len(patched.run_time_patches.layers) == 1 and not patched.patches
        says = "; LoRAs added as it computes" in run.status("unet")["text"]
        assert says is (weight_dtype == "auto")
    assert torch.equal(*drawn.values())


def test_auto_asks_the_machine(host, choice) -> None:
    head = header(host, "diffusion_models", UNET)
    found = choice.resolve("auto", head, "default")
    assert found.weight_dtype == "bf16"
    assert "auto: bf16 file, RTX 3060, free: 11.8 GB VRAM, 31.1 GB RAM: kept" in found.why


def test_auto_goes_on_without_a_package_that_turns_out_broken(host, choice, monkeypatch) -> None:
    head = header(host, "diffusion_models", UNET)
    little = choice.file_of(head).sizes["bnb_nf4"] + 2_100_000_000
    card = {"ram_free": little, "vram_free": 0, "cuda": (12, 8)}
    choice.here = replace(choice.here, **card)
    big = {"bytes": 40 * GIB, "sizes": {"bnb_nf4": little - 2_050_000_000}, "smallest": {}}
    monkeypatch.setattr(choice, "file_of", lambda *a, of=choice.file_of: replace(of(*a), **big))
    assert choice.resolve("auto", head, "default").weight_dtype == "bnb_nf4"
    monkeypatch.setattr(choice, "missing_package", lambda format: f"{format} is broken: mend it.")
    found = choice.resolve("auto", head, "default")
    assert found.weight_dtype == "bf16" and "would fit, but is broken: mend it" in found.why


def test_int4_is_the_best_for_the_card(host, choice) -> None:
    head = header(host, "diffusion_models", UNET)
    assert tuple(vars(choice.resolve("int4", head, "default")).values()) == (
        "w4a8",
        "int4: w4a8",
        None,
    )
    choice.here = replace(choice.here, capability=(7, 5))
    assert choice.resolve("int4", head, "default").weight_dtype == "w4a4"
    choice.here = replace(choice.here, capability=(6, 1), name="GTX 1080")
    with pytest.raises(
        ValueError, match=r"w4a8 needs a card .* GTX 1080 has 6\.1\. Choose default"
    ):
        choice.resolve("int4", head, "default")


def test_what_runs_slowly_is_allowed_and_said(host, choice) -> None:
    head = header(host, "diffusion_models", UNET)
    choice.here = replace(choice.here, cuda=(12, 8))
    found = choice.resolve("int8", head, "default")
    assert found.weight_dtype == "int8" and found.why.startswith("slow: ComfyUI's kernels")
    fast = choice.resolve("fp8_e4m3fn_fast", head, "cpu")
    assert fast.weight_dtype == "fp8_e4m3fn_fast" and "does not compute in fp8" in fast.why
    assert choice.resolve("bf16", head, "cpu") == choice.Choice("bf16", "")


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_a_device_that_holds_no_fp8_says_so(fresh, choice, monkeypatch, weight_dtype) -> None:
    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    monkeypatch.setattr(choice.mm, "supports_cast", lambda device, dtype: dtype not in fp8)
    with pytest.raises(RunError, match="the CPU holds no fp8; choose bf16, or bnb_int8"):
        load(fresh, "DiffusionModel", UNET, weight_dtype=weight_dtype)


def preset(host, **formats: str):
    """A user's: formats of to_q and to_k, nothing else."""
    plans = host.part("core.quantization")
    rules = [plans.Rule(f"*.attn.{layer}", format) for layer, format in formats.items()]
    return plans.Preset("mine", "", (*rules, plans.Rule("*", "keep")))


def test_what_a_preset_asks_for_beside_is_asked_of_the_machine_too(host, choice) -> None:
    head, mine = header(host, "diffusion_models", UNET), preset(host, to_q="main", to_k="w4a4")
    choice.here = replace(choice.here, cuda=(12, 8))
    found = choice.resolve("bnb_nf4", head, "default", mine)
    assert found.weight_dtype == "bnb_nf4" and found.why.startswith("w4a4, slow: ComfyUI's")
    choice.here = replace(choice.here, capability=(6, 1), name="GTX 1080")
    with pytest.raises(ValueError, match=r"^w4a4 needs .* preset than mine, which has .* w4a4\.$"):
        choice.resolve("bnb_nf4", head, "default", mine)
    only_8_bit = preset(host, to_q="bnb_int8")  # what weight_dtype says is in no layer
    assert choice.resolve("int8", head, "default", only_8_bit) == choice.Choice("int8", "")
    text = header(host, "text_encoders", CLIP)  # whose table of words is held in int8
    assert choice.resolve("bnb_nf4", text, "default") == choice.Choice("bnb_nf4", "")


def test_auto_asks_for_what_the_preset_has_beside_too(host, choice, monkeypatch) -> None:
    head, mine = header(host, "diffusion_models", UNET), preset(host, to_q="main", to_k="bnb_nf4")
    of = choice.file_of
    monkeypatch.setattr(choice, "file_of", lambda *a: replace(of(*a), bytes=40 * GIB))
    assert choice.resolve("auto", head, "default", mine).weight_dtype == "int8"
    choice.here = replace(choice.here, packages=choice.here.packages - {"bitsandbytes"})
    with pytest.raises(ValueError, match="^bnb_nf4 needs the package .* preset than mine"):
        choice.resolve("auto", head, "default", mine)
    taken = choice.Choice("w4a8", "", "smallest")  # and not where it takes another preset
    monkeypatch.setattr(choice, "choose", lambda *_: taken)
    assert choice.resolve("auto", head, "default", mine) == taken


def test_the_loader_says_what_auto_took_and_why(fresh) -> None:
    for kind, name in (("DiffusionModel", UNET), ("TextEncoder", CLIP)):
        _, shown = load(fresh, kind, name, weight_dtype="auto")
        assert (
            "auto: bf16 file, the CPU" in shown["text"] and "GB RAM: kept as bf16" in shown["why"]
        )
        assert re.search(r"the RAM holds its \d+\.\d MB", shown["why"])


def test_auto_takes_float64_for_what_it_is(host, choice) -> None:
    for folder, name, taken in (
        ("diffusion_models", UNET, "bf16"),
        ("text_encoders", CLIP, "fp32"),
    ):
        head = header(host, folder, name)
        rows = {n: replace(t, dtype="F64", bytes=4 * t.bytes) for n, t in head.tensors.items()}
        found = choice.resolve("auto", replace(head, tensors=rows), "default")
        assert found.weight_dtype == taken and f"converted to {taken}" in found.why


@pytest.mark.parametrize(("folder", "file"), [("diffusion_models", UNET), ("text_encoders", CLIP)])
def test_a_preset_that_auto_takes_is_what_is_loaded_kept_and_remembered(
    host, monkeypatch, folder, file
) -> None:
    """In key, options and the stored prompts' key: the rules of smallest, whatever was chosen."""
    module, presets = host.part("nodes.weight_choice"), host.part("nodes.quantization_presets")
    path = str(host.models / folder / file)
    taken = module.Choice("bnb_nf4", "auto: why", "smallest")
    monkeypatch.setattr(module, "_decided", {})
    monkeypatch.setattr(module, "resolve", lambda *_: taken)
    asked = module.wanted(folder, path, "auto", "default", "balanced")
    rules = presets.preset(folder, "smallest")
    assert asked.options()["quantization"].preset == rules
    assert asked.key == ("bnb_nf4", "default", rules.rules) and asked.why == "auto: why"
    loaders = host.part("nodes.loaders")
    loader = loaders.LoadTextEncoder if folder == "text_encoders" else loaders.LoadDiffusionModel
    decided = loader.decided(
        **{loader.FILE_INPUT: file}, weight_dtype="auto", device="default", preset="balanced"
    )
    assert decided == ["bnb_nf4", [[rule.pattern, rule.format] for rule in rules.rules]]


def test_auto_counts_the_users_own_smallest(host, choice, monkeypatch) -> None:
    head = header(host, "diffusion_models", UNET)
    all_presets = choice.all_presets()
    best = {"diffusion_models": {**all_presets["diffusion_models"]}}
    best["diffusion_models"]["smallest"] = best["diffusion_models"]["best"]
    before = choice.file_of(head).smallest["bnb_nf4"]
    monkeypatch.setattr(choice, "all_presets", lambda: best)
    assert choice.file_of(head).smallest["bnb_nf4"] > before


# --------------------------------------------------------------------------------- this machine
def test_this_machine_is_described_as_the_system_does(host) -> None:
    here = host.part("nodes.quantization_choice").machine(torch.device("cpu"))
    assert (here.device, here.name, here.vram_total, here.capability) == ("cpu", "the CPU", 0, None)
    assert 0 < here.ram_free <= here.ram_total <= psutil.virtual_memory().total
    assert {"bitsandbytes", "comfy-kitchen"} <= here.packages
    assert here.pinnable is None  # ComfyUI pins nothing without a card


def test_a_container_limits_the_ram(host, monkeypatch) -> None:
    module = host.part("nodes.quantization_choice")
    memory = SimpleNamespace(total_bytes=64 * GIB, used_bytes=30 * GIB, own_bytes=20 * GIB)
    monkeypatch.setattr(module, "device_memory", lambda device: memory)
    monkeypatch.setattr(module.container_memory, "limit", lambda: None)
    assert module._ram() == (64 * GIB, 54 * GIB, False)  # what ComfyUI holds it can let go
    limit = module.container_memory.Limit(32 * GIB, 23 * GIB)
    monkeypatch.setattr(module.container_memory, "limit", lambda: limit)
    assert module._ram() == (32 * GIB, 29 * GIB, True)


def test_a_card_is_described_by_driver_torch_and_comfyui(host, monkeypatch) -> None:
    module = host.part("nodes.quantization_choice")
    memory = SimpleNamespace(total_bytes=12 * GIB, used_bytes=8 * GIB, other_bytes=GIB, name="Card")
    ram = SimpleNamespace(total_bytes=32 * GIB, used_bytes=8 * GIB, own_bytes=2 * GIB)
    monkeypatch.setattr(module, "device_memory", lambda d: ram if d.type == "cpu" else memory)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(module.comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(module.mm, "MAX_PINNED_MEMORY", 0.4 * 32 * GIB)
    here = module.machine(torch.device("cuda", 0))
    assert (here.device, here.name, here.capability, here.cuda) == ("cuda", "Card", (8, 9), (12, 8))
    assert here.pinnable == int(0.4 * 32 * GIB)
    assert (here.vram_total, here.vram_free, here.dynamic_vram) == (12 * GIB, 11 * GIB, True)
    memory.other_bytes, memory.used_bytes = None, 5 * GIB  # the driver tells nothing of processes
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GIB)
    assert module.machine(torch.device("cuda", 0)).vram_free == 11 * GIB
    monkeypatch.setattr(torch.version, "hip", "7.0")
    here = module.machine(torch.device("cuda", 0))
    assert (here.device, here.capability) == ("rocm", None)
