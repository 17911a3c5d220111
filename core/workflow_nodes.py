"""What a workflow's nodes are marked with, brought into a request to run it.

The editor sends the API prompt, which has no marks, and beside it the workflow, whose nodes have
them in `properties`. Who calls the API without a workflow writes the same into a node's `_meta`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from .disk_tier import is_key

OURS = "qwen_vram"
PINNED_NODE = "QwenVRAMPinned"
NODE_KEEPS_NOTHING = "this node keeps nothing"
RUN_KEEPS_NOTHING = "this run keeps nothing"
SETTINGS_KEEP_NOTHING = "nothing is kept, by the settings"
CACHE_IS_OFF = "cache is off"
# Reasons that are a choice of the user: no miss of the cache, which was not to be asked.
CHOSEN = frozenset({NODE_KEEPS_NOTHING, RUN_KEEPS_NOTHING, SETTINGS_KEEP_NOTHING, CACHE_IS_OFF})
HOSTS_OWN = "is_changed"  # ComfyUI's note of a node's fingerprint; saved with pictures, too
_DEEPEST = 32
_MOST_NODES = 100_000


class Marks(NamedTuple):
    """A node's marks and class: `pin` as found, None for none; which node of a file it is."""

    pin: Any = None
    keep_nothing: bool = False
    source: tuple[str, str] | None = None
    kind: Any = None


def prepared(request: Any) -> Any:
    """A request with pinned nodes replaced, and noted what shall keep nothing.

    A fingerprint that comes with a node is left out: ComfyUI would believe it, and draw the old
    picture after a file was replaced. Never raises, whatever the request looks like: ComfyUI would
    go on without this. The request itself is left as it is.
    """
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), dict):
        return request
    prompt = request["prompt"]
    workflow = _dict(_dict(_dict(request, "extra_data"), "extra_pnginfo"), "workflow")
    marks = marks_of(workflow)
    private = bool(
        _dict(_dict(workflow, "extra"), OURS).get("keep_nothing")
        or _dict(_dict(request, "extra_data"), OURS).get("keep_nothing")
    )
    pinned = {id_: m.source for id_, m in marks.items() if m.pin is not None and id_ in prompt}
    uses = Counter(pinned.values())
    changed = {
        node_id: _prepared_node(node, marks.get(node_id, Marks()), uses, private)
        for node_id, node in prompt.items()
    }
    return {**_without_run_mark(request), "prompt": changed}


def marks_of(workflow: Any) -> dict[str, Marks]:
    """The marks of every node, by its id in the API prompt: "12:3" is node 3 in sub-graph 12."""
    found: dict[str, Marks] = {}
    graphs = _list(_dict(workflow, "definitions"), "subgraphs")
    subgraphs = {g["id"]: g for g in graphs if isinstance(g, dict) and isinstance(g.get("id"), str)}
    waiting = [("", "", workflow, False, 0)]  # path, name of the graph, graph, keep nothing, depth
    while waiting and len(found) < _MOST_NODES:
        path, name, graph, keep_nothing, depth = waiting.pop()
        for node in _list(graph, "nodes"):
            if not isinstance(node, dict) or "id" not in node:
                continue
            ours = _dict(_dict(node, "properties"), OURS)
            node_id, kind = f"{path}{node['id']}", node.get("type")
            nothing = keep_nothing or bool(ours.get("keep_nothing"))
            found[node_id] = Marks(ours.get("pin"), nothing, (name, str(node["id"])), kind)
            if isinstance(kind, str) and kind in subgraphs and depth < _DEEPEST:
                waiting.append((f"{node_id}:", kind, subgraphs[kind], nothing, depth + 1))
    return found


def pinned_in(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The inputs of the pinned nodes of a prepared request that it runs for, by their ids."""
    prompt, targets = request["prompt"], request.get("partial_execution_targets")
    asked = needed(prompt, targets) if isinstance(targets, list) else prompt.keys()
    nodes = {node_id: prompt[node_id] for node_id in asked}
    pinned = {i: n for i, n in nodes.items() if _dict(nodes, i).get("class_type") == PINNED_NODE}
    return {node_id: _dict(node, "inputs") for node_id, node in pinned.items()}


def needed(prompt: dict[str, Any], targets: list[Any]) -> set[str]:
    """The ids of these nodes of a prompt and of all that feeds them."""
    found: set[str] = set()
    waiting = [target for target in targets if isinstance(target, str)]
    while waiting:
        node_id = waiting.pop()
        if node_id in prompt and node_id not in found:
            found.add(node_id)
            links = [v for v in _dict(_dict(prompt, node_id), "inputs").values() if _is_link(v)]
            waiting += [link[0] for link in links]
    return found


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _prepared_node(
    node: Any, marks: Marks, uses: Counter[tuple[str, str] | None], private: bool
) -> Any:
    """One node of the prompt; the very same one if nothing is to be done with it."""
    if not isinstance(node, dict):
        return node
    if HOSTS_OWN in node:
        node = {name: value for name, value in node.items() if name != HOSTS_OWN}
    meta = _dict(node, "_meta")
    said = _dict(meta, OURS)
    reason = ""
    if private:
        reason = RUN_KEEPS_NOTHING
    elif marks.keep_nothing or said.get("keep_nothing"):
        reason = NODE_KEEPS_NOTHING
    if reason or OURS in meta or meta != node.get("_meta", meta):
        # What others wrote there is made what our nodes expect to read.
        noted = {**said, "keep_nothing": reason} if reason else said
        node = {**node, "_meta": {**meta, OURS: noted}}
    if said.get("pin") is not None:
        return {**node, "class_type": PINNED_NODE, "inputs": _inputs(said["pin"], "")}
    if marks.pin is None:
        return node
    problem = _problem_of(marks, uses, node.get("class_type"))
    return {**node, "class_type": PINNED_NODE, "inputs": _inputs(marks.pin, problem)}


def _problem_of(marks: Marks, uses: Counter[tuple[str, str] | None], class_type: Any) -> str:
    """Why a pin of the workflow is not that of the prompt's node; empty if it is."""
    if uses[marks.source] > 1:
        return (
            "This node is pinned in a sub-graph that is used more than once, where it has another "
            "value in each place. Unpin it."
        )
    if class_type in (marks.kind, PINNED_NODE):  # the latter in a request that is sent again
        return ""
    return (
        f"The pin belongs to a node {marks.kind}, and this one is a {class_type}: the prompt and "
        "the workflow of this request do not belong together. Unpin it, or send both of one graph."
    )


def _inputs(pin: Any, problem: str) -> dict[str, str]:
    """The inputs of the node that stands in for a pinned one."""
    content = _dict({"pin": pin}, "pin").get("content")
    if not is_key(content):
        problem = "The pin of this node cannot be read. Unpin it, and pin it again."
    return {"problem": problem} if problem else {"content": content}


def _without_run_mark(request: dict[str, Any]) -> dict[str, Any]:
    """The request without the mark of the run, which would be saved with the pictures."""
    data = _dict(request, "extra_data")
    info = _dict(data, "extra_pnginfo")
    workflow = _dict(info, "workflow")
    extra = _dict(workflow, "extra")
    ours = _dict(extra, OURS)
    if "keep_nothing" not in ours:
        return request
    rest = {name: value for name, value in ours.items() if name != "keep_nothing"}
    others = {name: value for name, value in extra.items() if name != OURS}
    extra = {**others, OURS: rest} if rest else others
    info = {**info, "workflow": {**workflow, "extra": extra}}
    return {**request, "extra_data": {**data, "extra_pnginfo": info}}


def _dict(value: Any, name: str) -> dict[str, Any]:
    """An entry of a dict if both are dicts; else an empty one."""
    inner = value.get(name) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _list(value: Any, name: str) -> list[Any]:
    inner = value.get(name) if isinstance(value, dict) else None
    return inner if isinstance(inner, list) else []
