"""Every workflow of the repository in the real editor, run to its end: nothing overlaps or is red."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pack.demo import serving
from pack.tests.browser.editor import Editor
from pack.tests.conftest import ROOT
from pack.tests.static.test_workflows import TITLE_HEIGHT, Box, apart, within

SHIPPED = sorted((ROOT / "workflows").glob("*.json"))
TINY = sorted(serving.WORKFLOWS.glob("*.json"))
DRAWN = """() => app.graph.nodes.map(n => ({
    id: Number(n.id), title: n.title, box: [...n.pos, ...n.size].map(Math.round),
    red: Boolean(n.has_errors),
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
SCALE, EDGE, BARS = 0.75, 30, 110  # of a screenshot; pixels around, and of the editor's own bars
ROOM = (1200, 700)  # of the page


def show_all(editor: Editor, room: tuple[float, float], scale: float | None = None) -> None:
    """Moves the view so that the whole graph is in it: what is outside is not drawn at all."""
    left, top, right, bottom = editor.page.evaluate(LARGEST)
    scale = scale or min(room[0] / (right - left), room[1] / (bottom - top))
    corner = (EDGE + BARS) / scale
    editor.page.evaluate(LOOK, [scale, corner - left, corner - top])


def photograph(editor: Editor, name: str) -> None:
    """For people who want to look: only where QWEN_VRAM_SCREENSHOTS names a folder."""
    folder = os.environ.get("QWEN_VRAM_SCREENSHOTS")
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


def card(box: list[float]) -> Box:
    """What a node covers, its title bar included."""
    x, y, width, height = box
    return (x, y - TITLE_HEIGHT, width, height + TITLE_HEIGHT)


def check_layout(workflow: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
    """With their lines, nodes are as large as in the file, and lie apart and in their groups."""
    assert [node["title"] for node in drawn if node["red"]] == []
    saved = {node["id"]: [*node["pos"], *node["size"]] for node in workflow["nodes"]}
    assert {node["id"]: node["box"] for node in drawn} == saved
    cards = {node["id"]: card(node["box"]) for node in drawn}
    assert [(a, b) for a, b in combinations(cards, 2) if not apart(cards[a], cards[b])] == []
    for group in workflow["groups"]:
        area = tuple(group["bounding"])
        assert all(apart(c, area) or within(c, area) for c in cards.values())


@pytest.mark.parametrize("path", [*SHIPPED, *TINY], ids=lambda path: path.stem)
def test_it_runs_to_its_end_and_looks_as_it_was_laid_out(editor: Editor, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    editor.open(workflow)
    assert editor.complaint() == ""
    if path in SHIPPED:
        editor.shrink()
    show_all(editor, ROOM)
    ran = editor.run()
    assert ran.status == "execution_success", ran.detail
    assert editor.complaint() == ""
    for node in workflow["nodes"]:
        if node["type"] == "SaveImage":
            assert min(editor.picture(node["id"])) >= 256
    check_layout(workflow, editor.page.evaluate(DRAWN))
    photograph(editor, path.stem)
    assert editor.problems == []
