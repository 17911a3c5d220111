"""Tiled Edit in the real frontend: the bundled workflow on a picture of several tiles."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pack.demo.animals import draw
from pack.demo.server import Server
from pack.demo.serving import SCENE
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_workflow import STATUS, ids_of
from pack.tests.conftest import ROOT

PHOTO, WIDTH, HEIGHT = "several_tiles.png", 352, 288
REPORT = """(id) => (app.graph.getNodeById(id).widgets ?? [])
    .map(w => w.value).filter(v => typeof v === 'string').join('\\n')"""


@pytest.fixture(scope="module")
def tiled(server: Server) -> dict[str, Any]:
    """The bundled workflow, and a photo that no single tile covers."""
    draw(SCENE, WIDTH, HEIGHT).save(server.base / "input" / PHOTO)
    path = ROOT / "workflows" / "qwen_image_edit_tiled.json"
    return json.loads(path.read_text(encoding="utf-8"))


def only(workflow: dict[str, Any], node_type: str) -> int:
    """The id of the only node of a type."""
    (found,) = ids_of(workflow, node_type)
    return found


def test_it_edits_in_the_size_of_the_photo_and_shows_the_plan(
    editor: Editor, tiled: dict[str, Any]
) -> None:
    editor.open(tiled)
    editor.shrink()
    edit, photo = only(tiled, "QwenVRAMTiledEdit"), only(tiled, "LoadImage")
    small = {"instruction": "make it blue", "steps": 1, "cfg": 1.0, "skip_threshold": 0.0}
    editor.set_widgets({str(photo): {"image": PHOTO}, str(edit): small})
    ran = editor.run()
    assert ran.status == "execution_success", ran.detail
    assert editor.picture(only(tiled, "SaveImage")) == [WIDTH, HEIGHT]
    assert editor.picture(only(tiled, "MaskPreview")) == [WIDTH, HEIGHT]
    assert max(editor.picture(only(tiled, "PreviewImage"))) == 1024  # drawn large, to be read
    assert "4 tiles" in editor.widgets(edit)[STATUS]
    shown = editor.once(
        lambda: editor.page.evaluate(REPORT, only(tiled, "PreviewAny")),
        lambda text: "4 tiles" in text,
    )
    assert "4 tiles" in shown
    assert editor.problems == []
