"""Graphs with quantised models: the pack's other nodes, LoRAs of both models, cached texts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pack.tests.graphs import CLIP, UNET, encode, loader, node, preview
from pack.tests.host import RunError
from pack.tests.nodes import reference_cases
from pack.tests.nodes.faults import Faults, blocks_fail, latent, small, transformer, within
from pack.tests.nodes.quantized_models import error, write_lora
from pack.tests.nodes.test_tiled_edit import SMALL, edit, write
from safetensors.torch import load_file, save_file

QUANTISED = ("bnb_nf4", "int8")
LAYER = "model.layers.0.mlp.gate_proj"
TEXT_LAYER = f"text_encoders.qwen25_7b.transformer.{LAYER}"
LORA = "quantised.safetensors"


def with_lora(graph: dict[str, Any], weight_dtype: str, below: str = "shift") -> dict[str, Any]:
    """The graph with a quantised transformer and a LoRA on it."""
    made = {**graph, "unet": loader("DiffusionModel", UNET, weight_dtype=weight_dtype)}
    inputs = {"model": ["unet", 0], "lora_name": LORA, "strength_model": 0.8}
    made["lora"] = node("LoraLoaderModelOnly", **inputs)
    made[below] = {**made[below], "inputs": {**made[below]["inputs"], "model": ["lora", 0]}}
    return made


@pytest.fixture(scope="module", autouse=True)
def lora(host) -> None:
    layers = {
        "transformer_blocks.0.attn.to_q": (128, 128),
        "transformer_blocks.1.img_mod.1": (768, 128),
    }
    write_lora(host, LORA, {**layers, TEXT_LAYER: (128, 64)}, gain=1.0)


# ------------------------------------------------------------------------- the other nodes
@pytest.mark.parametrize("weight_dtype", QUANTISED)
def test_the_sampler_recovers_in_slices_without_a_changed_bit(host, weight_dtype) -> None:
    graph = with_lora(small(), weight_dtype)
    stock = latent(host.run(graph))
    assert "1 LoRA added at run time (rank 4, " in str(host.events)  # on the node that ran
    assert not stock.equal(latent(host.run(small())))
    with blocks_fail(transformer(host, graph), Faults({1, 3, 6})) as faults:
        run = host.run(within(graph))
    assert faults.raised == 3 and latent(run).equal(stock), run.status("sampler")["text"]


@pytest.mark.parametrize("weight_dtype", QUANTISED)
def test_the_reference_cache_reuses_what_a_quantised_model_computed(host, weight_dtype) -> None:
    reference_cases.write_pictures(host.base)
    always = with_lora(reference_cases.graph(refresh_every=1), weight_dtype, "cache")
    exact = latent(host.run(always))
    without = {**always, "sampler": reference_cases.sampler("lora", seed=1, sampler_name="euler")}
    assert latent(host.run(without)).equal(exact)
    cached = host.run(with_lora(reference_cases.graph(), weight_dtype, "cache"))
    assert 0 < error(latent(cached), exact) < 0.5


def test_a_tiled_edit_runs_on_quantised_models(host) -> None:
    name = write(host, "quantised.png", (256, 256))
    graph = edit(name, **SMALL)
    for loaded in ("unet", "clip"):
        inputs = {**graph[loaded]["inputs"], "weight_dtype": "bnb_nf4"}
        graph[loaded] = {**graph[loaded], "inputs": inputs}
    run = host.run(graph)
    picture = run.outputs["edit"][0][0]
    assert picture.shape[1:3] == (256, 256) and picture.isfinite().all()
    assert "bnb_nf4" in run.status("unet")["text"]


# ------------------------------------------------------------------------ the text encoder
def encoded(run: Any, name: str = "e") -> torch.Tensor:
    return run.outputs[name][0][0][0][0]


def texts(weight_dtype: str, lora: float | None = None, clip: str = CLIP, **options: Any) -> dict:
    """One encoded text."""
    graph = {"clip": loader("TextEncoder", clip, weight_dtype=weight_dtype, **options)}
    if lora is not None:
        graph["unet"] = loader("DiffusionModel", UNET)
        inputs = {"model": ["unet", 0], "clip": ["clip", 0], "lora_name": LORA}
        graph["lora"] = node("LoraLoader", **inputs, strength_model=0.0, strength_clip=lora)
        graph["e"] = encode("a fox", clip="lora")
        graph["e"]["inputs"]["clip"] = ["lora", 1]
    else:
        graph["e"] = encode("a fox")
    return {**graph, **preview("e")}


def test_texts_of_a_quantised_encoder_are_cached_apart(fresh, monkeypatch) -> None:
    kinds = ("default", "bnb_nf4", "int8", "bnb_int8")
    made = {kind: fresh.run(texts(kind)) for kind in kinds}
    assert {run.status("e")["result"] for run in made.values()} == {"miss"}
    for a, b in itertools.combinations(made, 2):
        assert not encoded(made[a]).equal(encoded(made[b]))
    fresh.part("nodes.loaders").REGISTRY.release()
    fresh.restart()  # now from the disk
    with monkeypatch.context() as closed:  # and without a look at the encoder's file or a package
        for module, name in (("checkpoint", "read_header"), ("bitsandbytes_formats", "problem")):
            closed.setattr(fresh.part(f"core.{module}"), name, None)
        for kind, run in made.items():
            again = fresh.run(texts(kind))
            assert again.status("e")["result"] == "hit" and encoded(again).equal(encoded(run))
    smallest = fresh.run(texts("bnb_nf4", preset="smallest"))
    assert smallest.status("e")["result"] == "miss"


def test_code_and_library_that_quantise_are_part_of_the_keys(host) -> None:
    environment = host.part("nodes.environment")
    sources = {path.rpartition("/")[2] for path in environment.PACK_SOURCES}
    working = ("bitsandbytes_formats", "bitsandbytes_int8", "host_formats", "quantized_layers")
    working += ("quantized_layouts", "quantized_ops", "low_rank", "unmerged_patcher")
    working += ("quantized_loading",)
    assert {f"{name}.py" for name in working} <= sources
    assert "bitsandbytes" in environment.surroundings()["libraries"][1]


def merged_encoder(host, name: str, strength: float) -> str:
    """The encoder in fp32, with the decoded weights, and the LoRA merged into one of them."""
    folder, graph = host.models / "text_encoders", texts("bnb_nf4")
    dense = {k: t.float() for k, t in load_file(folder / CLIP).items()}
    host.run({"clip": graph["clip"], "seen": node("PreviewAny", source=["clip", 0])})
    model = host.executor.caches.outputs.get_local("clip").outputs[0][0].cond_stage_model
    for layer, module in model.qwen25_7b.transformer.named_modules():
        if hasattr(getattr(module, "weight", None), "_qdata"):
            packed = module.weight  # the host looks words up in the table's own dtype
            packed = packed.to(dtype=torch.float32) if hasattr(module, "in_features") else packed
            dense[f"{layer}.weight"] = packed.dequantize().float().clone()
    lora = load_file(host.models / "loras" / LORA)
    difference = lora[f"{TEXT_LAYER}.lora_up.weight"] @ lora[f"{TEXT_LAYER}.lora_down.weight"]
    dense[f"{LAYER}.weight"] += strength * difference
    save_file(dense, folder / name, {"qwen_vram": '{"vision_heads": 2}'})
    return name


def test_a_lora_of_the_text_encoder_gives_what_the_merged_weights_give(fresh) -> None:
    bare = encoded(fresh.run(texts("bnb_nf4")))
    for strength in (0.6, -0.3):
        run = fresh.run(texts("bnb_nf4", strength))
        name = merged_encoder(fresh, f"merged{strength}.safetensors", strength)
        expected = encoded(fresh.run(texts("fp32", clip=name)))
        assert error(encoded(run), expected) < 1e-4 < 1e-2 < error(bare, expected)
        (fresh.models / "text_encoders" / name).unlink()
    assert encoded(fresh.run(texts("bnb_nf4"))).equal(bare)


def test_stock_saving_of_a_quantised_encoder_is_refused(fresh) -> None:
    graph = {"clip": loader("TextEncoder", CLIP, weight_dtype="bnb_nf4")}
    graph["save"] = node("CLIPSave", clip=["clip", 0], filename_prefix="refused")
    with pytest.raises(RunError, match="Use Save Quantized Model"):
        fresh.run(graph)
