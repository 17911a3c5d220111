"""Ways in which a cached prompt could be stale, each found by trying to make it so."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.tests.graphs import CLIP, LORA, encode, keeping_nothing, loader, node, preview
from pack.tests.links import symlink
from pack.tests.nodes.test_conditioning import edit, prompt, same


def stock(graph: dict[str, Any]) -> dict[str, Any]:
    """The same graph with the stock encoder, which keeps nothing."""
    graph = copy.deepcopy(graph)
    for item in graph.values():
        if item["class_type"] == "QwenVRAMCachedTextEncode":
            item["class_type"] = "CLIPTextEncode"
            item["inputs"].pop("cache")
    return keeping_nothing(graph)


def check(host: Any, graph: dict[str, Any]) -> None:
    """Ours gives what stock gives, item by item."""
    host.executor.reset()
    expected = host.run(stock(graph)).outputs["e"][0]
    host.executor.reset()
    found = host.run(graph).outputs["e"][0]
    assert len(found) == len(expected) and all(map(same, found, expected))


def why(host: Any, graph: dict[str, Any]) -> str:
    """The reason of the miss, or "hit", as after a restart."""
    host.restart()
    return host.run(graph).status("e").get("why", "hit")


@pytest.fixture
def encoder(fresh) -> Iterator[Path]:
    """A copy of the encoder that a test may change."""
    path = fresh.models / "text_encoders" / "mine.safetensors"
    shutil.copy(fresh.models / "text_encoders" / CLIP, path)
    yield path
    path.unlink()


@pytest.fixture
def environment(fresh) -> Iterator[Any]:
    """The module that knows options, libraries and replaced code."""
    module = fresh.part("nodes.environment")
    yield module
    module.LOADED.started_ns = module.STARTED_NS


def start_now(environment: Any) -> None:
    """As if the process had started after every file and link that exists now was made."""
    time.sleep(0.02)
    environment.LOADED.started_ns = time.time_ns()
    time.sleep(0.02)


def replace_apply_rope(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """By a function that calls it, and says that it was read from `file`."""
    llama = sys.modules["comfy.text_encoders.llama"]
    original = llama.apply_rope

    def patched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    patched.__code__ = patched.__code__.replace(co_filename=str(file))
    monkeypatch.setattr(llama, "apply_rope", patched)


@pytest.mark.parametrize("text", [["texts", 0], "one"], ids=["texts", "one text"])
def test_a_list_of_encoders_is_never_mixed_up(fresh, text) -> None:
    graph = {
        "clip": loader("TextEncoder", CLIP),
        "layers": node("TestLayers"),
        "last": node("CLIPSetLastLayer", clip=["clip", 0], stop_at_clip_layer=["layers", 0]),
        "texts": node("TestTextList"),
        "e": node("QwenVRAMCachedTextEncode", clip=["last", 0], text=text, cache="memory and disk"),
        **preview("e"),
    }
    check(fresh, graph)
    check(fresh, graph)


def test_a_file_name_that_another_node_computes(fresh, encoder) -> None:
    graph = prompt()
    graph["name"] = node("TestJoined", a="mi", b="ne.safetensors")
    graph["clip"]["inputs"]["clip_name"] = ["name", 0]
    run = fresh.run(graph)
    assert "clip_name of QwenVRAMLoadTextEncoder is computed" in run.status("e")["why"]
    assert {"clip", "e"} <= set(fresh.run(graph).cached)  # no NaN fingerprint either
    edit(encoder)
    check(fresh, graph)


@pytest.mark.parametrize("ours", [False, True])
def test_a_link_that_is_moved_to_another_old_file(fresh, environment, encoder, ours) -> None:
    other, link = encoder.with_name("other.safetensors"), encoder.with_name("link.safetensors")
    shutil.copy(encoder, other)
    edit(other)
    symlink(link, encoder)
    start_now(environment)
    kind = loader("TextEncoder", link.name) if ours else node("TestStockLike", clip_name=link.name)
    graph = prompt("one", clip=kind)
    assert fresh.run(graph).status("e")["kept"] == "stored"
    link.unlink()
    symlink(link, other)
    graph["e"]["inputs"]["text"] = "two"
    kept = fresh.run(graph).status("e")["kept"]
    assert kept == "stored" if ours else kept.endswith("changed after ComfyUI started")
    fresh.restart()
    check(fresh, graph)
    link.unlink()
    other.unlink()


@pytest.mark.parametrize("wrapped", [False, True])
def test_host_code_that_somebody_replaced(fresh, environment, monkeypatch, wrapped) -> None:
    fresh.run(prompt())
    tokenizer = sys.modules["comfy.sd1_clip"].SDTokenizer
    original = tokenizer.tokenize_with_weights

    def patched(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    patch = functools.wraps(original)(patched) if wrapped else patched
    monkeypatch.setattr(tokenizer, "tokenize_with_weights", patch)
    assert "SDTokenizer.tokenize_with_weights was replaced" in why(fresh, prompt())


@pytest.mark.parametrize("folder", ["custom_nodes/other", "venv/lib/python3.12/site-packages"])
def test_host_functions_replaced_from_inside_comfyuis_folder(
    fresh, environment, monkeypatch, folder
) -> None:
    fresh.run(prompt())
    replace_apply_rope(monkeypatch, environment.HOST_ROOT / folder / "patch.py")
    assert "source of comfy.text_encoders.llama.apply_rope cannot be found" in why(fresh, prompt())


@pytest.mark.parametrize(
    ("folder", "trusted"),
    [
        ("elsewhere", True),  # pip install --target, then PYTHONPATH
        ("custom_nodes/test_extension/vendored", False),
        ("without_packages", False),
        ("custom_nodes", False),  # pip install --target custom_nodes
        ("above_the_host", False),
    ],
)
def test_a_library_beside_python_is_trusted_and_one_inside_a_pack_is_not(
    fresh, environment, monkeypatch, folder, trusted
) -> None:
    place = fresh.base / folder
    made = place / "library-1.0.dist-info" if place.exists() else place
    place.mkdir(exist_ok=True)
    if folder != "without_packages":
        (place / "library-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(environment, "HOST_ROOT", fresh.base / "above_the_host" / "ComfyUI")
    caches = (environment._libraries, environment.is_trusted, environment.is_host_file)
    try:
        for cache in caches:
            cache.cache_clear()
        assert environment.is_trusted(str(place / "library.py")) is trusted
    finally:
        shutil.rmtree(made)
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def test_the_code_of_a_pack_that_replaces_host_code_counts(fresh, environment, monkeypatch) -> None:
    fresh.run(prompt())
    replace_apply_rope(monkeypatch, fresh.base / "custom_nodes" / "test_extension" / "__init__.py")
    assert why(fresh, prompt()) == "code version changed"
    assert why(fresh, prompt()) == "hit"


def test_code_replaced_by_an_older_file_while_comfyui_runs(
    environment, monkeypatch, tmp_path
) -> None:
    code = tmp_path / "a.py"
    code.write_text("x = 1")
    os.utime(code, (1, 1))
    monkeypatch.setattr(environment, "custom_packages", lambda: {str(tmp_path): tmp_path})
    with pytest.raises(environment.NotCacheable, match="changed after ComfyUI started"):
        environment.packages_digest({str(tmp_path)})
    environment._source_of.cache_clear()


@pytest.mark.parametrize("text", ["a <lora:foo:1>", "foo", "sub/foo", "see sub/foo.safetensors"])
def test_files_named_by_tags_and_stems_in_subfolders(fresh, text) -> None:
    folder = fresh.models / "loras" / "sub"
    folder.mkdir()
    shutil.copy(fresh.models / "loras" / LORA, folder / "foo.safetensors")
    found = fresh.part("nodes.upstream").files_named(text)
    shutil.rmtree(folder)
    assert [Path(f.path).name for f in found] == ["foo.safetensors"]


def test_a_folder_is_taken_only_where_it_holds_a_model(fresh) -> None:
    upstream = fresh.part("nodes.upstream")
    folder = fresh.models / "loras" / "wan"
    folder.mkdir()
    (folder / "x.txt").write_text("no model")
    assert upstream.files_named("wan") == []
    (folder / "config.json").write_text("{}")
    assert len(upstream.files_named("wan")) == 2
    shutil.rmtree(folder)


def test_precision_switches_variables_and_sets_of_options(fresh, environment, monkeypatch) -> None:
    fresh.run(prompt())
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = not before
    try:
        assert why(fresh, prompt()) == "precision changed"
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert why(fresh, prompt()) == "environment variables changed"
    assert environment._stable({"b", "a", "c"}) == repr(["'a'", "'b'", "'c'"])
    monkeypatch.setattr(environment, "_hardware", lambda: ["another card"])
    assert why(fresh, prompt()) == "hardware changed"


def test_the_id_of_a_node_that_asks_for_it_is_in_the_key(fresh) -> None:
    def graph(node_id: str) -> dict[str, Any]:
        own = node("TestOwnIdClip", clip=["clip", 0])
        return {**prompt(), node_id: own, "e": encode("x", node_id)}

    fresh.run(graph("5"))
    assert why(fresh, graph("6")) == "nodes before clip changed"
    assert why(fresh, graph("5")) == "hit"


def test_a_graph_that_a_node_builds_around_its_encoder(fresh) -> None:
    graph = {**prompt(), "x": node("TestExpand", clip=["clip", 0]), **preview("x")}
    del graph["e"], graph["out_e"]
    run = fresh.run(graph)
    (inner,) = [n for n in run.ui if "qwen_vram" in run.ui[n] and n != "clip"]
    assert "builds a graph of its own" in run.status(inner)["why"]


def test_an_encoder_of_another_kind_is_used_and_not_stored(fresh) -> None:
    graph = {**prompt(), "b": node("TestBareClip", clip=["clip", 0]), "e": encode("x", "b")}
    assert fresh.run(graph).status("e")["kept"].startswith("not stored: Bare is not")


def test_a_file_that_changes_while_it_is_encoded_is_not_stored(
    fresh, environment, encoder, monkeypatch
) -> None:
    clip_class = fresh.part("nodes.conditioning").comfy.sd.CLIP
    tokenize = clip_class.tokenize

    def slow(self, *args, **kwargs):
        os.utime(encoder)
        return tokenize(self, *args, **kwargs)

    graph = prompt(clip=loader("TextEncoder", encoder.name))
    monkeypatch.setattr(environment, "intruders", set)
    monkeypatch.setattr(clip_class, "tokenize", slow)
    kept = fresh.run(graph).status("e")["kept"]
    assert kept == "not stored: what it depends on changed while it was encoded"


def test_a_leftover_that_another_process_holds_open_costs_nothing(fresh, monkeypatch) -> None:
    fresh.store_directory.mkdir(parents=True, exist_ok=True)
    leftover = fresh.store_directory / "tmpx.writing"
    leftover.write_text("x")
    os.utime(leftover, (1, 1))
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if str(path).endswith(".writing"):
            raise PermissionError(13, "in use", str(path))
        return unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)
    assert fresh.run(prompt()).status("e")["kept"] == "stored"
