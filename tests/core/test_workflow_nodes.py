"""Marks of the workflow brought into the request: the right nodes, and never an exception."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from pack.core.workflow_nodes import (
    NODE_KEEPS_NOTHING,
    PINNED_NODE,
    RUN_KEEPS_NOTHING,
    marks_of,
    prepared,
)

A, B = "a" * 64, "b" * 64


def marked(node_id: Any, kind: str = "X", **ours: Any) -> dict[str, Any]:
    """A node of a workflow."""
    return {"id": node_id, "type": kind, "properties": {"qwen_vram": ours} if ours else {}}


def api(**inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": "X", "inputs": inputs, "_meta": {"title": "T"}}


def request(prompt: dict[str, Any], *nodes: Any, subgraphs: Any = (), **workflow: Any) -> Any:
    """What the editor sends."""
    whole = {"nodes": list(nodes), "definitions": {"subgraphs": list(subgraphs)}, **workflow}
    return {
        "prompt": prompt,
        "extra_data": {"extra_pnginfo": {"workflow": whole}},
        "client_id": "c",
    }


def test_a_pinned_node_is_replaced_in_its_place() -> None:
    sent = request({"1": api(a=1), "2": api(x=["1", 0])}, marked(1, pin={"content": A}), marked(2))
    before = copy.deepcopy(sent)
    done = prepared(sent)
    assert done["prompt"] == {
        "1": {"class_type": PINNED_NODE, "inputs": {"content": A}, "_meta": {"title": "T"}},
        "2": api(x=["1", 0]),
    }
    assert done["client_id"] == "c"
    assert sent == before


def test_a_pin_without_a_node_in_the_prompt_does_nothing() -> None:
    """Muted and bypassed nodes are not in the prompt; the user's choice counts."""
    prompt = {"2": api()}
    assert prepared(request(prompt, marked(1, pin={"content": A})))["prompt"] == prompt


def test_a_pin_in_a_subgraph_is_found_under_its_path() -> None:
    inner = {"id": "inner", "nodes": [marked(3, pin={"content": A})]}
    outer = {"id": "outer", "nodes": [marked(7, "inner")]}
    prompt = {"12:7:3": api(), "3": api(), "7:3": api()}
    done = prepared(request(prompt, marked(12, "outer"), marked(3), subgraphs=[inner, outer]))
    kinds = {node_id: node["class_type"] for node_id, node in done["prompt"].items()}
    assert kinds == {"12:7:3": PINNED_NODE, "3": "X", "7:3": "X"}


def test_a_pin_in_a_subgraph_that_is_used_twice_is_refused() -> None:
    inner = {"id": "inner", "nodes": [marked(3, pin={"content": A})]}
    sent = request(
        {"1:3": api(), "2:3": api()}, marked(1, "inner"), marked(2, "inner"), subgraphs=[inner]
    )
    for node in prepared(sent)["prompt"].values():
        assert node["class_type"] == PINNED_NODE
        assert "used more than once" in node["inputs"]["problem"]
    del sent["prompt"]["2:3"]  # the other one is muted
    assert prepared(sent)["prompt"]["1:3"]["inputs"] == {"content": A}


@pytest.mark.parametrize("pin", [{}, {"content": 3}, {"content": "../x"}, "x", 5, [], False, True])
def test_an_unreadable_pin_never_runs_silently(pin: Any) -> None:
    done = prepared(request({"1": api()}, marked(1, pin=pin)))
    assert done["prompt"]["1"]["class_type"] == PINNED_NODE
    assert "cannot be read" in done["prompt"]["1"]["inputs"]["problem"]


def test_a_pin_of_another_class_of_node_is_refused() -> None:
    """The ids of two graphs mean different nodes."""
    done = prepared(request({"1": api()}, marked(1, "Y", pin={"content": A})))
    assert done["prompt"]["1"]["class_type"] == PINNED_NODE
    assert "a node Y, and this one is a X" in done["prompt"]["1"]["inputs"]["problem"]


def test_a_request_that_is_sent_again_is_pinned_again() -> None:
    """ComfyUI's history has the replaced node beside the workflow."""
    done = prepared(request({"1": api()}, marked(1, pin={"content": A})))
    assert prepared(done) == done


def test_a_fingerprint_that_comes_with_a_node_is_left_out() -> None:
    """ComfyUI writes it into the prompt, and so into pictures, and believes what comes back."""
    sent = {"prompt": {"1": {**api(a=1), "is_changed": "old"}, "2": api()}}
    before = copy.deepcopy(sent)
    assert prepared(sent) == {"prompt": {"1": api(a=1), "2": api()}}
    assert sent == before
    marks = request(sent["prompt"], marked(1, pin={"content": A}), marked(2, keep_nothing=True))
    assert all("is_changed" not in node for node in prepared(marks)["prompt"].values())


def test_callers_of_the_api_say_it_in_meta() -> None:
    node = {**api(), "_meta": {"qwen_vram": {"pin": {"content": A}}}}
    assert prepared({"prompt": {"1": node}})["prompt"]["1"]["inputs"] == {"content": A}
    both = request({"1": node}, marked(1, pin={"content": B}))
    assert prepared(both)["prompt"]["1"]["inputs"] == {"content": A}


# ---------------------------------------------------------------------------------- keep nothing
def said(done: Any) -> dict[str, Any]:
    """What each node was told about keeping."""
    return {
        node_id: node.get("_meta", {}).get("qwen_vram", {}).get("keep_nothing")
        for node_id, node in done["prompt"].items()
    }


def test_one_node_keeps_nothing() -> None:
    sent = request({"1": api(), "2": api()}, marked(1, keep_nothing=True), marked(2))
    done = prepared(sent)
    assert said(done) == {"1": NODE_KEEPS_NOTHING, "2": None}
    assert done["prompt"]["1"]["_meta"]["title"] == "T"
    assert done["prompt"]["2"] is sent["prompt"]["2"]


def test_a_subgraph_hands_it_to_its_nodes() -> None:
    inner = {"id": "inner", "nodes": [marked(3)]}
    done = prepared(
        request({"1:3": api()}, marked(1, "inner", keep_nothing=True), subgraphs=[inner])
    )
    assert said(done) == {"1:3": NODE_KEEPS_NOTHING}


def test_a_run_keeps_nothing_and_the_mark_is_not_saved() -> None:
    extra = {"ds": {"scale": 1}, "qwen_vram": {"keep_nothing": True}}
    sent = request({"1": api(), "2": {"class_type": "X", "inputs": {}}}, marked(1), extra=extra)
    done = prepared(sent)
    assert said(done) == {"1": RUN_KEEPS_NOTHING, "2": RUN_KEEPS_NOTHING}
    assert done["extra_data"]["extra_pnginfo"]["workflow"]["extra"] == {"ds": {"scale": 1}}
    assert sent["extra_data"]["extra_pnginfo"]["workflow"]["extra"] is extra
    assert "qwen_vram" in extra
    by_api = {"prompt": {"1": api()}, "extra_data": {"qwen_vram": {"keep_nothing": True}}}
    assert said(prepared(by_api)) == {"1": RUN_KEEPS_NOTHING}


# --------------------------------------------------------------------------------------- bad data
JUNK: list[Any] = [None, 0, -1, True, "", "x", "1", [], [1], {}, {"id": {}}, {"nodes": 3}, 1.5]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_a_request_of_another_shape_passes(junk: Any) -> None:
    assert prepared(junk) is junk
    assert prepared({"prompt": junk}) == {"prompt": junk}
    for sent in (
        {"prompt": {"1": junk}, "extra_data": junk},
        {"prompt": {"1": api()}, "extra_data": {"extra_pnginfo": junk}},
        {"prompt": {"1": api()}, "extra_data": {"extra_pnginfo": {"workflow": junk}}},
        request({"1": api()}, junk),
        request({"1": api()}, {"id": 1, "type": junk, "properties": junk}),
        request({"1": api()}, {"id": junk, "properties": {"qwen_vram": junk}}),
        request({"1": api()}, subgraphs=[junk, {"id": junk, "nodes": junk}]),
        request({"1": api()}, extra=junk),
        request({"1": api()}, extra={"qwen_vram": junk}),
    ):
        assert prepared(sent)["prompt"] == sent["prompt"]


def test_chance_finds_no_exception() -> None:
    generator = random.Random(1)
    names = (
        "prompt",
        "extra_data",
        "extra_pnginfo",
        "workflow",
        "nodes",
        "id",
        "type",
        "properties",
    )
    names += (
        "qwen_vram",
        "pin",
        "content",
        "keep_nothing",
        "_meta",
        "definitions",
        "subgraphs",
        "extra",
    )

    def value(depth: int) -> Any:
        kind = generator.randrange(4) if depth else 3
        if kind == 0:
            return [value(depth - 1) for _ in range(3)]
        if kind < 3:
            return {generator.choice(names): value(depth - 1) for _ in range(4)}
        return generator.choice(JUNK)

    for _ in range(3000):
        sent = request(
            {"1": value(3)},
            *[{"id": 1, **value_dict} for value_dict in [dict.fromkeys(names, value(4))]],
        )
        sent["extra_data"] = generator.choice([sent["extra_data"], value(5)])
        prepared(sent)


def test_what_stands_in_meta_is_made_readable() -> None:
    for meta in (None, 3, {"qwen_vram": 3}, {"qwen_vram": None}):
        node = prepared({"prompt": {"1": {**api(), "_meta": meta}}})["prompt"]["1"]
        assert node["_meta"].get("qwen_vram", {}) == {}


def test_a_subgraph_that_holds_itself_ends() -> None:
    loop = {"id": "loop", "nodes": [marked(1, "loop"), marked(2)]}
    assert len(marks_of({"nodes": [marked(1, "loop")], "definitions": {"subgraphs": [loop]}})) < 100
