"""Quantised layers take patches, and let go of them, as stock layers do."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.tests.examples import examples
from pack.tests.graphs import UNET
from pack.tests.nodes.quantized_models import (
    draw,
    error,
    lora_on,
    model_of,
    parts,
    quantized_state,
    state_of,
    write_lora,
)
from safetensors.torch import save_file

WEIGHTS_ONLY = ("bnb_nf4", "bnb_int8")  # the others quantise what comes in, too
Q, K, MLP, MOD = (
    f"transformer_blocks.{name}"
    for name in ("0.attn.to_q", "1.attn.to_k", "0.img_mlp.net.0.proj", "0.img_mod.1")
)
SHAPES = {Q: (128, 128), K: (128, 128), MLP: (512, 128), MOD: (768, 128)}
EXACT = 2e-4  # in fp32, where the order of additions alone differs


def decoded(host, plain, state) -> dict[str, torch.Tensor]:
    """The plain weights that the quantised ones stand for, in fp32."""
    layers = parts(host).layers
    dense = {}
    for name, tensor in plain.items():
        layer = name.removesuffix("weight")
        own = {k.removeprefix(layer): t for k, t in state.items() if k.startswith(layer)}
        whole = name.endswith(".weight") and layers.format_of(own) is not None
        dense[name] = layers.decode(own, torch.float32) if whole else tensor.float()
    return dense


@pytest.fixture(scope="module")
def pair(host):
    """An nf4 model, and one of the same numbers whose weights are dense: it goes the host's way."""
    plain = {name: tensor.float() for name, tensor in state_of(host, UNET).items()}
    state = quantized_state(host, plain, "bnb_nf4")
    dense = decoded(host, plain, state)
    return model_of(host, plain, state), model_of(host, dense, dense)


@pytest.fixture(scope="module")
def bare(host, pair):
    """What the nf4 model draws without patches."""
    return draw(host, pair[0])


def patches_file(host, name: str, tensors: dict[str, torch.Tensor]) -> str:
    save_file({k: t.clone() for k, t in tensors.items()}, host.models / "loras" / name)
    return name


# ------------------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize("format", ["bnb_nf4", "bnb_int8", "int8", "w4a8", "w4a4"])
def test_a_lora_gives_what_the_merged_weights_give(host, format) -> None:
    plain = state_of(host, UNET)
    state = quantized_state(host, plain, format)
    differences = write_lora(host, "merged.safetensors", SHAPES, alpha=2.0, gain=1.0)
    model = model_of(host, plain, state)
    before = draw(host, model)
    with_lora = draw(host, lora_on(host, model, "merged.safetensors", 0.7))
    dense = decoded(host, plain, state)
    merged = dict(dense)
    for layer, difference in differences.items():
        merged[f"{layer}.weight"] = dense[f"{layer}.weight"] + 0.7 * difference
    own_error = error(before, draw(host, model_of(host, dense, dense)))
    expected = draw(host, model_of(host, dense, merged))
    assert error(with_lora, before) > max(0.05, 3 * own_error)
    allowed = EXACT if format in WEIGHTS_ONLY else 1.5 * own_error
    assert error(with_lora, expected) < allowed
    assert torch.equal(draw(host, model), before)  # and it is gone again


def lora_of(shape, draw_) -> tuple:
    rank = draw_(st.integers(1, 128))
    dtype = draw_(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    alpha = draw_(st.sampled_from([None, 0.5, 1.0, 16.0]))
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn(shape[0], rank, generator=generator).to(dtype)
    down = torch.randn(rank, shape[1], generator=generator).to(dtype)
    return up, down, alpha, None, None, None


@given(data=st.data())
@settings(max_examples=examples(10))
def test_all_factors_of_a_layer_multiply_to_what_the_host_would_add(host, data) -> None:
    from comfy.lora import calculate_weight
    from comfy.weight_adapter import LoRAAdapter

    it, shape = parts(host).low_rank, (48, 80)
    strengths = data.draw(st.lists(st.sampled_from([1.0, -0.5, 0.25, 2.0]), min_size=1, max_size=4))
    given_ = [LoRAAdapter(set(), lora_of(shape, data.draw)) for _ in strengths]
    entries = [
        it.Patch(s, lora, 1.0, None, None) for s, lora in zip(strengths, given_, strict=True)
    ]
    layer = it.Layer("w", shape, tuple(entries))
    down, up = layer.factors(torch.device("cpu"), torch.float32)
    assert layer.low_rank and layer.rank == down.shape[0] == up.shape[1]
    assert layer.bytes_of(torch.float32) == down.nbytes + up.nbytes
    expected = calculate_weight(entries, torch.zeros(shape), "w")
    assert torch.allclose(up @ down, expected, rtol=1e-4, atol=1e-3)


STYLES = {
    "comfyui": ("diffusion_model.{}", ("lora_up.weight", "lora_down.weight")),
    "diffusers": ("transformer.{}", ("lora_B.weight", "lora_A.weight")),
    "plain": ("{}", ("lora.up.weight", "lora.down.weight")),
    "kohya": ("lora_unet_{}", ("lora_up.weight", "lora_down.weight")),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_way_to_name_a_lora_is_understood(host, pair, style) -> None:
    prefix, names = STYLES[style]
    plain = write_lora(host, "named.safetensors", SHAPES, gain=1.0)
    named = {
        prefix.format(layer.replace(".", "_") if style == "kohya" else layer): shape
        for layer, shape in SHAPES.items()
    }
    expected = draw(host, lora_on(host, pair[0], "named.safetensors"))
    write_lora(host, f"{style}.safetensors", named, gain=1.0, names=names)
    assert torch.equal(draw(host, lora_on(host, pair[0], f"{style}.safetensors")), expected)
    assert plain


@pytest.mark.parametrize("strengths", [(1.0,), (0.35,), (-1.0,), (1.0, 1.0), (0.5, -0.25, 0.75)])
def test_several_loras_and_any_strength_are_the_hosts_own(host, pair, bare, strengths) -> None:
    write_lora(host, "one.safetensors", SHAPES, rank=3, alpha=6.0, gain=1.0, dtype=torch.float16)
    more = {Q: SHAPES[Q], "img_in": (128, 64)}  # img_in is not quantised
    write_lora(host, "two.safetensors", more, rank=9, gain=1.0, seed=5)
    quantized, dense = pair
    for strength, name in zip(strengths, itertools.cycle(["one", "two"]), strict=False):
        name = "one" if strengths == (1.0, 1.0) else name  # the same one twice
        quantized = lora_on(host, quantized, f"{name}.safetensors", strength)
        dense = lora_on(host, dense, f"{name}.safetensors", strength)
    expected = draw(host, dense)
    assert error(draw(host, quantized), expected) < EXACT < 1e-3 < error(expected, bare)
    assert torch.equal(draw(host, pair[0]), bare)


def test_strength_0_changes_no_bit_and_computes_nothing(host, pair, bare) -> None:
    write_lora(host, "zero.safetensors", SHAPES)
    model = pair[0].clone()
    keys = model.add_patches(adapters(host, "zero.safetensors", model), 0.0)
    assert len(keys) == len(SHAPES) and not model.run_time_patches.layers
    assert torch.equal(draw(host, model), bare)


def adapters(host, name: str, model) -> dict:
    """The patches of a file by the host's keys."""
    import comfy.lora
    import comfy.utils

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    return comfy.lora.load_lora(
        comfy.utils.load_torch_file(str(host.models / "loras" / name)), keys
    )


def test_clones_with_and_without_a_lora_run_in_turn(host, pair, bare) -> None:
    write_lora(host, "a.safetensors", SHAPES, gain=1.0)
    write_lora(host, "b.safetensors", {MLP: SHAPES[MLP]}, gain=1.0, seed=1)
    one = lora_on(host, pair[0], "a.safetensors")
    both = lora_on(host, one, "b.safetensors", 0.5)
    pictures = [draw(host, model) for model in (one, both)]
    assert not torch.equal(*pictures) and not torch.equal(pictures[0], bare)
    for model, expected in ((pair[0], bare), (both, pictures[1]), (one, pictures[0])):
        assert torch.equal(draw(host, model), expected)
        assert torch.equal(draw(host, model.clone()), expected)
    assert one.patches_uuid != both.patches_uuid != pair[0].patches_uuid
    assert not one.clone_has_same_weights(both) and both.clone_has_same_weights(both.clone())


def test_a_lora_of_another_models_shape_leaves_out_those_layers(host, pair, bare, caplog) -> None:
    write_lora(host, "large.safetensors", {Q: (256, 256)})
    model = lora_on(host, pair[0], "large.safetensors")
    assert "leaves out diffusion_model.transformer_blocks.0.attn.to_q.weight" in caplog.text
    assert torch.equal(draw(host, model), bare)


# ------------------------------------------------------------------------------ other patches
def noise(*shape: int, gain: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) * gain


OTHERS = {
    "LoHa": {
        f"hada_w{i}_{ab}": noise(*s) for i in "12" for ab, s in (("a", (128, 4)), ("b", (4, 128)))
    },
    "LoKr": {"lokr_w1": noise(8, 8), "lokr_w2": noise(16, 16)},
    "LoRA with DoRA": {
        **{"lora_up.weight": noise(128, 4), "lora_down.weight": noise(4, 128)},
        "dora_scale": 1 + noise(1, 128),
    },
    "diff": {"diff": noise(128, 128)},
    "set": {"set_weight": noise(128, 128)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_patches_of_other_kinds_are_computed_on_dequantised_weights(host, pair, bare, kind) -> None:
    (host.models / "loras").mkdir(exist_ok=True)
    tensors = {f"{layer}.{name}": t for layer in (Q, K) for name, t in OTHERS[kind].items()}
    name = patches_file(host, "other.safetensors", tensors)
    write_lora(host, "beside.safetensors", {MLP: SHAPES[MLP], Q: SHAPES[Q]}, gain=1.0)
    models = [lora_on(host, m, name, 0.8) for m in pair]
    models = [lora_on(host, m, "beside.safetensors", 0.5) for m in models]
    expected = draw(host, models[1])
    assert error(draw(host, models[0]), expected) < EXACT < error(expected, bare)
    report = parts(host).patcher.lora_report(models[0])
    assert report.startswith("1 LoRA added at run time (rank 4, ")
    assert f"{kind}" in report and "on 2 layers computed on dequantised weights" in report
    assert torch.equal(draw(host, pair[0]), bare)


def test_biases_and_norms_go_the_hosts_way(host, pair, bare) -> None:
    tensors = {f"{MLP}.diff_b": noise(512), f"{MLP}.lora_up.weight": noise(512, 2)}
    tensors |= {f"{MLP}.lora_down.weight": noise(2, 128), "txt_norm.w_norm": noise(64)}
    name = patches_file(host, "bias.safetensors", tensors)
    models = [lora_on(host, m, name) for m in pair]
    assert {k.rpartition(".")[0] for k in models[0].patches} == {
        f"diffusion_model.{MLP}",
        "diffusion_model.txt_norm",
    }
    expected = draw(host, models[1])
    assert error(draw(host, models[0]), expected) < EXACT < error(expected, bare)
    assert torch.equal(draw(host, pair[0]), bare)


def test_the_bypass_loader_works_too(host, pair, bare) -> None:
    import comfy.sd
    import comfy.utils

    write_lora(host, "bypass.safetensors", SHAPES, gain=1.0)
    file = comfy.utils.load_torch_file(str(host.models / "loras" / "bypass.safetensors"))
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(pair[0], None, file, 0.7, 0)
    expected = draw(host, lora_on(host, pair[1], "bypass.safetensors", 0.7))
    assert error(draw(host, bypassed), expected) < EXACT
    assert torch.equal(draw(host, pair[0]), bare)


def test_models_merge_both_ways(host, pair) -> None:
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    plain = {k: t.float() for k, t in state_of(host, UNET).items()}
    write_lora(host, "merge.safetensors", SHAPES, gain=1.0)
    other = lora_on(host, model_of(host, plain, plain), "merge.safetensors", 0.5)
    quantized, dense = (lora_on(host, m, "merge.safetensors", -0.5) for m in pair)
    for kind, inputs in (("ModelMergeSimple", (0.3,)), ("ModelMergeSubtract", (0.5,))):
        merge = nodes[kind]().merge
        for first, second in (
            ((quantized, other), (dense, other)),
            ((other, quantized), (other, dense)),
        ):
            found, expected = (draw(host, merge(*m, *inputs)[0]) for m in (first, second))
            assert error(found, expected) < EXACT
    report = parts(host).patcher.lora_report(
        nodes["ModelMergeSimple"]().merge(quantized, other, 0.3)[0]
    )
    assert "another model's weights on" in report


@pytest.mark.parametrize("loaded", ["whole", "in part"])
def test_a_lora_is_extracted_from_what_the_model_computes_with(
    host, pair, monkeypatch, loaded
) -> None:
    import comfy.model_management as mm
    from comfy_extras import nodes_lora_extract

    other = model_of(host, *[{k: t.float() for k, t in state_of(host, UNET).items()}] * 2)
    write_lora(host, "extract.safetensors", SHAPES, gain=1.0)
    other = lora_on(host, other, "extract.safetensors", -0.5)
    merge = host.nodes.NODE_CLASS_MAPPINGS["ModelMergeSubtract"]().merge
    kind, found = nodes_lora_extract.LORAType.FULL_DIFF, []
    for model in pair:
        difference = merge(model, other, 1.0)[0]
        mm.unload_all_models()
        if loaded == "in part":
            monkeypatch.setattr(mm, "load_models_gpu", lambda models, *args, **kwargs: None)
        inputs = (difference, 4, "diffusion_model.", "diffusion_model.", {}, kind)
        found.append(nodes_lora_extract.calc_lora_model(*inputs))
    assert found[0].keys() == found[1].keys()
    for layer in SHAPES:
        key = f"diffusion_model.{layer}.diff"
        assert found[1][key].norm() > 1 and error(found[0][key], found[1][key]) < 1e-3


def test_a_weight_wrapper_of_another_node_gets_the_patched_weight(host, pair, bare) -> None:
    tensors = {f"{Q}.diff": noise(128, 128)}
    name = patches_file(host, "wrapped.safetensors", tensors)
    key = f"diffusion_model.{Q}.weight"
    models = [lora_on(host, m, name) for m in pair]
    for model in models:
        model.add_weight_wrapper(key, lambda weight: weight * -0.5)
    expected = draw(host, models[1])
    assert error(draw(host, models[0]), expected) < EXACT < error(expected, bare)
    assert torch.equal(draw(host, pair[0]), bare)


def test_object_patches_of_stock_nodes_work(host, pair, bare) -> None:
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    found = []
    for model in pair:
        model = nodes["ModelSamplingAuraFlow"]().patch_aura(model, 2.0)[0]
        found.append(draw(host, nodes["CFGNorm"].execute(model, 0.9)[0]))
    assert error(*found) < EXACT < error(found[0], bare)


# ---------------------------------------------------------------------------------- refused
def test_stock_saving_is_refused_by_a_sentence(host, pair, tmp_path) -> None:
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    with pytest.raises(ValueError, match="Use Save Quantized Model"):
        nodes["ModelSave"]().save(pair[0], "refused")
    assert not list((host.base / "output").rglob("refused*"))


def test_scheduled_loras_are_refused_by_a_sentence(host, pair) -> None:
    from comfy.hooks import WeightHook

    write_lora(host, "hook.safetensors", SHAPES)
    model = pair[0].clone()
    patches = adapters(host, "hook.safetensors", model)
    with pytest.raises(ValueError, match=r"cannot change quantised weights .*Load LoRA"):
        model.add_hook_patches(WeightHook(), patches)
    norm = {"diffusion_model.txt_norm.weight": ("diff", (noise(64),))}
    assert model.add_hook_patches(WeightHook(), norm) == list(norm)


# ----------------------------------------------------------------------------------- memory
def modules_with_patches(host, model) -> int:
    linear = parts(host).ops.QuantizedLinear
    return sum(isinstance(m, linear) and m.layer is not None for m in model.model.modules())


def test_what_is_evicted_or_deleted_leaves_no_factors(host, pair, bare) -> None:
    import comfy.model_management as mm

    write_lora(host, "gone.safetensors", SHAPES)
    model = lora_on(host, pair[0], "gone.safetensors")
    expected = draw(host, model)
    layers = list(model.run_time_patches.layers.values())
    assert modules_with_patches(host, model) == len(SHAPES)
    assert all(layer.resident_bytes(model.load_device) > 0 for layer in layers)
    mm.unload_all_models()
    assert modules_with_patches(host, model) == 0
    assert all(layer.resident_bytes(model.load_device) == 0 for layer in layers)
    assert torch.equal(draw(host, model), expected)
    factors = weakref.ref(layers[0].factors(model.load_device, torch.float32)[0])
    del model, layers
    gc.collect()
    assert factors() is None and modules_with_patches(host, pair[0]) == 0
    assert torch.equal(draw(host, pair[0]), bare)


def test_what_was_loaded_by_a_node_is_evicted_outside_of_one(host) -> None:
    """Nodes run in torch's inference mode; the button that unloads models does not."""
    import comfy.model_management as mm

    for format in ("bnb_nf4", "bnb_int8", "int8", "w4a8"):
        plain = state_of(host, UNET)
        with torch.inference_mode():
            model = model_of(host, plain, quantized_state(host, plain, format))
            expected = draw(host, model, steps=1)
        mm.unload_all_models()
        with torch.inference_mode():
            assert torch.equal(draw(host, model, steps=1), expected)


@pytest.mark.parametrize("format", ["bnb_nf4", "int8", "w4a8"])
def test_what_the_host_loads_by_force_stays_as_it_is(host, format) -> None:
    """With dynamic VRAM it dequantises and quantises modules of up to 16 KB, with other rounding."""
    plain = {k: t for k, t in state_of(host, UNET).items() if "transformer_blocks.1" not in k}
    model = model_of(host, plain, quantized_state(host, plain, format))
    module = model.model.get_submodule(f"diffusion_model.{Q}")
    before = {k: t.clone() for k, t in module.state_dict().items()}
    model.patch_weight_to_device(f"diffusion_model.{Q}.weight", model.load_device, force_cast=True)
    assert all(torch.equal(before[k], t) for k, t in module.state_dict().items())


def test_the_factors_of_loras_have_room_beside_the_weights(host, pair) -> None:
    """Without dynamic VRAM: as many weights are loaded as would be into so much less memory."""
    write_lora(host, "roomy.safetensors", SHAPES, rank=32)
    model = lora_on(host, pair[0], "roomy.safetensors")
    need = sum(layer.bytes_of(torch.float32) for layer in model.run_time_patches.layers.values())
    room = int(0.8 * model.model_size())

    def loaded(model, room: int) -> int:
        model.detach()
        model.partially_load(model.load_device, room)
        return model.loaded_size()

    assert loaded(model, room) == loaded(pair[0], room - need) < loaded(pair[0], room)
    pair[0].detach()


@pytest.mark.parametrize("change", [-0.1, 0.0, 0.01, 0.2])
def test_weights_that_are_loaded_make_room_for_the_factors_of_loras(host, pair, change) -> None:
    """Without dynamic VRAM: a prompt without the LoRA has filled the card, the next one has it.

    `change`: of the room, as part of the model, because the next pass needs more or less beside.
    """
    write_lora(host, "later.safetensors", SHAPES, rank=32)
    plain, model = pair[0], lora_on(host, pair[0], "later.safetensors")
    need = sum(layer.bytes_of(torch.float32) for layer in model.run_time_patches.layers.values())
    device, size = model.load_device, model.model_size()
    plain.detach()
    plain.partially_load(device, 0.8 * size - need + change * size)
    expected = plain.loaded_size()
    plain.detach()
    plain.partially_load(device, 0.8 * size)
    before = plain.loaded_size()
    plain.detach(unpatch_all=False)  # as ComfyUI does when a clone takes over
    model.partially_load(device, (0.8 + change) * size - before)
    assert model.loaded_size() == expected and (expected < before or change == 0.2)
    drawn = call(model)  # now the factors are there: no more is wanted for them
    model.partially_load(device, (0.8 + change) * size - need - expected)
    assert model.loaded_size() == expected
    for layer in model.run_time_patches.layers.values():
        layer.drop(device)  # under pressure, say: they come back at the next use
    model.partially_load(device, 0.1)
    assert model.loaded_size() <= expected - need
    assert torch.equal(call(model), drawn)
    model.partially_load(device, -2.0 * size)
    assert model.loaded_size() == 0
    model.detach()


def test_the_factors_of_another_lora_leave_before_those_of_the_next_come(host, pair) -> None:
    """Without dynamic VRAM: two branches of a workflow, each with a LoRA of its own."""
    names = ("first.safetensors", "second.safetensors")
    models = []
    for name in names:
        write_lora(host, name, SHAPES, rank=32)
        models.append(lora_on(host, pair[0], name))
    device, room = pair[0].load_device, 0.8 * pair[0].model_size()
    for model in models:
        model.detach()
    models[0].partially_load(device, room)
    loaded = models[0].loaded_size()
    call(models[0])  # brings its factors
    models[0].detach(unpatch_all=False)
    layers = models[0].run_time_patches.layers.values()
    need = sum(layer.bytes_of(torch.float32) for layer in layers)
    models[1].partially_load(device, room - need - loaded)
    assert models[1].loaded_size() == loaded
    assert sum(layer.resident_bytes(device) for layer in layers) == 0
    models[1].detach()


def test_on_a_cpu_there_is_no_dynamic_vram(host, pair) -> None:
    it, cpu = parts(host).patcher, torch.device("cpu")
    assert type(it.UnmergedDynamicPatcher(pair[0].model, cpu, cpu)) is it.UnmergedPatcher
    assert type(it.patcher_for(pair[0].model, cpu, cpu)) is it.UnmergedPatcher
    assert type(pair[0].clone(disable_dynamic=True)) is it.UnmergedPatcher


def test_copies_of_factors_belong_to_a_device(host) -> None:
    from comfy.weight_adapter import LoRAAdapter

    it = parts(host).low_rank
    weights = (torch.ones(8, 2), torch.ones(2, 8), None, None, None, None)
    layer = it.Layer("w", (8, 8), (it.Patch(1.0, LoRAAdapter(set(), weights), 1.0, None, None),))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    for device in (cpu, meta):
        assert layer.factors(device, torch.float32)[0].device == device
        assert layer.factors(device, torch.float32)[0] is layer.factors(device, torch.float32)[0]
    assert layer.drop(meta) == 2 * 16 * 4
    assert (layer.resident_bytes(meta), layer.resident_bytes(cpu)) == (0, 128)


def test_a_model_that_is_loaded_in_part_draws_the_same(host, pair, bare) -> None:
    """What a small card makes of it without dynamic VRAM: some modules are cast at each call."""
    tensors = {f"{Q}.diff": noise(128, 128), f"{MLP}.diff_b": noise(512)}
    name = patches_file(host, "part.safetensors", tensors)
    write_lora(host, "partly.safetensors", SHAPES, rank=16, gain=1.0)
    model = lora_on(host, lora_on(host, pair[0], name), "partly.safetensors")
    expected = draw(host, model)
    size, device = model.model_size(), model.load_device
    model.detach()
    whole = model.clone()
    whole.partially_load(device, 1e32)
    same = call(whole)
    whole.detach()
    layers = model.run_time_patches.layers.values()
    need = sum(layer.bytes_of(torch.float32) for layer in layers)
    for _ in range(2):  # the second time finds what the first has put there
        model.partially_load(device, size // 3)
        assert 0 < model.loaded_size() < size and model.model.model_lowvram
        assert torch.equal(call(model), same)
        assert sum(layer.resident_bytes(device) for layer in layers) == need
    model.partially_unload(device, 1e32)
    assert sum(layer.resident_bytes(device) for layer in layers) == 0
    assert torch.equal(call(model), same)
    model.detach()
    assert torch.equal(draw(host, model), expected)
    assert torch.equal(draw(host, pair[0]), bare)


def call(model) -> torch.Tensor:
    """One pass as it is loaded now."""
    x, text = noise(1, 16, 1, 8, 8), noise(1, 8, 64)
    with torch.inference_mode():
        return model.model.diffusion_model(x, torch.ones(1), context=text)
