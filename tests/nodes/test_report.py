"""The memory report in the real ComfyUI on the CPU: figures, the node, what runs again."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.tests.graphs import CLIP, VAE, encode, loader, node, preview


@pytest.fixture
def sources(fresh) -> types.ModuleType:
    """nodes/memory_sources.py of the loaded pack, with nothing seen before."""
    fresh.part("nodes.memory_models")._seen.clear()
    return fresh.part("nodes.memory_sources")


def graph(**more: Any) -> dict[str, Any]:
    """A loader and an encoding, so that a model is in use."""
    return {"clip": loader("TextEncoder", CLIP), "e": encode("a fox", cache="off"), **more}


def report_node(*value: Any, **inputs: Any) -> dict[str, Any]:
    """Our node, on a wire if there is a value."""
    wire = {"value": list(value)} if value else {}
    return node("QwenVRAMReport", **{"probe": False, "theme": "dark", **inputs, **wire})


def told_by(run: Any, name: str = "report") -> dict[str, Any]:
    """The report in the node's output json."""
    return json.loads(run.outputs[name][2][0])


def named(told: dict[str, Any], start: str) -> list[dict[str, Any]]:
    """The models whose names start so."""
    return [m for m in told["models"] if m["name"].startswith(start)]


def test_ram_is_the_one_device_and_its_parts_add_up(sources) -> None:
    told = sources.gather()
    (ram,) = told["devices"]
    assert (ram["device"], ram["kind"], ram["allocator"]) == ("cpu", "cpu", None)
    assert sum(part["bytes"] for part in ram["parts"]) == ram["total_bytes"]
    by_id = {part["id"]: part["bytes"] for part in ram["parts"]}
    assert by_id["unexplained"] == 0 and by_id["process"] > 100e6 and by_id["free"] > 0


def test_what_this_process_takes_in_ram_is_seen(host) -> None:
    devices, cpu = host.part("nodes.devices"), torch.device("cpu")
    before = devices.device_memory(cpu)
    with mmap.mmap(-1, 64 << 20) as block:  # torch might take pages that the process has already
        block.write(bytes(len(block)))
        after = devices.device_memory(cpu)
        assert after.own_bytes - before.own_bytes == pytest.approx(len(block), rel=0.2)
    assert after.other_bytes == after.used_bytes - after.own_bytes


def test_models_are_listed_with_file_dtype_and_bytes(fresh, sources) -> None:
    fresh.run(graph(**preview("e")))
    (clip,) = named(sources.gather(), CLIP[:8])
    assert clip["file"] == CLIP and clip["kind"] == "text encoder"
    assert (clip["device"], clip["dtype"]) == ("cpu", "bf16")
    assert clip["bytes"] == clip["resident_bytes"] == clip["ram_bytes"] + clip["mapped_bytes"] > 1e6
    assert clip["shared_with"] == 0 and clip["duplicate_of"] is None and clip["needed"] is None


def test_nodes_that_share_one_model_are_counted(fresh, sources) -> None:
    second = loader("TextEncoder", CLIP, keep_loaded=True)
    fresh.run(graph(clip2=second, e2=encode("b", "clip2", "off"), **preview("e", "e2")))
    (clip,) = named(sources.gather(), CLIP[:8])
    assert clip["shared_with"] == 1


def test_two_loaders_of_one_file_that_do_not_share_are_two_copies(fresh, sources) -> None:
    graph = {
        "ours": loader("VAE", VAE),
        "stock": node("VAELoader", vae_name=VAE),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
    }
    for name in ("ours", "stock"):
        graph[f"encode_{name}"] = node("VAEEncode", pixels=["image", 0], vae=[name, 0])
        graph[f"decode_{name}"] = node("VAEDecode", samples=[f"encode_{name}", 0], vae=[name, 0])
        graph[f"shown_{name}"] = node("PreviewImage", images=[f"decode_{name}", 0])
    fresh.run(graph)
    told = sources.gather()
    first, second = named(told, VAE.partition(".")[0])
    assert first["duplicate_of"] is None and second["duplicate_of"] == first["name"]
    assert second["name"].endswith("#2") and first["kind"] == "VAE"
    (finding,) = [f for f in told["findings"] if f["id"] == "duplicate_vae"]
    assert finding["command"] == "QwenVRAM.MergeLoaders" and finding["saves_bytes"] > 0


@pytest.fixture
def every_object() -> Iterator[None]:
    """Python's collector sees all objects, as in a server: tests/host.py freezes those that stay."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_model_that_is_only_in_ram_is_found_on_demand(fresh, sources, every_object) -> None:
    assert len(gc.get_objects()) > 100_000
    graph = {"vae": node("VAELoader", vae_name=VAE), "out": node("PreviewAny", source=["vae", 0])}
    run, name = fresh.run(graph), VAE.partition(".")[0]  # nothing has computed with it yet
    assert not named(sources.gather(), name)
    (vae,) = named(sources.gather(thorough=True), name)
    assert vae["kind"] == "VAE" and vae["ram_bytes"] + vae["mapped_bytes"] > 1e5
    assert named(sources.gather(), name)  # known from now on
    sources.models.__globals__["_seen"].clear()
    boundary = fresh.part("nodes.boundary").BOUNDARY
    boundary._running.add("a prompt")  # then its own thread alone looks for them
    try:
        assert not named(sources.gather(thorough=True), name)
    finally:
        boundary._running.discard("a prompt")
    del run
    fresh.restart()
    assert not named(sources.gather(), name)


def test_what_is_mapped_from_a_file_is_not_counted_as_held(fresh, sources) -> None:
    models = fresh.part("nodes.memory_models")
    model = torch.nn.Linear(512, 512, bias=False)
    storage = model.weight.untyped_storage()
    storage._comfy_tensor_mmap_refs = ("as comfy.utils marks it",)
    weights = models._measure(_patcher(fresh, model), ())
    assert (weights.mapped, weights.on) == (512 * 512 * 4, {})


def _patcher(fresh, model: torch.nn.Module) -> Any:
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def test_the_prompt_cache_is_a_part(fresh, sources) -> None:
    fresh.run({**graph(), "e": encode("kept", cache="memory"), **preview("e")})
    (ram,) = sources.gather()["devices"]
    (pack,) = [part for part in ram["parts"] if part["id"] == "pack"]
    assert pack["bytes"] == fresh.store.memory_usage().bytes > 0


def test_gathering_is_quick_once_models_are_known(fresh, sources) -> None:
    fresh.run(graph(**preview("e")))
    sources.gather()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        sources.gather()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[4] < 0.05  # a panel asks every second; usual are 1 to 2 ms


# ----------------------------------------------------------------------------- a card that is not here
CARD = torch.device("cuda", 0)


@pytest.fixture
def asked(sources, host, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A card with torch's own allocator; counts what takes long."""
    asked = {"snapshot": 0, "settings": 0, "blocks": 0}

    def count(name: str, answer: Any) -> Any:
        def ask(*args: Any, **more: Any) -> Any:
            asked[name] += 1
            return answer

        return ask

    names = ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
    stats = {f"{name}.all.current": size for name, size in zip(names, (5, 9, 1), strict=True)}
    memory = host.part("nodes.devices").DeviceMemory("cuda:0", "A", "cuda", 99, 9, 9, 0, {})
    monkeypatch.setattr(sources, "devices", lambda: [CARD, torch.device("cuda", 1)])
    monkeypatch.setattr(
        sources, "device_memory", lambda device: memory._replace(device=str(device))
    )
    part = host.part("nodes.allocator")
    monkeypatch.setattr(part, "_devices", lambda machine: ([CARD], ""))
    monkeypatch.setattr(part, "_backend", lambda machine: "native")
    monkeypatch.setattr(part, "_options_read", {})
    monkeypatch.setattr(part.allocator, "read_settings", count("settings", ({}, "")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", count("blocks", []))
    settings = {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", count("snapshot", settings))
    return asked


def test_a_panel_that_asks_each_second_takes_no_snapshots(fresh, sources, asked) -> None:
    for _ in range(3):
        (card, _) = sources.gather()["devices"]
    assert card["allocator"]["inactive_split_bytes"] == 1
    assert asked == {"snapshot": 1, "settings": 0, "blocks": 0}
    sources.gather(thorough=True)  # two cards
    assert asked == {"snapshot": 1, "settings": 0, "blocks": 1}
    fresh.part("nodes.allocator").diagnosis()  # the doctor looks anew
    assert (asked["snapshot"], asked["settings"]) == (2, 1)


def test_what_fails_is_not_measurable_and_the_report_goes_on(
    fresh, sources, asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise NotImplementedError("Cannot access storage of\nSparseTensorImpl")

    for name in ("_holdings", "_allocator", "_fragments", "_fits"):
        monkeypatch.setattr(sources, name, failing)
    monkeypatch.setattr(fresh.part("nodes.allocator"), "for_the_report", failing)
    for device in sources.gather(thorough=True, probe=True)["devices"]:
        unread = {each["what"]: each["why"] for each in device["not_measurable"]}
        assert unread.keys() >= {
            *("largest allocation", "free blocks", "allocator", "buffers and kept results")
        }
        why = "it fails: NotImplementedError: Cannot access storage of SparseTensorImpl."
        assert set(unread.values()) == {why} and device["allocator"] is None
    assert "allocator's options" in unread


def test_results_without_a_storage_are_left_out(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cache:
        """As ComfyUI's, with one result."""

        def __init__(self) -> None:
            plain = torch.zeros(100, dtype=torch.uint8)
            outputs = [[torch.eye(3).to_sparse(), plain, plain]]
            self.cache = {"a": types.SimpleNamespace(outputs=outputs)}

        def release(self) -> None:
            """What ComfyUI leaves where memory pressure can call it."""

    release = Cache().release
    monkeypatch.setattr(sources.comfy.memory_management, "extra_ram_release_callback", release)
    assert sources._kept_results(torch.device("cpu")) == 100


def test_the_worker_probes_and_the_server_goes_on(
    fresh, host, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, queue = fresh.part("nodes.report"), host.server.prompt_queue
    boundary, seen = report.BOUNDARY, []

    def gather(thorough: bool, probe: bool, only: str | None) -> dict[str, Any]:
        asked = threading.Thread(target=queue.get_current_queue, daemon=True)
        asked.start()
        asked.join(5)
        assert not asked.is_alive()  # the server can still tell of its queue
        seen.append((probe, threading.current_thread().name))
        return {"devices": [{}]}

    def work() -> None:
        """As main.py does between two prompts."""
        while not (flags := queue.get_flags()):
            time.sleep(0.01)
        assert not flags.get("unload_models", flags.get("free_memory", False))

    monkeypatch.setattr(report, "gather", gather)
    worker = threading.Thread(target=work, name="worker")
    worker.start()
    assert asyncio.run(report.probed()) == {"devices": [{}]}
    worker.join()
    boundary._running.add("a prompt")
    try:
        told = asyncio.run(report.probed())
        assert "a prompt runs" in told["devices"][0]["largest_allocation"]["note"]
    finally:
        boundary._running.discard("a prompt")
    assert seen[0] == (True, "worker") and seen[1][0] is False


def test_reports_for_many_are_made_once(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    report, made = fresh.part("nodes.report"), []

    def gather(*wish: Any) -> dict[str, Any]:
        made.append(wish)
        time.sleep(0.05)
        return {"number": len(made)}

    monkeypatch.setattr(report, "gather", gather)
    shared, got = report._Shared(), []
    work = [
        threading.Thread(target=lambda: got.append(shared.report(report.Wish()))) for _ in range(9)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(got) == 9 and len(made) <= 3  # the first, one for who came meanwhile
    before = len(made)
    for number in (1, 2):  # nobody gets one from before
        assert shared.report(report.Wish()) == {"number": before + number}


# ---------------------------------------------------------------------------------- what is needed
def test_models_that_the_last_prompt_did_not_use_are_told_apart(fresh, sources) -> None:
    """With dynamic VRAM ComfyUI marks the models of the running prompt, and only while it runs."""
    graph = {"vae": loader("VAE", VAE), "image": node("EmptyImage", width=64, height=64)}
    graph["image"]["inputs"] |= {"batch_size": 1, "color": 0}
    graph["e"] = node("VAEEncode", pixels=["image", 0], vae=["vae", 0])
    run = fresh.run({**graph, "out": node("PreviewAny", source=["e", 0])})
    patcher = fresh.executor.caches.outputs.get_local("vae").outputs[0][0].patcher
    assert needed(sources) is None and run.executed
    pins = {"current_prompt": False}
    patcher.model.dynamic_pins = {patcher.load_device: pins}
    patcher.model.dynamic_vbars = {}
    patcher.is_dynamic = lambda: True
    patcher.set_in_use_by_current_prompt = lambda used: pins.update(current_prompt=used)
    patcher.loaded_ram_size = patcher.pinned_memory_size = lambda: 0
    try:
        fresh.run({**graph, "shown": node("PreviewAny", source=["vae", 0])}, ["shown"])
        assert pins == {"current_prompt": False} and needed(sources) is True
        fresh.run({"image": graph["image"], **preview_image("image")})
        assert needed(sources) is False
    finally:
        fresh.forget_everything()


def preview_image(name: str) -> dict[str, Any]:
    """A node that shows a picture."""
    return {"shown": node("PreviewImage", images=[name, 0])}


def needed(sources) -> bool | None:
    """Of the VAE."""
    (vae,) = [m for m in sources.gather()["models"] if m["name"].startswith(VAE[:8])]
    return vae["needed"]


def test_a_model_that_cannot_be_read_is_named_with_the_reason(
    fresh, sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.run(graph(**preview("e")))
    models = fresh.part("nodes.memory_models")

    def failing(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(models, "_model", failing)
    unread = sources.gather()["devices"][-1]["not_measurable"]
    (why,) = {each["why"] for each in unread}
    assert why == "its figures cannot be read (RuntimeError: no such thing)."
    assert unread[0]["what"].startswith("model ")
    models.BOUNDARY._running.add("a prompt")
    try:
        (each, *_) = sources.gather()["devices"][-1]["not_measurable"]
        assert "may be loading or moving it" in each["why"]
    finally:
        models.BOUNDARY._running.discard("a prompt")


def test_probing_is_not_tried_in_ram(sources) -> None:
    (ram,) = sources.gather(probe=True)["devices"]
    assert ram["largest_allocation"]["bytes"] is None
    assert ram["largest_allocation"]["note"].startswith("Not tried: an operating system promises")


def test_the_probe_ends_in_time(sources) -> None:
    assert sources._largest(lambda size: size < 10, 40_000_000_000, time.monotonic() - 1) == (
        0,
        False,
    )
    assert "After 2 s no larger ones were tried." in sources._probe_note(0, 0, False)


@pytest.mark.parametrize("room", [0, 5 << 20, 3_000_000_001, 40_000_000_000])
def test_the_probe_halves_its_way_to_the_largest_that_fits(sources, room: int) -> None:
    bound, tried = 40_000_000_000, []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    found, done = sources._largest(fits, bound, time.monotonic() + 60)
    assert done and room - sources.PROBE_BYTES <= found <= room and len(tried) < 16


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_what_an_allocator_cannot_tell_is_none_with_the_reason(
    sources, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    names = ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
    stats = {f"{name}.all.current": size for name, size in zip(names, (5, 9, 0), strict=True)}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    told = sources._allocator(torch.device("cuda", 0), None)
    assert told[:3] == (backend, 5, 9) and told.largest_free_block is None
    if backend == "native":
        assert told.inactive_split == 0 and "?fragments=true" in told.why["largest_free_block"]
    else:
        assert told.inactive_split is None and "no list of blocks" in told.why["inactive_split"]


# --------------------------------------------------------------------------------------- the node
def test_the_node_passes_the_very_object_on_and_draws(fresh, sources) -> None:
    run = fresh.run(graph(report=report_node("e", 0), **preview("report")))
    value, text, data, picture = (output[0] for output in run.outputs["report"])
    assert value is run.outputs["e"][0][0]
    told = json.loads(data)
    assert told["running"] is False and text == _core(fresh).text(told)
    assert (
        picture.shape[0] == 1 and picture.shape[2:] == (800, 3) and picture.dtype == torch.float32
    )
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    shown = run.ui["report"]
    assert shown["qwen_vram"][0]["text"].startswith("RAM: ") and len(shown["images"]) == 1
    path = os.path.join(fresh.folder_paths.get_temp_directory(), shown["images"][0]["filename"])
    assert os.path.getsize(path) > 1000


def _core(fresh) -> types.ModuleType:
    return fresh.part("core.memory_text")


def test_the_node_works_alone_and_the_themes_differ(fresh) -> None:
    run = fresh.run({"dark": report_node(), "light": report_node(theme="light", probe=True)})
    dark, light = run.outputs["dark"][3][0], run.outputs["light"][3][0]
    assert run.outputs["dark"][0][0] is None
    assert dark.mean() < 0.4 < 0.6 < light.mean()


def test_at_the_end_of_a_graph_it_reports_at_every_run(fresh) -> None:
    work = graph(report=report_node("e", 0), **preview("e"))
    fresh.run(work)
    again = fresh.run(work)
    assert again.executed == ["report"]


def test_on_a_wire_it_makes_nothing_run_again(fresh) -> None:
    work = graph(report=report_node("e", 0), **preview("report"))
    fresh.run(work)
    assert fresh.run(work).executed == []
    changed = {**work, "e": encode("another", cache="off")}
    assert fresh.run(changed).executed == ["e", "report", "out_report"]


def test_its_text_is_made_anew_for_a_node_that_shows_it(fresh) -> None:
    work = {"report": report_node(), "shown": node("PreviewAny", source=["report", 1])}
    fresh.run(work)
    assert fresh.run(work).executed == ["report", "shown"]


def test_results_that_nodes_keep_are_a_part_while_a_prompt_runs(fresh, sources) -> None:
    fresh.restart("RAM_PRESSURE")
    picture = node("EmptyImage", width=1024, height=1024, batch_size=1, color=7)
    run = fresh.run({"image": picture, "report": report_node("image", 0)})
    (ram,) = told_by(run)["devices"]
    sizes = {part["id"]: part["bytes"] for part in ram["parts"]}
    assert sizes["outputs"] >= 1024 * 1024 * 3 * 4
    assert "outputs" not in {part["id"] for part in sources.gather()["devices"][0]["parts"]}


# ------------------------------------------------------------------------------- the prompt cache
def test_the_prompt_cache_looks_through_it(fresh) -> None:
    fresh.run({"clip": loader("TextEncoder", CLIP), "e": encode("a fox"), **preview("e")})
    fresh.restart()
    work = {
        "clip": loader("TextEncoder", CLIP),
        "report": report_node("clip", 0),
        "e": encode("a fox", "report"),
        **preview("e"),
    }
    assert fresh.run(work, ["out_e"]).status("e")["result"] == "hit"


def test_a_text_of_the_report_is_never_taken_from_the_prompt_cache(fresh) -> None:
    work = {
        "clip": loader("TextEncoder", CLIP),
        "report": report_node(),
        "e": node("CLIPTextEncode", clip=["clip", 0], text=["report", 1]),
        **preview("e"),
    }
    fresh.run(work)
    assert fresh.store.memory_usage().entries == 0
