"""Pinned outputs in the real executor: exact, not run, refused where that cannot be."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from multidict import CIMultiDict
from pack.tests.graphs import CLIP, VAE, loader, node, text_to_image
from pack.tests.host import Run, RunError

Graph = dict[str, Any]
LOADERS = {"unet", "clip", "vae"}


@pytest.fixture
def pins(fresh) -> Iterator[Any]:
    """The store of pins, empty."""
    store = fresh.part("nodes.pins").PINS
    remove_all(store)
    yield store
    remove_all(store)


def remove_all(store: Any) -> None:
    """Delete every pin."""
    for pin in store.listed():
        store.delete(pin.content)


def pin(host: Any, graph: Graph, node_id: str, outputs: int = 1) -> dict[str, Any]:
    """What the editor does for Pin output: a request with one more node, which alone is run."""
    values = {f"value_{i}": [node_id, i] for i in range(outputs)}
    alone = {i: n for i, n in graph.items() if n["class_type"] not in ("SaveImage", "PreviewAny")}
    run = host.run({**alone, "pin": node("QwenVRAMPin", **values)})
    (facts,) = run.ui["pin"]["qwen_vram_pin"]
    return facts


def queue(host: Any, graph: Graph, pinned: dict[str, Any], **workflow: Any) -> Run:
    """Queue a graph as the editor does, through every handler, with pins in the workflow."""
    nodes = [
        {"id": i, "type": graph[i]["class_type"], "properties": {"qwen_vram": {"pin": p}}}
        for i, p in pinned.items()
    ]
    info = {"extra_pnginfo": {"workflow": {"nodes": nodes, **workflow}}}
    return host.run(host.server.trigger_on_prompt({"prompt": graph, "extra_data": info})["prompt"])


def picture_graph(name: str = "one.png") -> Graph:
    """A node with an image and a mask, and what reads both."""
    return {
        "load": node("LoadImage", image=name),
        "vae": loader("VAE", VAE),
        "latent": node(
            "VAEEncodeForInpaint",
            pixels=["load", 0],
            vae=["vae", 0],
            mask=["load", 1],
            grow_mask_by=0,
        ),
        "show": node("PreviewAny", source=["latent", 0]),
    }


@pytest.fixture
def pictures(host) -> Iterator[Path]:
    """Two pictures with an alpha channel in the input folder."""
    folder = host.base / "input"
    for name, colour in (("one", (200, 40, 40, 90)), ("two", (40, 40, 200, 10))):
        pixels = np.full((64, 64, 4), colour, dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{name}.png")
    yield folder
    for path in folder.glob("*.png"):
        path.unlink()


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ------------------------------------------------------------------------------ kept, and not run
SPARED = {
    "positive": {"positive"},
    "latent": {"latent"},
    "sampler": {"unet", "clip", "shift", "positive", "negative", "latent", "sampler"},
    "decode": LOADERS | {"shift", "positive", "negative", "latent", "sampler", "decode"},
}


@pytest.mark.parametrize("node_id", SPARED)
def test_after_a_restart_upstream_does_not_run_and_the_picture_is_the_same(
    fresh, pins, node_id: str
) -> None:
    graph = text_to_image()
    expected = fresh.run(graph).outputs["decode"]
    pinned = {node_id: pin(fresh, graph, node_id)}
    fresh.forget_everything()
    run = queue(fresh, graph, pinned)
    before = SPARED[node_id] - {node_id}
    assert not before & set(run.executed)
    shown = run.outputs[node_id][0] if node_id == "decode" else run.outputs["decode"][0]
    assert same(shown[0], expected[0][0])
    assert "save" in run.executed


def test_an_image_and_its_mask_are_kept_together(fresh, pins, pictures) -> None:
    graph = picture_graph()
    expected = fresh.run(graph).outputs["latent"][0][0]
    facts = pin(fresh, graph, "load", 2)
    assert facts["types"] == ["IMAGE", "MASK"]
    assert facts["bytes"] == (pins.directory / f"{facts['content']}.safetensors").stat().st_size
    (pictures / "one.png").unlink()
    fresh.forget_everything()
    assert same(queue(fresh, graph, {"load": facts}).outputs["latent"][0][0], expected)


def test_changed_upstream_counts_again_after_unpinning_as_in_a_fresh_process(fresh, pins) -> None:
    graph, changed = text_to_image("a red bunny"), text_to_image("a blue fox")
    first = fresh.run(graph).outputs["decode"][0][0]
    pinned = {"positive": pin(fresh, graph, "positive")}
    held = queue(fresh, changed, pinned)
    assert same(held.outputs["decode"][0][0], first)
    unpinned = queue(fresh, changed, {}).outputs["decode"][0][0]
    fresh.forget_everything()
    assert same(unpinned, fresh.run(changed).outputs["decode"][0][0])
    assert not same(unpinned, first)


def test_pinned_and_unpinned_are_never_taken_for_each_other(fresh, pins) -> None:
    """Without a restart, in one process whose caches know both."""
    graph = text_to_image("a red bunny")
    other = {"positive": pin(fresh, text_to_image("a blue fox"), "positive")}
    red = fresh.run(graph).outputs["decode"][0][0]
    blue = queue(fresh, graph, other).outputs["decode"][0][0]
    assert not same(red, blue)
    assert same(queue(fresh, graph, {}).outputs["decode"][0][0], red)


def test_equal_values_have_one_file(fresh, pins) -> None:
    graph = text_to_image()
    one = pin(fresh, graph, "latent")
    fresh.forget_everything()
    assert pin(fresh, graph, "latent")["content"] == one["content"]
    assert len(pins.listed()) == 1


def test_a_deleted_pin_can_be_made_again_although_comfyui_has_everything(fresh, pins) -> None:
    graph = text_to_image()
    content = pin(fresh, graph, "latent")["content"]
    pins.delete(content)
    assert pin(fresh, graph, "latent")["content"] == content
    assert [p.content for p in pins.listed()] == [content]


def test_an_output_that_the_pin_lacks_is_blocked_with_a_sentence(fresh, pins, pictures) -> None:
    facts = pin(fresh, picture_graph(), "load", 1)
    queue(fresh, picture_graph(), {"load": facts})
    (error,) = [data for name, data in fresh.events if name == "execution_error"]
    assert error["node_id"] == "latent"
    assert "was not there when the node was pinned" in error["exception_message"]


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("node_id", "kind"), [("unet", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")])
def test_what_is_alive_is_refused_before_anything_runs(
    fresh, pins, node_id: str, kind: str
) -> None:
    with pytest.raises(RunError) as refused:
        pin(fresh, text_to_image(), node_id)
    (error,) = refused.value.details["pin"]["errors"]
    assert f"The output {kind} cannot be pinned: no exact copy" in error["details"]
    assert "Pin a node behind it instead" in error["details"]
    assert pins.listed() == []


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("TestTextList", 'The output STRING of "TestTextList" cannot be pinned: it is a list of 2'),
        ("TestLayers", 'The output INT of "TestLayers" cannot be pinned: it is a list of 2 values'),
    ],
)
def test_lists_are_refused(fresh, pins, kind: str, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        pin(fresh, {"list": node(kind)}, "list")
    assert pins.listed() == []


def test_conditioning_with_hooks_is_refused_with_the_reason(fresh, pins) -> None:
    graph = {
        "clip": loader("TextEncoder", CLIP),
        "hooked": node("TestHookedClip", clip=["clip", 0]),
        "e": {
            **node("CLIPTextEncode", clip=["hooked", 0], text="x"),
            "_meta": {"title": "My text"},
        },
    }
    with pytest.raises(RunError) as refused:
        pin(fresh, graph, "e")
    assert 'The output CONDITIONING of "My text" cannot be pinned: value[0][1]' in str(
        refused.value
    )
    assert "is a comfy.hooks.HookGroup, of which no exact copy is kept" in str(refused.value)


def test_outputs_of_two_nodes_are_no_pin(fresh, pins) -> None:
    graph = {i: node("EmptyImage", width=8, height=8, batch_size=1, color=0) for i in "ab"}
    wrong = node("QwenVRAMPin", value_0=["a", 0], value_1=["b", 0])
    with pytest.raises(RunError, match="the outputs of one node"):
        fresh.run({**graph, "pin": wrong})


def test_a_full_disk_is_a_sentence(fresh, pins, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pins._files, "write", full)
    with pytest.raises(RunError, match="The pin cannot be written to .*No space left"):
        pin(fresh, text_to_image(), "latent")


# ------------------------------------------------------------------------------- lost and damaged
def test_a_missing_file_is_told_before_anything_runs(fresh, pins) -> None:
    graph = text_to_image()
    facts = pin(fresh, graph, "sampler")
    pins.delete(facts["content"])
    fresh.forget_everything()
    fresh.events.clear()
    with pytest.raises(RunError) as refused:
        queue(fresh, graph, {"sampler": facts})
    (error,) = refused.value.details["sampler"]["errors"]
    assert "is not on this machine" in error["details"]
    assert "Unpin its node (right-click, Unpin output)" in error["details"]
    assert not [name for name, _ in fresh.events if name == "executing"]


def test_the_editor_is_told_of_a_missing_pin_that_a_run_needs(fresh, pins) -> None:
    graph = text_to_image()
    content = pin(fresh, graph, "latent")["content"]
    pins.delete(content)
    marked = {"qwen_vram": {"pin": {"content": content}}}
    prompt = {**graph, "latent": {**graph["latent"], "_meta": marked}}

    def told(**more: Any) -> list[dict[str, Any]]:
        fresh.events.clear()
        fresh.server.trigger_on_prompt({"prompt": prompt, **more})
        return [data for name, data in fresh.events if name == "qwen_vram.pin_refused"]

    (refused,) = told(client_id="editor")
    assert refused["node"] == "latent" and refused["missing"] is True
    assert "is not on this machine" in refused["text"]
    assert len(told(client_id="editor", partial_execution_targets=["decode"])) == 1
    assert told(client_id="editor", partial_execution_targets=["positive"]) == []
    assert told() == []  # a script: it gets the refusal as the answer
    pin(fresh, graph, "latent")
    assert told(client_id="editor") == []


def test_a_damaged_file_stops_the_run_with_a_sentence(fresh, pins) -> None:
    graph = text_to_image()
    facts = pin(fresh, graph, "latent")
    path = pins.directory / f"{facts['content']}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fresh.forget_everything()
    with pytest.raises(RunError, match="has a damaged file .*Unpin its node"):
        queue(fresh, graph, {"latent": facts})


def test_an_unreadable_pin_is_refused_and_logged(fresh, pins, caplog) -> None:
    with pytest.raises(RunError) as refused:
        queue(fresh, text_to_image(), {"positive": {"content": "../../x"}})
    (error,) = refused.value.details["positive"]["errors"]
    assert "The pin of this node cannot be read" in error["details"]
    assert "Node positive: The pin of this node cannot be read" in caplog.text


# ----------------------------------------------------------------------------- keys and sub-graphs
def encode_graph() -> Graph:
    """A stock encode node, of which the cache of encode nodes keeps results, behind a picture."""
    return {
        "load": node("LoadImage", image="one.png"),
        "vae": loader("VAE", VAE),
        "latent": node("VAEEncode", pixels=["load", 0], vae=["vae", 0]),
        "show": node("PreviewAny", source=["latent", 0]),
    }


def test_the_content_of_a_pin_is_in_the_keys_behind_it(fresh, pins, pictures) -> None:
    graph, other = encode_graph(), encode_graph()
    other["load"]["inputs"]["image"] = "two.png"
    one, two = pin(fresh, graph, "load", 2), pin(fresh, other, "load", 2)
    first = queue(fresh, graph, {"load": one}).outputs["latent"][0][0]
    fresh.store.flush()
    fresh.restart()
    again = queue(fresh, graph, {"load": one})
    assert "vae" not in again.executed  # found: the key is that of the content
    changed = queue(fresh, graph, {"load": two})
    assert "latent" in changed.executed
    assert not same(changed.outputs["latent"][0][0], first)
    fresh.store.flush()
    fresh.restart()
    unpinned = queue(fresh, graph, {})
    assert "load" in unpinned.executed or "latent" in unpinned.executed
    assert same(unpinned.outputs["latent"][0][0], first)


def test_a_node_in_a_subgraph_is_pinned_under_its_path(fresh, pins) -> None:
    flat = text_to_image()
    facts = pin(fresh, flat, "positive")
    graph = json.loads(json.dumps(flat).replace('"positive"', '"12:3"'))
    graph["sampler"]["inputs"]["positive"] = graph["sampler"]["inputs"].pop("12:3")
    graph["12:3"]["inputs"]["text"] = "something else"
    node = {"id": 3, "type": "QwenVRAMCachedTextEncode"}
    inner = {"id": "s", "nodes": [{**node, "properties": {"qwen_vram": {"pin": facts}}}]}
    workflow = {"nodes": [{"id": 12, "type": "s"}], "definitions": {"subgraphs": [inner]}}
    fresh.forget_everything()
    run = queue(fresh, graph, {}, **workflow)
    assert same(run.outputs["decode"][0][0], fresh.run(flat).outputs["decode"][0][0])


# ------------------------------------------------------------------------------------------ routes
def ask(
    host: Any, method: str, path: str, query: dict[str, str] | None = None, **match: str
) -> tuple[int, Any]:
    """Call a handler as the server does."""
    (route,) = [r for r in host.server.routes if (r.method, r.path) == (method, path)]
    request = types.SimpleNamespace(match_info=match, headers=CIMultiDict(), query=query or {})
    response = host.loop.run_until_complete(route.handler(request))
    return response.status, json.loads(response.body)


def test_the_routes_list_and_delete(fresh, pins) -> None:
    one, two = "/qwen_vram/pins", "/qwen_vram/pins/{content}"
    assert ask(fresh, "GET", one) == (200, [])
    graph = text_to_image()
    facts = [pin(fresh, graph, node_id) for node_id in ("latent", "positive", "negative")]
    status, listed = ask(fresh, "GET", one)
    assert status == 200
    assert {row["content"] for row in listed} == {f["content"] for f in facts}
    assert {tuple(row["types"]) for row in listed} == {("LATENT",), ("CONDITIONING",)}
    assert all(set(row) == {"content", "bytes", "types", "created", "last_used"} for row in listed)
    assert ask(fresh, "DELETE", two, content=facts[0]["content"]) == (200, {"deleted": 1})
    assert ask(fresh, "DELETE", two, content=facts[0]["content"]) == (200, {"deleted": 0})
    assert ask(fresh, "DELETE", two, content="../x")[0] == 400
    assert ask(fresh, "DELETE", one, {"everything": "true"}) == (200, {"deleted": 2})
    assert pins.listed() == []


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({}, "This would delete every pin. Use DELETE /qwen_vram/pins/<content> for one pin"),
        ({"everything": "false"}, "This would delete every pin."),
        ({"unused_days": "30"}, "unused_days is not known."),
        ({"everything": "true", "content": "a"}, "content is not known."),
    ],
)
def test_pins_are_only_deleted_when_that_is_said(fresh, pins, query, sentence: str) -> None:
    content = pin(fresh, text_to_image(), "latent")["content"]
    status, answer = ask(fresh, "DELETE", "/qwen_vram/pins", query)
    assert status == 400 and answer["error"].startswith(sentence)
    status, answer = ask(
        fresh, "DELETE", "/qwen_vram/pins/{content}", {"dry": "1"}, content=content
    )
    assert status == 400 and "dry is not known" in answer["error"]
    assert [kept.content for kept in pins.listed()] == [content]
