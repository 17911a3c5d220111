"""A node or a run that keeps nothing: not looked up, not stored, no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.tests.graphs import CLIP, loader, node, text_to_image
from pack.tests.nodes.test_pins import Graph, queue, same


def private_graph() -> Graph:
    """Both kinds of encode nodes."""
    graph = text_to_image()
    graph["negative"] = node("CLIPTextEncode", clip=["clip", 0], text="blurry")
    return graph


def files(host: Any) -> list[Path]:
    """What the store of encoded prompts wrote."""
    host.store.flush()
    return [path for path in host.store_directory.rglob("*") if path.is_file()]


def told(host: Any) -> dict[str, dict[str, Any]]:
    """What the editor was told about the cache."""
    return {data["node"]: data for name, data in host.events if name == "qwen_vram.cache"}


def test_a_run_that_keeps_nothing_neither_stores_nor_looks_up(fresh) -> None:
    private = {"extra": {"qwen_vram": {"keep_nothing": True}}}
    graph = private_graph()
    counted = fresh.part("nodes.store").SAVINGS.now
    expected = queue(fresh, graph, {}, **private)
    assert files(fresh) == []
    assert {n: d["why"] for n, d in told(fresh).items()} == {
        "positive": "this run keeps nothing",
        "negative": "this run keeps nothing",
    }
    assert {data["result"] for data in told(fresh).values()} == {"not kept"}
    assert fresh.part("nodes.store").SAVINGS.now == counted
    fresh.restart()
    kept = queue(fresh, graph, {})
    assert len(files(fresh)) == 2
    fresh.restart()
    again = queue(fresh, graph, {}, **private)
    assert {"clip", "positive", "negative"} <= set(again.executed)
    for run in (kept, again):
        assert same(run.outputs["decode"], expected.outputs["decode"])
    assert len(files(fresh)) == 2


@pytest.mark.parametrize("node_id", ["positive", "negative"])
def test_one_node_keeps_nothing(fresh, node_id: str) -> None:
    marked = {"nodes": [{"id": node_id, "properties": {"qwen_vram": {"keep_nothing": True}}}]}
    queue(fresh, private_graph(), {}, **marked)
    assert len(files(fresh)) == 1
    assert told(fresh)[node_id]["why"] == "this node keeps nothing"
    fresh.restart()
    run = queue(fresh, private_graph(), {}, **marked)
    assert node_id in run.executed
    assert {"positive", "negative"} - {node_id} <= set(told(fresh))
    assert [d["result"] for n, d in told(fresh).items() if n != node_id] == ["hit"]


class Expanding:
    """A node that builds a loader and one of our encode nodes."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def run(self) -> dict[str, Any]:
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        made = loader("TextEncoder", CLIP)
        clip = graph.node(made["class_type"], **made["inputs"])
        inner = graph.node(
            "QwenVRAMCachedTextEncode", clip=clip.out(0), text="x", cache="memory and disk"
        )
        return {"result": (inner.out(0),), "expand": graph.finalize()}


def test_a_node_that_expands_hands_it_to_its_nodes(fresh, monkeypatch) -> None:
    monkeypatch.setitem(fresh.nodes.NODE_CLASS_MAPPINGS, "TestExpanding", Expanding)
    graph = {"e": node("TestExpanding"), "show": node("PreviewAny", source=["e", 0])}
    queue(fresh, graph, {}, extra={"qwen_vram": {"keep_nothing": True}})
    assert files(fresh) == []


def test_the_mark_is_in_no_key_of_comfyui(fresh) -> None:
    graph = private_graph()
    queue(fresh, graph, {})
    again = queue(fresh, graph, {}, extra={"qwen_vram": {"keep_nothing": True}})
    assert not {"positive", "negative", "sampler"} & set(again.executed)
