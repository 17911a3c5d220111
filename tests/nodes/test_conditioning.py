"""A hit is the encoder's own result, bit for bit; a stale hit never happens."""

from __future__ import annotations

import copy
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.tests.graphs import (
    CLIP,
    LORA,
    encode,
    keeping_nothing,
    loader,
    node,
    preview,
    text_to_image,
)
from pack.tests.host import RunError
from pack.tests.links import symlink
from safetensors.torch import load_file, save_file

LONG = ("a small blue bunny dances in the snow, " * 100).ljust(50_000, "=")


def prompt(text: str = "a red fox", clip: dict | None = None, **more: Any) -> dict[str, Any]:
    """Encode one text and nothing else."""
    return {"clip": clip or loader("TextEncoder", CLIP), "e": encode(text), **preview("e"), **more}


def clip_lora(strength: float) -> dict[str, Any]:
    """A LoRA between encoder and text."""
    return {
        "lora": node(
            "LoraLoader",
            model=["unet", 0],
            clip=["clip", 0],
            lora_name=LORA,
            strength_model=1.0,
            strength_clip=strength,
        ),
        "unet": loader("DiffusionModel", "tiny_qwen_image.safetensors"),
        "e": node(
            "QwenVRAMCachedTextEncode", clip=["lora", 1], text="a red fox", cache="memory and disk"
        ),
    }


def same(a: Any, b: Any) -> bool:
    """Equal structure, dtypes and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a red fox",
        "一只戴帽子的小熊",
        "🦊🐻‍❄️ in the ❄",
        LONG,
        "<|im_start|>raw",
        "a (b:1.2) \\( c",
        "\x00\x7f",
    ],
    ids=[
        "empty",
        "blank",
        "plain",
        "chinese",
        "emoji",
        "50000 characters",
        "own template",
        "weights",
        "control",
    ],
)
def test_a_hit_equals_stock_encoding_bit_for_bit_from_memory_and_from_disk(fresh, text) -> None:
    stock = {**prompt(text), "e": node("CLIPTextEncode", clip=["clip", 0], text=text)}
    expected = fresh.run(keeping_nothing(stock)).outputs["e"][0][0]
    fresh.restart()
    miss = fresh.run(prompt(text))
    assert miss.status("e")["result"] == "miss" and same(miss.outputs["e"][0][0], expected)
    fresh.executor.reset()
    memory = fresh.run(prompt(text))
    assert memory.status("e")["tier"] == "memory" and same(memory.outputs["e"][0][0], expected)
    fresh.restart()
    disk = fresh.run(prompt(text))
    assert disk.status("e")["tier"] == "disk" and same(disk.outputs["e"][0][0], expected)
    assert "clip" not in disk.executed + memory.executed


def test_after_a_restart_the_encoder_is_not_touched_and_the_picture_is_the_same(fresh) -> None:
    first = fresh.run(text_to_image())
    assert "clip" in first.executed
    assert first.status("positive")["text"].startswith("miss: new text, encoded in ")
    assert first.status("positive")["kept"] == "stored"
    fresh.restart()
    second = fresh.run(text_to_image())
    assert "clip" not in second.executed and "save" in second.executed
    assert re.fullmatch(r"hit, disk, found in \d\.\d\d s", second.status("negative")["text"])
    assert torch.equal(first.outputs["decode"][0][0], second.outputs["decode"][0][0])


@pytest.mark.parametrize("cache", ["CLASSIC", "LRU", "RAM_PRESSURE", "NONE"])
def test_it_works_under_every_cache_of_the_host(fresh, cache) -> None:
    fresh.restart(cache)
    fresh.run(prompt())
    fresh.restart(cache)
    run = fresh.run(prompt())
    assert run.status("e")["result"] == "hit" and "clip" not in run.executed


def test_cache_modes(fresh) -> None:
    off = {**prompt(), "e": encode("a red fox", cache="off")}
    assert fresh.run(off).status("e")["text"].startswith("not kept: cache is off, encoded in ")
    assert not fresh.store_directory.exists()
    memory = {**prompt(), "e": encode("a red fox", cache="memory")}
    assert fresh.run(memory).status("e")["kept"] == "stored in memory"
    fresh.executor.reset()
    assert fresh.run(memory).status("e")["tier"] == "memory"
    assert not fresh.store_directory.exists()


def test_a_list_of_prompts_asks_for_the_encoder_when_one_of_them_is_new(fresh) -> None:
    fresh.run(prompt("one"))
    fresh.executor.reset()
    both = {
        **prompt(),
        "e": node(
            "QwenVRAMCachedTextEncode", clip=["clip", 0], text=["list", 0], cache="memory and disk"
        ),
        "list": node("TestTextList"),
    }
    run = fresh.run(both)
    assert [s["result"] for s in run.ui["e"]["qwen_vram"]] == ["hit", "miss"]
    assert len(run.outputs["e"][0]) == 2 and "clip" in run.executed
    fresh.restart()
    again = fresh.run(both)
    assert [s["result"] for s in again.ui["e"]["qwen_vram"]] == ["hit", "hit"]
    assert "clip" not in again.executed


def change_text(graph: dict, host: Any) -> None:
    graph["e"]["inputs"]["text"] += " "


def change_dtype(graph: dict, host: Any) -> None:
    graph["clip"]["inputs"]["weight_dtype"] = "fp32"


def change_device(graph: dict, host: Any) -> None:
    graph["clip"]["inputs"]["device"] = "cpu"


def change_layer(graph: dict, host: Any) -> None:
    graph["last"] = node("CLIPSetLastLayer", clip=["clip", 0], stop_at_clip_layer=-2)
    graph["e"]["inputs"]["clip"] = ["last", 0]


def add_lora(graph: dict, host: Any) -> None:
    graph.update(clip_lora(1.0))


def use_stock_loader(graph: dict, host: Any) -> None:
    graph["clip"] = node("TestStockLike", clip_name=CLIP)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (change_text, "new text"),
        (change_dtype, "nodes before clip changed"),
        (change_device, "nodes before clip changed"),
        (change_layer, "nodes before clip changed"),
        (add_lora, "LoRA before clip changed"),
        (use_stock_loader, "nodes before clip changed"),
    ],
)
def test_every_change_of_the_graph_is_a_miss_with_its_reason(fresh, change, why) -> None:
    fresh.run(prompt())
    fresh.restart()
    graph = prompt()
    change(graph, fresh)
    assert fresh.run(graph).status("e")["why"] == why
    fresh.restart()
    assert fresh.run(prompt()).status("e")["result"] == "hit"


def test_keep_loaded_and_the_ids_of_nodes_do_not_matter(fresh) -> None:
    fresh.run(prompt())
    fresh.restart()
    renamed = {
        "77:3": loader("TextEncoder", CLIP, keep_loaded=True),
        "e": encode("a red fox", "77:3"),
        **preview("e"),
    }
    assert fresh.run(renamed).status("e")["result"] == "hit"


@pytest.fixture
def encoder(fresh) -> Path:
    """A copy of the encoder that a test may change; older than the process, as a user's file is."""
    path = fresh.models / "text_encoders" / "mine.safetensors"
    shutil.copy(fresh.models / "text_encoders" / CLIP, path)
    yield path
    path.unlink()


def edit(path: Path) -> None:
    """Give an encoder other weights."""
    sd = load_file(path)
    sd["model.norm.weight"] = sd["model.norm.weight"] * 1.5
    save_file(sd, path, {"qwen_vram": '{"vision_heads": 2}'})


def test_a_replaced_encoder_is_a_miss_at_once_and_never_stale(fresh, encoder) -> None:
    graph = prompt(clip=loader("TextEncoder", encoder.name))
    old = fresh.run(graph).outputs["e"][0][0]
    edit(encoder)
    run = fresh.run(graph)  # the same process, nothing reset
    assert (
        run.status("e")["why"] == "text encoder file changed"
        and run.status("e")["kept"] == "stored"
    )
    assert not same(run.outputs["e"][0][0], old)
    fresh.restart()
    assert same(fresh.run(graph).outputs["e"][0][0], run.outputs["e"][0][0])


def test_touching_the_encoder_or_using_a_link_to_it(fresh, encoder) -> None:
    fresh.run(prompt(clip=loader("TextEncoder", encoder.name)))
    link = encoder.with_name("link.safetensors")
    symlink(link, encoder)
    fresh.restart()
    run = fresh.run(prompt(clip=loader("TextEncoder", link.name)))
    assert run.status("e")["why"] == "nodes before clip changed"  # the same file, but another value
    os.utime(encoder)
    fresh.restart()
    run = fresh.run(prompt(clip=loader("TextEncoder", encoder.name)))
    assert run.status("e")["why"] == "text encoder file changed"
    link.unlink()


def test_a_file_replaced_behind_a_loader_that_does_not_look_is_never_stored(fresh, encoder) -> None:
    environment = fresh.part("nodes.environment")
    time.sleep(0.02)
    environment.LOADED.started_ns = time.time_ns()  # as if the process had started just now
    time.sleep(0.02)
    graph = prompt(clip=node("TestStockLike", clip_name=encoder.name))
    old = fresh.run(graph).outputs["e"][0][0]
    edit(encoder)
    graph["e"]["inputs"]["text"] = "another text"
    run = fresh.run(graph)  # the host still holds the old model
    environment.LOADED.started_ns = environment.STARTED_NS
    assert "clip" in run.cached
    assert run.status("e")["kept"] == "not stored: mine.safetensors changed after it was loaded"
    fresh.restart()
    run = fresh.run(graph)
    assert run.status("e")["result"] == "miss"
    assert not same(run.outputs["e"][0][0], old)


def test_a_file_newer_than_the_process_is_stored_only_behind_our_loader(fresh, encoder) -> None:
    graph = prompt(clip=node("TestStockLike", clip_name=encoder.name))
    kept = fresh.run(graph).status("e")["kept"]
    assert kept == "not stored: mine.safetensors changed after ComfyUI started"
    graph = prompt(clip=loader("TextEncoder", encoder.name))
    assert fresh.run(graph).status("e")["kept"] == "stored"


@pytest.mark.parametrize(
    ("class_type", "reason"),
    [
        ("TestRandomClip", "TestRandomClip is random (random.random)"),
        ("TestRandomBase", "TestRandomBase is random (random.random)"),
        ("TestCounterClip", "TestCounterClip counts in self.count"),
        ("TestNaNClip", "TestNaNClip asks to run every time"),
        ("TestNotIdempotentClip", "TestNotIdempotentClip gives something else at every run"),
        ("TestWorkflowReader", "TestWorkflowReader reads the whole workflow"),
    ],
)
def test_unpredictable_nodes_upstream_are_told_and_encoded_without_storing(
    fresh, class_type, reason
) -> None:
    graph = prompt(t=node(class_type, clip=["clip", 0]))
    graph["e"]["inputs"]["clip"] = ["t", 0]
    status = fresh.run(graph).status("e")
    assert status["why"] == f"cannot be cached: {reason}" and status["kept"] == ""
    assert not fresh.store_directory.exists()


def test_an_embedding_that_appears_or_changes_is_a_miss(fresh) -> None:
    folder = fresh.base / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    text = "a fox, embedding:mine"
    fresh.run(prompt(text))
    save_file({"qwen25_7b": torch.ones(1, 64)}, folder / "mine.safetensors")
    fresh.restart()
    run = fresh.run(prompt(text))
    assert run.status("e")["why"] == "embedding file changed"
    (folder / "mine.safetensors").unlink()


def test_options_and_versions_are_in_the_key(fresh, monkeypatch) -> None:
    environment = fresh.part("nodes.environment")
    fresh.run(prompt())

    def why() -> str:
        fresh.restart()
        return fresh.run(prompt()).status("e").get("why", "hit")

    assert why() == "hit"
    with monkeypatch.context() as m:
        m.setattr(environment.args, "fp32_text_enc", True)
        assert why() == "start options changed"
    with monkeypatch.context() as m:
        m.setattr(environment.comfyui_version, "__version__", "99.0")
        assert why() == "ComfyUI's version changed"
    monkeypatch.setattr(environment.args, "port", 9999)
    assert why() == "hit"


def test_changed_code_of_a_pack_is_a_miss(fresh, monkeypatch) -> None:
    environment = fresh.part("nodes.environment")
    fresh.run(prompt())
    fresh.restart()
    real = environment._source_of
    monkeypatch.setattr(
        environment, "_source_of", lambda name: ("other", 0.0) if name == "comfyui" else real(name)
    )
    assert fresh.run(prompt()).status("e")["why"] == "code version changed"
    fresh.restart()
    monkeypatch.setattr(environment, "_source_of", lambda name: ("other", time.time()))
    why = fresh.run(prompt()).status("e")["why"]
    assert why == "cannot be cached: the code of comfyui changed after ComfyUI started; restart it"


def test_conditioning_that_cannot_be_kept_exactly_is_used_and_not_stored(fresh) -> None:
    graph = prompt(t=node("TestHookedClip", clip=["clip", 0]))
    graph["e"]["inputs"]["clip"] = ["t", 0]
    status = fresh.run(graph).status("e")
    assert "not stored: value[0][1]['hooks'] is a " in status["text"]


def test_an_unwritable_cache_costs_speed_never_an_image(fresh) -> None:
    fresh.store_directory.parent.mkdir(parents=True, exist_ok=True)
    fresh.store_directory.write_text("in the way")
    status = fresh.run(prompt()).status("e")
    assert status["kept"].startswith("kept in memory only: cannot write to ")
    fresh.store_directory.unlink()


@pytest.mark.parametrize("damage", ["half", "garbage", "future"])
def test_a_damaged_cache_file_is_encoded_again(fresh, damage) -> None:
    expected = fresh.run(prompt()).outputs["e"][0][0]
    (path,) = fresh.store_directory.iterdir()
    data = path.read_bytes()
    future = data.replace(b'"version":"1"', b'"version":"9"')
    path.write_bytes(
        {"half": data[: len(data) // 2], "garbage": os.urandom(99), "future": future}[damage]
    )
    fresh.restart()
    run = fresh.run(prompt())
    assert run.status("e")["result"] == "miss" and same(run.outputs["e"][0][0], expected)
    fresh.restart()
    assert fresh.run(prompt()).status("e")["result"] == "hit"


def test_an_encoder_that_is_none_gets_a_sentence(fresh) -> None:
    graph = prompt(clip=node("TestNoClip"))
    with pytest.raises(RunError, match=r"The clip input carries no text encoder"):
        fresh.run(graph)


def test_an_encoder_of_the_wrong_size_fails_with_torchs_own_message(fresh) -> None:
    graph = text_to_image()
    graph["positive"] = node("TestWideConditioning")
    with pytest.raises(RunError, match="normalized_shape"):
        fresh.run(copy.deepcopy(graph))
