"""Turns the examples into blocks that the editor takes with Ctrl+V, in the help pages."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from .environment import ROOT
from .substitutions import Prompt

DOCS = ROOT / "js" / "docs"
HEADINGS = {"en": "## Example", "zh": "## 示例"}
BLOCK = re.compile(r"(?m)^```json\n(\{.*\})\n```$")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# Pixels of the classic canvas. Heights only keep the nodes apart: the editor makes its own.
COLUMN, GAP, TITLE, SLOT, WIDGET, TEXT, STATUS, PREVIEW = 520, 60, 36, 22, 26, 120, 60, 290
LONG_STATUS = {"QwenVRAMSaveQuantized": 50, "QwenVRAMTiledEdit": 40}  # more than two lines of it
LOADER_WIDTH, OUR_WIDTH, USUAL_WIDTH = 450, 390, 300  # so that names and status lines have room

Workflow = dict[str, Any]
ObjectInfo = dict[str, Any]


class PageError(ValueError):
    """A help page that has no place for its example; the message says where it belongs."""


# ------------------------------------------------------------------------------ what the host says
def _inputs(info: ObjectInfo, class_type: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of every input of a node; the type of a combo is COMBO."""
    for kind in ("required", "optional"):
        for name, (type_, *options) in info[class_type]["input"].get(kind, {}).items():
            given = dict(options[0]) if options else {}
            if isinstance(type_, list):  # an old node: its choices stand where the type should
                type_, given = "COMBO", {**given, "options": type_}
            yield name, type_, given


def _is_widget(type_: str, options: dict[str, Any]) -> bool:
    return type_ in WIDGETS and not options.get("forceInput")


def _default(type_: str, options: dict[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    return {"COMBO": next(iter(options.get("options", [])), ""), "STRING": ""}.get(type_, 0)


def _slots(info: ObjectInfo, class_type: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """The inputs in the editor's order: what can only be wired first, then the widgets."""
    return sorted(_inputs(info, class_type), key=lambda one: _is_widget(*one[1:]))


def complete(graph: Prompt, info: ObjectInfo) -> Prompt:
    """The graph with every widget that it does not name at the node's default."""
    return {
        node_id: {
            **node,
            "inputs": {
                **{
                    name: _default(type_, options)
                    for name, type_, options in _inputs(info, node["class_type"])
                    if _is_widget(type_, options)
                },
                **node["inputs"],
            },
        }
        for node_id, node in graph.items()
    }


# ----------------------------------------------------------------------------------- one workflow
@functools.cache
def downloads() -> dict[str, dict[str, str]]:
    """Name, address and folder of every model file, as the bundled workflows give them."""
    found = {}
    for path in sorted((ROOT / "workflows").glob("*.json")):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            found |= {m["name"]: m for m in node.get("properties", {}).get("models", [])}
    return found


def _is_link(value: Any) -> bool:
    return isinstance(value, list)


def _widget_values(node: dict[str, Any], info: ObjectInfo) -> list[Any]:
    """As the editor saves them: by place, with what follows a seed and a picture to be chosen."""
    values: list[Any] = []
    for name, type_, options in _inputs(info, node["class_type"]):
        if not _is_widget(type_, options):
            continue
        value = node["inputs"][name]
        values.append(_default(type_, options) if _is_link(value) else value)
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


def _properties(node: dict[str, Any]) -> dict[str, Any]:
    ours = node["class_type"].startswith("QwenVRAM")
    named = [v for v in node["inputs"].values() if isinstance(v, str)]
    models = [downloads()[value] for value in named if value in downloads()]
    properties = {"cnr_id": "qwen-vram" if ours else "comfy-core"}
    return {**properties, "models": models} if models else properties


def _size(node: dict[str, Any], info: ObjectInfo) -> tuple[int, int]:
    class_type = node["class_type"]
    slots, height = 0, 0
    for _, type_, options in _inputs(info, class_type):
        if not _is_widget(type_, options):
            slots += 1
        else:
            height += TEXT if options.get("multiline") else WIDGET
    shows = class_type.startswith(("Preview", "LoadImage"))
    height += SLOT * max(slots, len(info[class_type]["output"])) + (PREVIEW if shows else 0)
    height += STATUS if class_type.startswith("QwenVRAM") else 0
    height += LONG_STATUS.get(class_type, 0)
    if class_type.startswith("QwenVRAMLoad"):
        return LOADER_WIDTH, height
    return OUR_WIDTH if class_type.startswith("QwenVRAM") else USUAL_WIDTH, height


def _depths(graph: Prompt) -> dict[str, int]:
    """How many nodes stand before each one on the longest way to it."""

    @functools.cache
    def depth(node_id: str) -> int:
        sources = [v[0] for v in graph[node_id]["inputs"].values() if _is_link(v)]
        return 1 + max(map(depth, sources), default=-1)

    return {node_id: depth(node_id) for node_id in graph}


def _places(graph: Prompt, info: ObjectInfo) -> dict[str, list[int]]:
    """Columns from left to right, each filled from the top in the order of the graph."""
    below: dict[int, int] = {}
    places = {}
    for node_id, column in _depths(graph).items():
        top = below.get(column, 0)
        places[node_id] = [column * COLUMN, top]
        below[column] = top + TITLE + _size(graph[node_id], info)[1] + GAP
    return places


def _links(graph: Prompt, info: ObjectInfo) -> list[list[Any]]:
    """Every wire: its number, from node and output, to node and input, and what it carries."""
    links: list[list[Any]] = []
    for node_id, node in graph.items():
        for slot, (name, _, _) in enumerate(_slots(info, node["class_type"])):
            if _is_link(value := node["inputs"].get(name)):
                source, output = value
                carried = info[graph[source]["class_type"]]["output"][output]
                links.append([len(links) + 1, int(source), output, int(node_id), slot, carried])
    return links


def _wired_inputs(
    node_id: str, node: dict[str, Any], info: ObjectInfo, links: list[list[Any]]
) -> list[dict[str, Any]]:
    """The inputs that have a wire; the editor adds the others."""
    found = []
    for slot, (name, type_, options) in enumerate(_slots(info, node["class_type"])):
        for number in (k[0] for k in links if k[3:5] == [int(node_id), slot]):
            widget = {"widget": {"name": name}} if _is_widget(type_, options) else {}
            found.append({"name": name, "type": type_, "link": number, **widget})
    return found


def _outputs(
    node_id: str, node: dict[str, Any], info: ObjectInfo, links: list[list[Any]]
) -> list[dict[str, Any]]:
    kind = info[node["class_type"]]
    return [
        {
            "name": name,
            "type": type_,
            "links": [k[0] for k in links if k[1:3] == [int(node_id), slot]],
        }
        for slot, (name, type_) in enumerate(zip(kind["output_name"], kind["output"], strict=True))
    ]


def to_workflow(graph: Prompt, info: ObjectInfo) -> Workflow:
    """The graph in the editor's own format, as small as its paste takes it.

    Without `version`, `nodes` and `extra` the editor would not take it for a workflow.
    """
    graph = complete(graph, info)
    places, links = _places(graph, info), _links(graph, info)
    nodes = [
        {
            "id": int(node_id),
            "type": node["class_type"],
            "pos": places[node_id],
            "size": list(_size(node, info)),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": _wired_inputs(node_id, node, info, links),
            "outputs": _outputs(node_id, node, info, links),
            "properties": _properties(node),
            "widgets_values": _widget_values(node, info),
        }
        for order, (node_id, node) in enumerate(graph.items())
    ]
    last = {"last_node_id": max(map(int, graph)), "last_link_id": len(links)}
    return {**last, "nodes": nodes, "links": links, "groups": [], "extra": {}, "version": 0.4}


# --------------------------------------------------------------------------------------- the pages
def page(node_id: str, language: str) -> Any:
    """The path of a node's help page."""
    return DOCS / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")


def block_in(text: str, language: str) -> re.Match[str] | None:
    """The block of the example in the text of a page: the JSON is the only group."""
    start = text.find(f"\n{HEADINGS[language]}\n")
    end = text.find("\n## ", start + 1)
    return BLOCK.search(text, start, end if end >= 0 else len(text)) if start >= 0 else None


def write_page(node_id: str, language: str, graph: Prompt, info: ObjectInfo) -> bool:
    """Puts the block of the example into a help page; says whether that changed it."""
    path = page(node_id, language)
    text = path.read_text(encoding="utf-8")
    if (found := block_in(text, language)) is None:
        raise PageError(
            f"{path.relative_to(ROOT)} has no {HEADINGS[language]!r} with a sentence and a ```json "
            "block of one line, {} at first: add it before the other headings."
        )
    block = json.dumps(to_workflow(graph, info), ensure_ascii=False, separators=(",", ":"))
    changed = text[: found.start(1)] + block + text[found.end(1) :]
    path.write_text(changed, encoding="utf-8")
    return changed != text
