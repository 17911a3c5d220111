"""What can be said about the bundled workflows without a host."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from pack.tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
STOCK_NODES = {
    "CFGNorm",
    "ComfySwitchNode",
    "EmptySD3LatentImage",
    "ImageScale",
    "ImageScaleToTotalPixels",
    "KSampler",
    "LoadImage",
    "LoraLoaderModelOnly",
    "MarkdownNote",
    "MaskPreview",
    "ModelSamplingAuraFlow",
    "PreviewAny",
    "PreviewImage",
    "PrimitiveBoolean",
    "PrimitiveFloat",
    "PrimitiveInt",
    "SaveImage",
    "VAEDecode",
}
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras"}
ABSOLUTE_PATH = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\)|/(home|Users|root|workspace)/")
THUMBNAIL_BYTES = 80_000
TITLE_HEIGHT = 30
Box = tuple[float, float, float, float]

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    """A workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of a workflow and of its subgraphs."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    return [node for graph in (workflow, *subgraphs) for node in graph["nodes"]]


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def our_nodes() -> set[str]:
    """The node ids in the schemas of the pack, read from the source."""
    return {
        keyword.value.value
        for file in (ROOT / "nodes").glob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    }


def test_there_are_workflows() -> None:
    assert WORKFLOWS


@each_workflow
def test_every_node_is_known(path: Path) -> None:
    workflow = load(path)
    subgraphs = {g["id"] for g in workflow.get("definitions", {}).get("subgraphs", [])}
    known = our_nodes() | STOCK_NODES | subgraphs
    assert {n["type"] for n in nodes(workflow)} <= known


@each_workflow
def test_it_has_a_thumbnail(path: Path) -> None:
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture[:3] == b"\xff\xd8\xff", "not a JPEG"
    assert len(picture) < THUMBNAIL_BYTES


@each_workflow
def test_it_contains_no_absolute_path(path: Path) -> None:
    assert [s for s in strings(load(path)) if ABSOLUTE_PATH.search(s)] == []


@each_workflow
def test_every_model_file_has_a_link(path: Path) -> None:
    named = 0
    for node in nodes(load(path)):
        links = {model["name"]: model for model in node["properties"].get("models", [])}
        for value in strings(node.get("widgets_values", [])):
            # A note names files in sentences; a widget holds the name and nothing else.
            if "\n" in value or not value.endswith(MODEL_SUFFIXES):
                continue
            named += 1
            assert value in links, f"node {node['id']} ({node['type']}) has no link for {value}"
            assert re.fullmatch(rf"https://\S+/{re.escape(value)}", links[value]["url"])
            assert links[value]["directory"] in MODEL_FOLDERS
    assert named


def apart(one: Box, other: Box) -> bool:
    """Whether two boxes have no point in common."""
    (x, y, width, height), (x2, y2, width2, height2) = one, other
    return x >= x2 + width2 or x2 >= x + width or y >= y2 + height2 or y2 >= y + height


def within(one: Box, other: Box) -> bool:
    """Whether the first box lies inside the second."""
    (x, y, width, height), (x2, y2, width2, height2) = one, other
    return x >= x2 and y >= y2 and x + width <= x2 + width2 and y + height <= y2 + height2


@each_workflow
def test_nothing_overlaps(path: Path) -> None:
    workflow = load(path)
    groups = [tuple(group["bounding"]) for group in workflow["groups"]]
    cards = [
        (n["pos"][0], n["pos"][1] - TITLE_HEIGHT, n["size"][0], n["size"][1] + TITLE_HEIGHT)
        for n in workflow["nodes"]
    ]
    assert all(apart(a, b) for boxes in (groups, cards) for a, b in combinations(boxes, 2))
    assert all(apart(c, g) or within(c, g) for c, g in product(cards, groups))
