"""LoRAs of models that are held in fp8: added while they compute, where stock merges and rounds."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET, loader, node, text_to_image
from pack.tests.nodes.quantized_models import draw, error, lora_on, parts, state_of, write_lora
from pack.tests.nodes.test_quantised_files import scaled_fp8
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
Q, MLP, MOD = (
    f"transformer_blocks.{name}" for name in ("0.attn.to_q", "0.img_mlp.net.0.proj", "1.img_mod.1")
)
SHAPES = {Q: (128, 128), MLP: (512, 128), MOD: (768, 128)}
EXACT = 2e-4  # in fp32, where the order of additions alone differs
ROUNDED = 0.02  # what merging in fp8 makes of these
FILE = "in_fp8.safetensors"


@pytest.fixture(scope="module")
def models(host) -> SimpleNamespace:
    """The file in fp8: `ours`, `stock`, and `exact`, whose weights are the same numbers in fp32."""
    state = {k: t.to(FP8) if t.ndim == 2 else t for k, t in state_of(host, UNET).items()}
    folder = host.models / "diffusion_models"
    save_file(state, folder / FILE)
    save_file({k: t.float() for k, t in state.items()}, folder / "exact.safetensors")
    load = parts(host).architectures.load_transformer
    path = str(folder / FILE)
    return SimpleNamespace(
        ours=load(path, {"dtype": FP8, "unmerged_loras": True}),
        stock=load(path, {"dtype": FP8}),
        exact=load(str(folder / "exact.safetensors"), {"dtype": torch.float32}),
    )


@pytest.fixture(scope="module")
def bare(host, models) -> torch.Tensor:
    """What it draws without patches."""
    return draw(host, models.ours)


def with_loras(host, model: Any, *strengths: float) -> Any:
    """The model with LoRAs on every kind of layer, one for each strength."""
    for seed, strength in enumerate(strengths):
        name = f"fp8_{seed}.safetensors"
        write_lora(host, name, {**SHAPES, "img_in": (128, 64)}, gain=1.0, seed=seed, alpha=2.0)
        model = lora_on(host, model, name, strength)
    return model


def with_diff(host, model: Any, strength: float = 1.0, gain: float = 0.1) -> Any:
    """The model with a difference of one weight."""
    generator = torch.Generator().manual_seed(9)
    (host.models / "loras").mkdir(exist_ok=True)
    difference = {f"{Q}.diff": torch.randn(128, 128, generator=generator) * gain}
    save_file(difference, host.models / "loras" / "difference.safetensors")
    return lora_on(host, model, "difference.safetensors", strength)


# ------------------------------------------------------------------------------------------- LoRAs
def test_without_a_lora_it_is_stock_bit_by_bit(host, models, bare) -> None:
    assert torch.equal(draw(host, models.stock), bare)
    assert error(draw(host, models.exact), bare) < EXACT


@pytest.mark.parametrize("strengths", [(1.0,), (-0.5,), (1.0, 0.3)])
def test_a_lora_is_exact_where_stock_rounds(host, models, bare, strengths) -> None:
    ours, stock, exact = (
        draw(host, with_loras(host, m, *strengths))
        for m in (models.ours, models.stock, models.exact)
    )
    assert error(exact, bare) > 0.05
    assert error(ours, exact) < EXACT
    assert error(stock, exact) > 5 * EXACT  # else the comparison above would show nothing
    assert torch.equal(draw(host, models.ours), bare)  # and it is gone again


def test_strength_0_changes_no_bit(host, models, bare) -> None:
    model = with_loras(host, models.ours, 0.0)
    assert not model.run_time_patches.layers and torch.equal(draw(host, model), bare)


def test_what_is_resident_changes_no_bit(host, models) -> None:
    """As it is on a small card without dynamic VRAM, where stock's picture changes."""

    def one_pass(model: Any) -> torch.Tensor:
        draw_ = torch.Generator().manual_seed(1)
        x, text = (torch.randn(*s, generator=draw_) for s in ((1, 16, 1, 8, 8), (1, 8, 64)))
        with torch.inference_mode():
            return model.model.diffusion_model(x, torch.ones(1), context=text)

    def both(model: Any) -> list[torch.Tensor]:
        model, device = with_loras(host, model, 1.0), model.load_device
        made = []
        for room in (1e32, model.model_size() // 3):
            model.detach()
            model.partially_load(device, room)
            made.append(one_pass(model))
        assert model.model.model_lowvram
        model.detach()
        return made

    assert torch.equal(*both(models.ours))
    assert not torch.equal(*both(models.stock))


def test_the_weights_stay_as_the_file_has_them(host, models) -> None:
    model = with_loras(host, models.ours, 1.0)
    draw(host, model)
    stored = load_file(host.models / "diffusion_models" / FILE)
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.removesuffix(".weight") in SHAPES:
            assert parameter.dtype is FP8 and torch.equal(parameter.float(), stored[name].float())


def test_a_bf16_file_held_in_fp8_takes_them_too(host, models) -> None:
    path = str(host.models / "diffusion_models" / UNET)
    load = parts(host).architectures.load_transformer
    model = with_loras(host, load(path, {"dtype": FP8, "unmerged_loras": True}), 1.0)
    assert len(model.run_time_patches.layers) == len(SHAPES) + 1
    assert error(draw(host, model), draw(host, with_loras(host, models.ours, 1.0))) < 0.01


def test_with_dynamic_vram_the_parameter_may_be_what_the_file_has(models) -> None:
    module = models.ours.model.get_submodule(f"diffusion_model.{Q}")
    streamed = type(module)(8, 8, dtype=torch.bfloat16)
    assert not streamed.takes_patches and module.takes_patches
    streamed.weight_comfy_model_dtype = FP8  # as ComfyUI notes it, which casts at each use
    assert streamed.takes_patches


def test_files_with_scales_stay_the_hosts(host) -> None:
    folder, load = host.models / "diffusion_models", parts(host).architectures.load_transformer
    plain = {k: t.float() for k, t in state_of(host, UNET).items()}
    save_file(scaled_fp8(plain, "transformer_blocks."), folder / "scales.safetensors")
    model = load(str(folder / "scales.safetensors"), {"dtype": FP8, "unmerged_loras": True})
    model = with_loras(host, model, 0.8)
    assert not is_unmerged(host, model) and len(model.patches) == len(SHAPES) + 1


def is_unmerged(host, model: Any) -> bool:
    return parts(host).patcher.is_unmerged(model)


# ---------------------------------------------------------------------------- what the host merges
def test_other_patches_go_the_hosts_way(host, models, bare) -> None:
    ours, stock = (draw(host, with_diff(host, m)) for m in (models.ours, models.stock))
    assert torch.equal(ours, stock) and error(ours, bare) > ROUNDED
    assert torch.equal(draw(host, models.ours), bare)


def test_a_lora_after_another_patch_is_added_to_it(host, models) -> None:
    ours, exact = (with_loras(host, with_diff(host, m), 0.7) for m in (models.ours, models.exact))
    assert len(ours.run_time_patches.layers) == len(SHAPES) + 1
    assert error(draw(host, ours), draw(host, exact)) < ROUNDED


def test_a_patch_after_a_lora_takes_both_the_hosts_way(host, models) -> None:
    ours, stock, exact = (
        with_diff(host, with_loras(host, m, 0.7)) for m in (models.ours, models.stock, models.exact)
    )
    key = f"diffusion_model.{Q}.weight"
    assert key not in ours.run_time_patches.layers and len(ours.patches[key]) == 2
    assert error(draw(host, ours), draw(host, exact)) < error(draw(host, stock), draw(host, exact))


def test_a_lora_of_another_shape_leaves_the_others_as_they_are(host, models, caplog) -> None:
    good = with_loras(host, models.ours, 0.7)
    write_lora(host, "large.safetensors", {Q: (256, 256)})
    both = lora_on(host, good, "large.safetensors")
    assert "leaves out diffusion_model.transformer_blocks.0.attn.to_q.weight" in caplog.text
    assert not both.patches and torch.equal(draw(host, both), draw(host, good))


def test_a_weight_that_is_asked_for_has_all_patches(host, models) -> None:
    key = f"diffusion_model.{Q}.weight"
    found, exact = (with_loras(host, with_diff(host, m), 0.7) for m in (models.ours, models.exact))
    for model in (found, exact):
        model.detach()
    expected = exact.patch_weight_to_device(key, exact.load_device, return_weight=True)
    assert error(found.model_state_dict()[key], expected) < EXACT
    assert error(found.model_state_dict()[key], models.exact.model_state_dict()[key]) > 0.1


def test_the_factors_that_a_pass_brings_in_are_not_free(host, models, monkeypatch) -> None:
    workload = importlib.import_module(f"{host.pack.__name__}.nodes.workload")
    model = with_loras(host, models.ours, 1.0)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 10**9)
    free = {"bare": workload.memory_of(models.ours, [], (), None).free}
    free["before"] = workload.memory_of(model, [], (), None).free
    draw(host, model)
    free["after"] = workload.memory_of(model, [], (), None).free
    layers = model.run_time_patches.layers.values()
    taken = sum(4 * layer.rank * sum(layer.shape) for layer in layers)
    assert taken > 0 and free == {"bare": 10**9, "before": 10**9 - taken, "after": 10**9}


@pytest.mark.parametrize("loras", [(), (0.7,)])
def test_models_merge_as_in_stock(host, models, loras) -> None:
    merge = host.nodes.NODE_CLASS_MAPPINGS["ModelMergeSimple"]().merge
    other = with_diff(host, models.exact, gain=0.3)

    def patched(model: Any) -> Any:
        return with_loras(host, with_diff(host, model, 0.5), *loras)

    into = [draw(host, merge(patched(m), other, 0.6)[0]) for m in vars(models).values()]
    out_of = [draw(host, merge(other, patched(m), 0.6)[0]) for m in vars(models).values()]
    for ours, stock, exact in (into, out_of):
        assert error(ours, exact) < 1.2 * error(stock, exact) + EXACT


def test_stock_saving_writes_what_stock_would(host, models) -> None:
    save = host.nodes.NODE_CLASS_MAPPINGS["ModelSave"]().save
    files = {}
    for name in ("ours", "stock"):
        model = with_loras(host, getattr(models, name), 0.7)
        save(model, f"fp8_{name}")
        (path,) = (host.base / "output").rglob(f"fp8_{name}*.safetensors")
        files[name] = load_file(path)
        path.unlink()
    assert files["ours"].keys() == files["stock"].keys()
    changed = load_file(host.models / "diffusion_models" / FILE)[f"{Q}.weight"].float()
    for key, tensor in files["ours"].items():
        assert tensor.dtype == files["stock"][key].dtype
        assert torch.equal(tensor.float(), files["stock"][key].float()), key
    (saved,) = (t.float() for k, t in files["ours"].items() if k.endswith(f"{Q}.weight"))
    assert not torch.equal(saved, changed)


def test_hooks_are_the_hosts(host, models) -> None:
    from comfy.hooks import WeightHook

    model = models.ours.clone()
    key = f"diffusion_model.{Q}.weight"
    assert model.add_hook_patches(WeightHook(), {key: ("diff", (torch.ones(128, 128),))}) == [key]
    assert any(key in patches for patches in model.hook_patches.values())


# -------------------------------------------------------------------------------------- the loader
@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_the_loader_that_was_asked_for_fp8_keeps_loras_apart(fresh, weight_dtype) -> None:
    graph = text_to_image()
    graph["unet"] = loader("DiffusionModel", UNET, weight_dtype=weight_dtype)
    plain = fresh.run(graph).outputs["sampler"][0][0]["samples"]
    write_lora(fresh, "loader.safetensors", SHAPES, gain=1.0)
    importlib.import_module("folder_paths").get_filename_list("loras")
    lora = {"lora_name": "loader.safetensors", "strength_model": 1.0}
    graph["lora"] = node("LoraLoaderModelOnly", model=["unet", 0], **lora)
    graph["shift"]["inputs"]["model"] = ["lora", 0]
    run = fresh.run(graph)
    patched = run.outputs["lora"][0][0]
    assert len(patched.run_time_patches.layers) == len(SHAPES) and not patched.patches
    assert error(run.outputs["sampler"][0][0]["samples"], plain) > 0.05
    graph["shift"]["inputs"]["model"] = ["unet", 0]
    assert torch.equal(fresh.run(graph).outputs["sampler"][0][0]["samples"], plain)


def test_by_default_all_is_stock(host) -> None:
    choice = host.part("nodes.weight_choice")
    path = str(host.models / "diffusion_models" / UNET)
    for name, apart in (("default", False), ("bf16", False), ("fp8_e4m3fn", True)):
        options = choice.wanted("diffusion_models", path, name, "default", "balanced").options()
        assert options.get("unmerged_loras", False) is apart
