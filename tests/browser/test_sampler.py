"""The sampler within VRAM in the real frontend: in a KSampler's place, and in the picture."""

from __future__ import annotations

import base64
import copy
import io
import json
from typing import Any

import pytest
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_workflow import STATUS, ids_of
from PIL import Image

OWN = {"policy": "exact only", "vram_limit": 0, "settings": "0: 20, 5, ddim"}
SAVED = """async (id) => {
    const image = app.graph.getNodeById(id).imgs[0].src.replace(/&preview=[^&]*/, '');
    const bytes = new Uint8Array(await (await fetch(image)).arrayBuffer());
    return btoa(String.fromCharCode(...bytes));
}"""
DROP = """async (encoded) => {
    const bytes = Uint8Array.from(atob(encoded), c => c.charCodeAt(0));
    await app.handleFile(new File([bytes], 'saved.png', { type: 'image/png' }));
}"""


def types_in(saved: dict[str, Any]) -> dict[int, str]:
    """The type of each node."""
    return {node["id"]: node["type"] for node in saved["nodes"]}


@pytest.fixture
def ours(workflow: dict[str, Any]) -> dict[str, Any]:
    """The bundled workflow with our sampler in the KSampler's place."""
    changed = copy.deepcopy(workflow)
    (sampler,) = (node for node in changed["nodes"] if node["type"] == "KSampler")
    sampler["type"] = "QwenVRAMSampler"
    sampler["size"] = [300, 420]
    sampler["widgets_values"] += OWN.values()
    sampler["widgets_values_named"] |= OWN
    sampler["outputs"].append({"name": "report", "type": "STRING", "links": None})
    return changed


def test_a_saved_picture_tells_what_was_done_and_opens_as_its_workflow(
    editor: Editor, ours: dict[str, Any]
) -> None:
    editor.open(ours)
    assert editor.complaint() == ""
    editor.shrink(steps=2, width=128, height=128)
    (sampler,) = ids_of(ours, "QwenVRAMSampler")
    (save,) = ids_of(ours, "SaveImage")
    ran = editor.run()
    assert ran.status == "execution_success", ran.detail
    assert editor.widgets(sampler)[STATUS] == "as asked (exact)"
    editor.picture(save)
    encoded = editor.page.evaluate(SAVED, save)
    written = Image.open(io.BytesIO(base64.b64decode(encoded))).info
    said = json.loads(written["qwen_vram"])[str(sampler)]
    assert said["done"] == "as asked" and said["forward_passes_repeated"] == 0

    before = editor.saved()
    editor.tidy()
    editor.page.evaluate(DROP, encoded)
    again = editor.once(editor.saved, lambda saved: types_in(saved) == types_in(before))
    assert types_in(again) == types_in(before)
    assert again["links"] == before["links"]
    assert editor.widgets(sampler)["policy"] == "exact only"
    assert editor.problems == []
