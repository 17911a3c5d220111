"""Every workflow of the repository in the real editor, run to its end: nothing overlaps or is red."""

from __future__ import annotations

import io
import json
import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from pack.demo import classifier, serving, thumbnails
from pack.demo.figures import to_tensor
from pack.demo.server import Server
from pack.demo.substitutions import NUMBERS, substitute
from pack.tests.browser.editor import Editor
from pack.tests.conftest import ROOT
from pack.tests.static.test_workflows import TITLE_HEIGHT, Box, apart, within
from PIL import Image

SHIPPED = sorted((ROOT / "workflows").glob("*.json"))
TINY = sorted(serving.WORKFLOWS.glob("*.json"))
# tests/server/test_demo.py runs the others; here one whose lines are as long as they can be.
TINY_RUN = "qwen_image_edit_fast_tiny"
SHOWS = {  # by the words of demo/thumbnails.py
    "cute_animal_for_kids": {"animal": "bear", "accessory": "scarf"},
    "qwen_image_2512": {"animal": "bunny", "colour": "blue", "background": "snow"},
    "qwen_image_2512_low_vram": {"animal": "pig", "colour": "pink", "background": "beach"},
    "qwen_image_edit_2511": {"animal": "pig", "colour": "blue", "background": "snow"},
    "qwen_image_edit_fast": {"animal": "pig", "background": "beach"},
    "qwen_image_edit_tiled": {"animal": "bear", "colour": "blue", "background": "meadow"},
    TINY_RUN: {"animal": "pig", "colour": "blue", "background": "snow"},
}
STEPS = 4  # half of the table's: what was asked for is seen as well
COLOURS = {"cute_animal_page": 2}  # of a page: black and white; of all other pictures:
MANY_COLOURS = 200
STATUS, TILES = "$$node-text-preview", re.compile(r"(\d+) of (\d+) tiles edited")
SCREENSHOTS = "QWEN_VRAM_SCREENSHOTS"
SOURCE = "id => app.graph.getNodeById(id).imgs[0].src"
DRAWN = """() => app.graph.nodes.map(n => ({
    id: Number(n.id), title: n.title, box: [...n.pos, ...n.size].map(Math.round),
    red: Boolean(n.has_errors),
    badges: n.badges.some(b => (typeof b === 'function' ? b() : b).visible),
}))"""
LARGEST = """() => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map(n => [...n.pos, ...n.size]);
    const least = i => Math.min(...boxes.map(b => b[i]));
    const most = i => Math.max(...boxes.map(b => b[i] + b[i + 2]));
    return [least(0), least(1), most(0), most(1)];
}"""
LOOK = """([scale, x, y]) => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [x, y];
    app.canvas.setDirty(true, true);
}"""
BADGE_HEIGHT = 24  # of what is drawn above a title
SCALE, EDGE, BARS = 0.75, 30, 110  # of a screenshot; pixels around, and of the editor's own bars
ROOM = (1200, 700)  # of the page


def show_all(editor: Editor, room: tuple[float, float], scale: float | None = None) -> None:
    """Moves the view so that the whole graph is in it: what is outside is not drawn at all."""
    left, top, right, bottom = editor.page.evaluate(LARGEST)
    scale = scale or min(room[0] / (right - left), room[1] / (bottom - top))
    corner = (EDGE + BARS) / scale
    editor.page.evaluate(LOOK, [scale, corner - left, corner - top])
    editor.settle()


def photograph(editor: Editor, name: str) -> None:
    """For people who want to look: only where QWEN_VRAM_SCREENSHOTS names a folder."""
    folder = os.environ.get(SCREENSHOTS)
    if folder is None:
        return
    page, usual = editor.page, editor.page.viewport_size
    left, top, right, bottom = page.evaluate(LARGEST)
    width, height = ((b - a) * SCALE + 2 * EDGE for a, b in ((left, right), (top, bottom)))
    page.set_viewport_size({"width": int(width) + BARS, "height": int(height) + 2 * BARS})
    editor.dismiss()
    show_all(editor, (width, height), SCALE)
    page.wait_for_timeout(1000)
    page.screenshot(path=f"{folder}/{name}.png")
    page.set_viewport_size(usual)


def card(node: dict[str, Any]) -> Box:
    """What a node covers, its title bar and badges included."""
    x, y, width, height = node["box"]
    above = TITLE_HEIGHT + (BADGE_HEIGHT if node["badges"] else 0)
    return (x, y - above, width, height + above)


def check_layout(workflow: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
    """With their lines, nodes are as large as in the file, and lie apart and in their groups."""
    assert [node["title"] for node in drawn if node["red"]] == []
    saved = {node["id"]: [*node["pos"], *node["size"]] for node in workflow["nodes"]}
    assert {node["id"]: node["box"] for node in drawn} == saved
    cards = {node["id"]: card(node) for node in drawn}
    assert [(a, b) for a, b in combinations(cards, 2) if not apart(cards[a], cards[b])] == []
    for group in workflow["groups"]:
        area = tuple(group["bounding"])
        assert all(apart(c, area) or within(c, area) for c in cards.values())


def ask_for_what_it_knows(editor: Editor, name: str) -> None:
    """Sets the words, pictures and files of the thumbnail, so that a picture can be judged."""
    with mock.patch.dict(NUMBERS, steps=STEPS):
        recipe, small = thumbnails.RECIPES[name], substitute(editor.prompt())
    picture = {"image": recipe.before} if recipe.before else {}
    thumbnails._write(small, {**recipe.runs[0], **picture})
    editor.set_widgets({node_id: node["inputs"] for node_id, node in small.items()})


def shown(editor: Editor, server: Server, node_id: int) -> Image.Image:
    """The picture on a node, as the server has it."""
    editor.picture(node_id)
    source = editor.page.evaluate(SOURCE, node_id)
    return Image.open(io.BytesIO(server.get(source.removeprefix(editor.url)))).convert("RGB")


def check_pictures(editor: Editor, server: Server, workflow: dict[str, Any], name: str) -> None:
    """None is empty, and the first shows what was asked for."""
    saving = [node for node in workflow["nodes"] if node["type"] == "SaveImage"]
    pictures = [shown(editor, server, node["id"]) for node in saving]
    for node, picture in zip(saving, pictures, strict=True):
        assert min(picture.size) >= 256
        least = COLOURS.get(node["widgets_values"][0], MANY_COLOURS)
        assert len(picture.getcolors(picture.width * picture.height)) >= least
    found = classifier.seen(classifier.load(), to_tensor([np.asarray(pictures[0])]))[0]
    wanted = SHOWS.get(name, {})  # of the tiny ones, one
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("path", [*SHIPPED, *TINY], ids=lambda path: path.stem)
def test_it_draws_what_is_asked_for_and_looks_as_it_was_laid_out(
    editor: Editor, server: Server, path: Path
) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    editor.open(workflow)
    assert editor.complaint() == ""
    if path in SHIPPED:
        ask_for_what_it_knows(editor, path.stem)
    show_all(editor, ROOM)
    if path in SHIPPED or path.stem == TINY_RUN or SCREENSHOTS in os.environ:
        ran = editor.run()
        assert ran.status == "execution_success", ran.detail
        assert editor.complaint() == ""
        check_pictures(editor, server, workflow, path.stem)
    if path.stem == "qwen_image_edit_tiled":
        (edit,) = (n["id"] for n in workflow["nodes"] if n["type"] == "QwenVRAMTiledEdit")
        widgets = editor.widgets(edit)
        done = TILES.match(widgets[STATUS])
        assert widgets["guide"] and done, widgets
        assert int(done[1]) >= 1 and int(done[2]) > 1
    check_layout(workflow, editor.page.evaluate(DRAWN))
    photograph(editor, path.stem)
    assert editor.problems == []
