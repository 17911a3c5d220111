"""Faster edits in the real frontend: the workflows, and what its speed nodes say of a run."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import pytest
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_sampler import SAVED
from pack.tests.browser.test_workflow import STATUS, ids_of
from pack.tests.conftest import ROOT
from PIL import Image

CACHE, ATTENTION, EXIT = "QwenVRAMReferenceCache", "QwenVRAMAttention", "QwenVRAMEarlyExit"


@pytest.fixture(scope="module")
def fast() -> dict[str, Any]:
    """The bundled workflow."""
    path = ROOT / "workflows" / "qwen_image_edit_fast.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_shows_what_was_reused_and_how_it_converged(
    editor: Editor, fast: dict[str, Any]
) -> None:
    editor.open(fast)
    editor.shrink()
    ids = {kind: ids_of(fast, kind)[0] for kind in (CACHE, ATTENTION, EXIT)}
    # Behind another loader or with other settings, other tests may have left results.
    editor.set_widgets({str(ids[CACHE]): {"full_last_steps": 2}})
    first = editor.run()
    assert first.status == "execution_success", first.detail
    assert set(ids.values()) <= first.executed

    def reused() -> int:
        line = editor.widgets(ids[CACHE])[STATUS]
        found = re.match(r"reused in (\d) of 8 steps · .+ \d+\.\d MB ", line)
        assert found, line
        return int(found[1])

    assert 1 <= reused() <= 5  # never the first step, nor the last two
    assert editor.widgets(ids[ATTENTION])[STATUS].startswith("auto: ")
    assert editor.widgets(ids[EXIT])[STATUS].startswith("all 8 steps · lowest change ")
    width, height = editor.picture(ids[EXIT])
    assert width > 300 and height > 300
    (save,) = ids_of(fast, "SaveImage")
    editor.picture(save)
    encoded = editor.page.evaluate(SAVED, save)
    told = json.loads(Image.open(io.BytesIO(base64.b64decode(encoded))).info["qwen_vram"])
    assert {str(number) for number in ids.values()} <= told.keys()
    assert told[str(ids[CACHE])]["steps_reused"] == reused()

    second = editor.run()  # another seed: only the sampler runs, and they tell of it
    assert second.status == "execution_success", second.detail
    assert not set(ids.values()) & second.executed
    assert "not in the picture's metadata" not in editor.widgets(ids[CACHE])[STATUS]
    assert reused() and editor.picture(ids[EXIT]) == [width, height]
    assert editor.problems == []
