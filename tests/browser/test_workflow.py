"""The bundled workflows in the real editor: opened, run, switched, translated and explained."""

from __future__ import annotations

import copy
import re
import uuid
from typing import Any

import pytest
from pack.demo.conversion import to_api
from pack.demo.server import LINK_NAME, Server
from pack.demo.substitutions import NUMBERS
from pack.tests.browser.editor import Editor
from pack.tests.conftest import ROOT
from playwright.sync_api import expect

STATUS = "$$node-text-preview"
Workflow = dict[str, Any]


def ids_of(workflow: Workflow, node_type: str) -> list[int]:
    """The ids of the nodes of a type, in the order of the file."""
    return [node["id"] for node in workflow["nodes"] if node["type"] == node_type]


def our_types(workflow: Workflow) -> list[str]:
    """The types of our nodes in the workflow."""
    types = {node["type"] for node in workflow["nodes"]}
    return sorted(t for t in types if t.startswith("QwenVRAM"))


def values(workflow: Workflow) -> dict[int, list[Any]]:
    """The widget values of every node that has any."""
    return {n["id"]: n["widgets_values"] for n in workflow["nodes"] if n.get("widgets_values")}


# ---------------------------------------------------------------------------------------- opening
def test_workflow_opens_as_it_was_saved_and_is_saved_and_converted_so(
    editor: Editor, bundled: Workflow, server: Server
) -> None:
    """All three of one opening: they only look, and to open it is what takes time."""
    editor.open(bundled)
    check_opened(editor, bundled)
    check_saved(editor, bundled)
    check_converted(editor, to_api(bundled, server.get_json("/object_info")))


def check_opened(editor: Editor, workflow: Workflow) -> None:
    """The nodes are those of the file with their values, and nothing is red."""
    nodes = editor.nodes()
    assert editor.complaint() == ""
    assert {i: n["type"] for i, n in nodes.items()} == {
        n["id"]: n["type"] for n in workflow["nodes"]
    }
    assert [n["type"] for n in nodes.values() if not n["registered"] or n["errors"]] == []
    assert {i: n["saved"] for i, n in nodes.items() if n["saved"]} == values(workflow)
    assert editor.problems == []


def check_saved(editor: Editor, workflow: Workflow) -> None:
    """What Save would write is the file again."""
    parts = ("nodes", "links", "groups")

    def read() -> list[Any]:
        saved = editor.saved()
        for node in saved["nodes"]:  # the frontend adds up heights: 350.00000000000006
            node["size"] = [round(side, 6) for side in node["size"]]
        return [saved[part] for part in parts]

    wanted = [workflow[part] for part in parts]
    for found, part in zip(editor.once(read, wanted), wanted, strict=True):
        assert found == part


def check_converted(editor: Editor, theirs: dict[str, Any]) -> None:
    """The frontend sends what comfy-cli makes of the file."""
    ours, theirs = (
        {i: (n["class_type"], n["inputs"]) for i, n in graph.items()}
        for graph in (editor.prompt(), theirs)
    )
    assert ours == theirs


@pytest.mark.parametrize("what", ["node", "model"])
def test_the_editor_would_complain(editor: Editor, workflow: Workflow, what: str) -> None:
    """Without this the check for no complaint could pass for having looked in the wrong place."""
    broken = copy.deepcopy(workflow)
    node = next(n for n in broken["nodes"] if n["type"] == "QwenVRAMLoadVAE")
    if what == "node":
        node["type"] = "QwenVRAMNoSuchNode"
    else:
        node["widgets_values"][0] = "no_such_file.safetensors"
        node["widgets_values_named"]["vae_name"] = "no_such_file.safetensors"
    editor.open(broken)
    assert editor.once(editor.complaint, lambda said: said != "") != ""


# ---------------------------------------------------------------------------------------- running
def test_run_button_makes_a_picture_and_the_nodes_say_how(
    editor: Editor, workflow: Workflow, server: Server
) -> None:
    # Other tests may have run the same loaders on this server.
    cleared = server.post_json("/qwen_vram/clear", {"level": "everything", "wait_seconds": 60})
    assert cleared["done"], cleared
    editor.open(workflow)
    editor.shrink()
    positive, negative = ids_of(workflow, "QwenVRAMCachedTextEncode")
    editor.set_widgets({str(positive): {"text": f"a new prompt {uuid.uuid4()}"}})

    first = editor.run()
    assert first.status == "execution_success", first.detail
    (save,) = ids_of(workflow, "SaveImage")
    assert editor.picture(save) == [NUMBERS["width"], NUMBERS["height"]]
    assert editor.widgets(positive)[STATUS].startswith("miss: new text, encoded in ")
    for kind in ("DiffusionModel", "TextEncoder", "VAE"):
        (loader,) = ids_of(workflow, f"QwenVRAMLoad{kind}")
        assert re.match(r"\d+\.\d MB · \S+ · cpu · ", editor.widgets(loader)[STATUS])

    (sampler,) = ids_of(workflow, "KSampler")
    second = editor.run()
    assert second.status == "execution_success", second.detail
    assert sampler in second.executed, "randomize did not give the second run a new seed"
    encoding = {positive, negative, *ids_of(workflow, "QwenVRAMLoadTextEncoder")}
    assert encoding <= second.cached
    assert not encoding & second.executed
    assert (
        editor.widgets(positive)[STATUS] == "not run: not needed, or ComfyUI still had the result"
    )
    assert editor.problems == []


def test_lightning_switch_alone_decides_whether_the_lora_runs(
    editor: Editor, workflow: Workflow
) -> None:
    editor.open(workflow)
    editor.shrink(steps=2, width=128, height=128)
    (switch,), (lora,) = (
        ids_of(workflow, "PrimitiveBoolean"),
        ids_of(workflow, "LoraLoaderModelOnly"),
    )
    ran = {}
    for on in (False, True):
        editor.set_widgets({str(switch): {"value": on}})
        ran[on] = editor.run()
        assert ran[on].status == "execution_success", ran[on].detail
    assert lora not in ran[False].executed | ran[False].cached
    assert lora in ran[True].executed


# ------------------------------------------------------------------------------- words and pictures
def test_template_browser_has_them_with_their_pictures(server: Server) -> None:
    listed = server.get_json("/api/workflow_templates")[LINK_NAME]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    for name in listed:
        picture = server.get(f"/api/workflow_templates/{LINK_NAME}/{name}.jpg")
        assert picture[:3] == b"\xff\xd8\xff"


def test_help_pages_are_served(server: Server, workflow: Workflow) -> None:
    folder = ROOT / "js" / "docs"
    pages = {page.relative_to(folder).as_posix(): page for page in folder.rglob("*.md")}
    assert {f"{node_type}.md" for node_type in our_types(workflow)} <= pages.keys()
    for name, page in pages.items():
        assert server.get(f"/extensions/{LINK_NAME}/docs/{name}") == page.read_bytes()


HELP = ".node-help-content"


def heading(page: str) -> str:
    """The first heading of a help page."""
    return next(line.lstrip("# ") for line in page.splitlines() if line.startswith("#"))


def open_help(editor: Editor, node_id: int) -> None:
    """Clicks on the info button of a selected node, and waits for a page in the panel."""
    editor.page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node_id)
    editor.page.get_by_test_id("info-button").click()
    editor.page.locator(HELP).locator("h1, h2").first.wait_for()


def test_help_panel_shows_the_page(editor: Editor, workflow: Workflow) -> None:
    editor.open(workflow)
    (loader,) = ids_of(workflow, "QwenVRAMLoadTextEncoder")
    page = (ROOT / "js" / "docs" / "QwenVRAMLoadTextEncoder.md").read_text(encoding="utf-8")
    open_help(editor, loader)
    expect(editor.page.locator(HELP)).to_contain_text(heading(page))
