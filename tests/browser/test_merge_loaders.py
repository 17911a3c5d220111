"""Merge duplicate loaders in the real editor: links, titles, groups, sub-graphs, and one undo."""

from __future__ import annotations

import copy
import importlib.resources
import io
import json
from typing import Any

import PIL.Image
from pack.demo.server import Result, Server
from pack.demo.substitutions import substitute
from pack.tests import official
from pack.tests.browser.editor import Editor

Workflow = dict[str, Any]
MERGE = "() => app.extensionManager.command.execute('QwenVRAM.MergeLoaders')"
CLEAR_TOASTS = "() => app.extensionManager.toast.removeAll()"
UNDO_STEPS = "() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
REROUTE = """id => {
    const link = app.graph.getLink(app.graph.getNodeById(id).inputs[0].link);
    app.graph.createReroute([440, 300], link);
}"""
FREE = {"unload_models": True, "free_memory": True}
LOADER, NAMED, MUTED, ALONE = 2, 100, 101, 102  # text encoder loaders of the bundled workflow
POSITIVE, NEGATIVE = 4, 5
SUBGRAPH_LOADER, SUBGRAPH_COPY, SUBGRAPH_NEGATIVE = 219, 900, 228  # of the official template


def twice(workflow: Workflow) -> Workflow:
    """The bundled workflow with three more text encoder loaders: named, muted, in a group alone."""
    workflow = copy.deepcopy(workflow)
    loader = next(n for n in workflow["nodes"] if n["id"] == LOADER)
    for at, node_id in enumerate((NAMED, MUTED, ALONE)):
        more = {**copy.deepcopy(loader), "id": node_id, "pos": [-1000, 400 * at]}
        more["outputs"][0]["links"] = []
        workflow["nodes"].append(more)
    named, muted, _ = workflow["nodes"][-3:]
    named["title"], muted["mode"] = "My encoder", 2
    link = next(x for x in workflow["links"] if x[3] == NEGATIVE)
    link[1] = NAMED
    loader["outputs"][0]["links"].remove(link[0])
    named["outputs"][0]["links"].append(link[0])
    box = {"bounding": [-1010, 720, 500, 300], "color": "#444", "flags": {}}
    workflow["groups"].append({"id": 90, "title": "Alone", **box})
    workflow["last_node_id"] = ALONE
    return workflow


def without_view(saved: Workflow) -> Workflow:
    """What is in the file but for where the editor looked."""
    extra = {k: v for k, v in saved["extra"].items() if k != "ds"}
    return {**saved, "extra": extra}


def saved(editor: Editor, wanted: Workflow) -> Workflow:
    """The graph as Save would write it, once it is the wanted one."""
    return editor.once(lambda: without_view(editor.saved()), without_view(wanted))


def merge(editor: Editor) -> str:
    """Run the command and return what its toast says."""
    editor.dismiss()
    editor.page.evaluate(MERGE)
    text = editor.page.locator(".p-toast-detail").first.inner_text()
    editor.page.evaluate(CLEAR_TOASTS)
    editor.settle()
    return text


def undo(editor: Editor) -> None:
    """As a user: Ctrl+Z over the canvas, in whose next pictures switches find their types again."""
    editor.press_and_load("Control+z")


def test_merged_tidily_and_undone_in_one_step(editor: Editor, workflow: Workflow) -> None:
    editor.open(twice(workflow))
    editor.page.evaluate(REROUTE, POSITIVE)
    editor.settle()
    before = editor.saved()
    steps = editor.page.evaluate(UNDO_STEPS)

    text = merge(editor)
    assert "3 loaders are now one" in text and '"My encoder"' in text
    assert 'Empty now, and left where they are: group "Alone".' in text
    after = editor.saved()
    ids = {n["id"] for n in after["nodes"]}
    assert ids == {n["id"] for n in before["nodes"]} - {LOADER, ALONE}
    inputs = editor.prompt()
    assert [inputs[str(i)]["inputs"]["clip"] for i in (POSITIVE, NEGATIVE)] == [["100", 0]] * 2
    assert after["groups"] == before["groups"]
    (way,) = after["extra"]["reroutes"]  # the way of the link is kept
    (extension,) = after["extra"]["linkExtensions"]
    assert way["pos"] == [440, 300] and way["linkIds"] == [extension["id"]]
    assert editor.page.evaluate(UNDO_STEPS) == steps + 2  # the reroute, and all of the merge

    undo(editor)
    assert saved(editor, before) == without_view(before)
    editor.press_and_load("Control+y")
    assert saved(editor, after) == without_view(after)
    assert merge(editor).startswith("Nothing to merge")
    assert without_view(editor.saved()) == without_view(after)
    assert editor.problems == []


BREAK = """() => {
    const { prototype } = app.graph.constructor;
    const remove = prototype.remove;
    let left = 1;
    prototype.remove = function (node) {
        if (left-- <= 0) throw new Error('odd');
        return remove.call(this, node);
    };
    window.mend = () => { prototype.remove = remove; };
}"""


def test_what_app_mode_shows_stays_and_an_error_tells_what_was_done(
    editor: Editor, workflow: Workflow
) -> None:
    shown = twice(workflow)
    shown["extra"]["linearData"] = {"inputs": [[ALONE, "clip_name"]], "outputs": []}
    editor.open(shown)
    assert "3 loaders are now one" in merge(editor)
    assert editor.nodes().keys() & {LOADER, NAMED, ALONE} == {ALONE}

    editor.open(twice(workflow))
    before = editor.saved()
    editor.page.evaluate(BREAK)
    try:
        text = merge(editor).splitlines()
    finally:
        editor.page.evaluate("() => window.mend()")
    assert text[0] == "Merging was broken off by an error: odd"
    assert "2 loaders are now one" in text[1] and text[-1].startswith("Undo takes back in one step")
    undo(editor)
    assert saved(editor, before) == without_view(before)
    editor.page.evaluate("() => { app.graphToPrompt = () => { throw new Error('broken'); }; }")
    try:
        text = merge(editor)
    finally:
        editor.page.evaluate("() => { delete app.graphToPrompt; }")
    assert "3 loaders are now one" in text and "cannot be read (broken)" in text
    assert editor.problems == []


def template_with_copy() -> Workflow:
    """The official 2512 template; the negative prompt in its sub-graph has a loader of its own."""
    folder = importlib.resources.files("comfyui_workflow_templates_json") / "templates"
    name = "image_qwen_Image_2512.json"
    workflow = json.loads((folder / name).read_text(encoding="utf-8"))
    (graph,) = workflow["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    more = {**copy.deepcopy(nodes[SUBGRAPH_LOADER]), "id": SUBGRAPH_COPY, "pos": [-950, 1370]}
    more["inputs"][0]["link"], more["outputs"][0]["links"] = SUBGRAPH_COPY, []
    graph["nodes"].append(more)
    link = next(x for x in graph["links"] if x["target_id"] == SUBGRAPH_NEGATIVE)
    link["origin_id"] = SUBGRAPH_COPY
    nodes[SUBGRAPH_LOADER]["outputs"][0]["links"].remove(link["id"])
    more["outputs"][0]["links"].append(link["id"])
    slot = next(i for i, x in enumerate(graph["inputs"]) if x["name"] == "clip_name")
    way = {"id": SUBGRAPH_COPY, "origin_id": -10, "origin_slot": slot, "type": "COMBO"}
    graph["links"].append({**way, "target_id": SUBGRAPH_COPY, "target_slot": 0})
    graph["inputs"][slot]["linkIds"].append(SUBGRAPH_COPY)
    graph["state"].update(lastNodeId=SUBGRAPH_COPY, lastLinkId=SUBGRAPH_COPY)
    return workflow


def pixels(result: Result) -> bytes:
    """The picture of a run without its metadata, which tell of the graph."""
    return PIL.Image.open(io.BytesIO(result.images[0].content)).convert("RGB").tobytes()


def drawn(editor: Editor, server: Server) -> tuple[bytes, list[str], list[str]]:
    """Run the open workflow small with nothing known: the picture, text encoder loaders, those that ran.

    Of two equal loaders ComfyUI itself runs one, unless it was started with --cache-none.
    """
    prompt = substitute(editor.prompt(), official.FILES)
    for node in prompt.values():
        node["_meta"]["qwen_vram"] = {"keep_nothing": "the loaders must run"}
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = 7
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = 2  # steps
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"].update(width=64, height=64)
    server.post_json("/free", FREE)
    result = server.submit(prompt)
    assert result.status == "success", result.error
    loaders = [i for i in prompt if prompt[i]["class_type"] == "CLIPLoader"]
    return pixels(result), loaders, [i for i in result.executed if i in loaders]


def test_in_a_subgraph_and_the_picture_stays(editor: Editor, official_names: Server) -> None:
    editor.open(template_with_copy())
    before = editor.saved()
    picture, loaders, _ = drawn(editor, official_names)
    assert len(loaders) == 2

    text = merge(editor)
    assert "qwen_2.5_vl_7b" in text or "Load CLIP" in text
    same, loaders, ran = drawn(editor, official_names)
    assert len(loaders) == 1 and ran == loaders
    assert same == picture
    undo(editor)
    assert saved(editor, before) == without_view(before)
    assert editor.problems == []
