"""The ready-made subgraphs in the real editor: found, placed, run, converted and unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pack.demo.conversion import to_api
from pack.demo.server import LINK_NAME, Server
from pack.tests.browser.editor import Editor
from pack.tests.conftest import ROOT

SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
SMALL = {"width": 256, "height": 256, "megapixels": 0.06, "value": True}  # value: Lightning
# Whatever ends in it: a picture to save, and pictures to begin with.
WIRE = """(id) => {
    const node = app.graph.getNodeById(id);
    const add = (type, x) => {
        const made = LiteGraph.createNode(type);
        app.graph.add(made);
        made.pos = [node.pos[0] + x, node.pos[1]];
        return made;
    };
    const save = add('SaveImage', 500);
    node.connect(node.outputs.findIndex(o => o.type === 'IMAGE'), save, 0);
    const picture = node.inputs.findIndex(i => i.type === 'IMAGE');
    if (picture >= 0) {
        const load = add('LoadImage', -400);
        load.widgets.find(w => w.name === 'image').value = 'example.png';
        load.connect(0, node, picture);
    }
    return Number(save.id);
}"""
TITLE = "id => app.graph.getNodeById(id).title"
# What the frontend says of each input that nothing outside is linked to.
UNLINKED = {"Missing Link ID when unpacking"}
UNPACK = """(id) => {
    app.graph.unpackSubgraph(app.graph.getNodeById(id));
}"""

each_subgraph = pytest.mark.parametrize("path", SUBGRAPHS, ids=lambda path: path.stem)


def definition(path: Path) -> dict[str, Any]:
    """What is inside."""
    (found,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    return found


def plain(prompt: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """A prompt without titles."""
    return {i: (node["class_type"], node["inputs"]) for i, node in prompt.items()}


def wired(prompt: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The nodes of a prompt, each with the inputs that are linked."""
    nodes = prompt.values()
    return sorted(
        (n["class_type"], sorted(k for k, v in n["inputs"].items() if isinstance(v, list)))
        for n in nodes
    )


def place(editor: Editor, name: str) -> int:
    """Takes a subgraph from the node library, as a hand would; the id of the node."""
    page = editor.page
    page.keyboard.press("n")
    page.get_by_placeholder("Search...").first.fill(name)
    page.get_by_text(name, exact=True).first.click()
    page.mouse.move(900, 300)
    page.mouse.click(900, 300)
    page.wait_for_function("() => app.graph.nodes.length === 1")
    page.keyboard.press("Escape")
    return next(iter(editor.nodes()))


def test_the_server_offers_them(server: Server) -> None:
    offered = server.get_json("/global_subgraphs").values()
    ours = [entry["name"] for entry in offered if LINK_NAME in entry["info"]["node_pack"]]
    assert sorted(ours) == [path.stem for path in SUBGRAPHS]


@each_subgraph
def test_it_is_placed_run_and_unpacked(editor: Editor, server: Server, path: Path) -> None:
    editor.tidy()
    inside = definition(path)
    node_id = place(editor, path.stem)
    assert editor.page.evaluate(TITLE, node_id) == path.stem
    editor.set_widgets({str(node_id): SMALL})
    save = editor.page.evaluate(WIRE, node_id)

    ran = editor.run()
    assert ran.status == "execution_success", ran.detail
    assert max(editor.picture(save)) == 256
    assert plain(editor.prompt()) == plain(to_api(editor.saved(), server.get_json("/object_info")))
    assert editor.problems == []

    before = wired(editor.prompt())
    editor.page.evaluate(UNPACK, node_id)
    assert wired(editor.prompt()) == before
    assert inside["id"] not in {node["type"] for node in editor.nodes().values()}
    assert {problem.partition(" (")[0] for problem in editor.problems} <= UNLINKED
