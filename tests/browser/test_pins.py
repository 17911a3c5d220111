"""Pin output in the real editor: by the menu, saved with the workflow, undone; and a private run."""

from __future__ import annotations

import io
import re
import time
import urllib.parse
import uuid
from typing import Any

import PIL.Image
import pytest
from pack.demo.server import Server
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_cache_panel import close_dialogs, open_panel, screenshot
from pack.tests.browser.test_workflow import STATUS, ids_of
from pack.tests.graphs import text_to_image
from playwright.sync_api import expect

Workflow = dict[str, Any]
PINNED = "id => Boolean(app.graph.getNodeById(id).properties.qwen_vram?.pin)"
BADGES = """id => app.graph.getNodeById(id).badges
    .map(badge => (typeof badge === 'function' ? badge() : badge.value ?? badge).text)"""
MARKED_STATES = """() => {
    const { activeState, undoQueue } = app.extensionManager.workflow.activeWorkflow.changeTracker;
    return [activeState, ...undoQueue].some(state => state.extra?.qwen_vram);
}"""
PLACE = """id => {
    const node = app.graph.getNodeById(id), canvas = app.canvas;
    canvas.centerOnNode(node);
    canvas.draw(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 14]);
    return [box.left + x, box.top + y];
}"""


def size_of(pin: dict[str, Any]) -> str:
    """As the badge writes the size of these small pins."""
    return f"{pin['bytes'] / 1e3:.1f} kB"


@pytest.fixture
def ready(editor: Editor, workflow: Workflow) -> Workflow:
    """The bundled workflow, small and with a fixed seed; its nodes by what they do."""
    editor.open(workflow)
    editor.shrink(steps=1, width=128, height=128)
    positive, negative = ids_of(workflow, "QwenVRAMCachedTextEncode")
    (sampler,), (save,) = ids_of(workflow, "KSampler"), ids_of(workflow, "SaveImage")
    (clip,) = ids_of(workflow, "QwenVRAMLoadTextEncoder")
    (latent,) = ids_of(workflow, "EmptySD3LatentImage")
    editor.set_widgets({str(sampler): {"control_after_generate": "fixed", "seed": 7}})
    names = ("positive", "negative", "sampler", "save", "clip", "latent")
    return dict(zip(names, (positive, negative, sampler, save, clip, latent), strict=True))


def badges(editor: Editor, node_id: int) -> list[str]:
    """What the badges of a node say; one that is not drawn is left out."""
    return [text for text in editor.page.evaluate(BADGES, node_id) if text]


def has_badge(editor: Editor, node_id: int, text: str, wanted: bool = True) -> None:
    """A badge of the node says this, or none, as soon as the page knows it."""
    told = editor.once(lambda: badges(editor, node_id), lambda told: (text in told) == wanted)
    assert (text in told) == wanted, told


def menu(editor: Editor, node_id: int, item: str) -> None:
    """Right-click a node and choose an item."""
    x, y = editor.page.evaluate(PLACE, node_id)
    editor.page.mouse.click(x, y, button="right")
    editor.page.get_by_text(item, exact=True).click()


def toast(editor: Editor, text: str) -> None:
    """Wait for a toast that has this text, and close all."""
    expect(editor.page.locator(".p-toast-detail", has_text=text).first).to_be_visible(
        timeout=60_000
    )
    editor.page.evaluate("() => app.extensionManager.toast.removeAll?.()")


def last_run(server: Server) -> dict[str, Any]:
    """What the host's history says about it, which ComfyUI writes after it told of the end."""
    while server.get_json("/queue")["queue_running"]:
        time.sleep(0.02)
    (entry,) = server.get_json("/history?max_items=1").values()
    return entry


def picture(editor: Editor, ids: dict[str, int], server: Server) -> bytes:
    """Run, and take the pixels of what was saved."""
    ran = editor.run()
    assert ran.status == "execution_success", ran.detail
    (image,) = last_run(server)["outputs"][str(ids["save"])]["images"]
    data = server.get(f"/view?{urllib.parse.urlencode(image)}")
    return PIL.Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_pinned_through_a_reload_and_a_change_until_unpinned(
    editor: Editor, ready, server: Server
) -> None:
    ids, positive = ready, ready["positive"]
    editor.set_widgets({str(positive): {"text": "a red bunny"}})
    first = picture(editor, ids, server)
    menu(editor, positive, "Pin output (Qwen VRAM)")
    toast(editor, "is pinned (")
    assert [
        b for b in editor.page.evaluate(BADGES, positive) if re.fullmatch(r"pinned \d.* [kM]B", b)
    ]

    saved = editor.saved()
    (mark,) = [n["properties"]["qwen_vram"]["pin"] for n in saved["nodes"] if n["id"] == positive]
    assert re.fullmatch("[0-9a-f]{64}", mark["content"]) and mark["types"] == ["CONDITIONING"]
    editor.start()
    editor.open(saved)
    has_badge(editor, positive, f"pinned {size_of(mark)}")

    editor.set_widgets({str(positive): {"text": "a blue fox at night"}})
    assert picture(editor, ids, server) == first
    changed = f"pinned {size_of(mark)} · values changed since"
    has_badge(editor, positive, changed)
    assert editor.widgets(positive)[STATUS] == "pinned: the values shown here are not used"
    menu(editor, positive, "Unpin output (Qwen VRAM)")
    pinned = editor.once(lambda: editor.page.evaluate(PINNED, positive), False)
    assert not pinned
    (properties,) = [n["properties"] for n in editor.saved()["nodes"] if n["id"] == positive]
    assert "qwen_vram" not in properties
    assert picture(editor, ids, server) != first
    assert editor.problems == []


def test_a_lost_pin_is_told_in_words_and_on_its_node(editor: Editor, ready, server: Server) -> None:
    positive = ready["positive"]
    menu(editor, positive, "Pin output (Qwen VRAM)")
    toast(editor, "is pinned (")
    panel = open_panel(editor)
    title = "Positive prompt · 正面提示词"
    row = panel.get_by_role("row").filter(has_text=title)
    panel.get_by_text("Last used").scroll_into_view_if_needed()
    screenshot(editor.page, "panel_pins")
    row.get_by_role("button", name="Delete").click()
    editor.page.get_by_text("Delete this pinned output?").wait_for()
    editor.page.get_by_role("button", name="Delete").last.click()
    panel.get_by_text("Removed: 1 pinned output.").wait_for()
    close_dialogs(editor.page)
    has_badge(editor, positive, "pin is missing")
    editor.page.get_by_test_id("queue-button").first.click()
    toast(editor, f'The pinned value of "{title}" is not on this machine')
    screenshot(editor.page, "pin_missing")
    menu(editor, positive, "Unpin output (Qwen VRAM)")
    has_badge(editor, positive, "pin is missing", False)
    assert editor.run().status == "execution_success"
    of_refusal = ("/api/prompt", "Prompt execution failed")  # which the console repeats
    assert [text for text in editor.problems if not any(t in text for t in of_refusal)] == []
    editor.problems.clear()


def test_undo_takes_a_pin_back(editor: Editor, ready) -> None:
    latent = ready["latent"]
    editor.page.evaluate(
        "() => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()"
    )
    menu(editor, latent, "Pin output (Qwen VRAM)")
    toast(editor, "is pinned (")
    assert editor.page.evaluate(PINNED, latent)
    editor.page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    editor.page.wait_for_function(f"id => !({PINNED})(id)", arg=latent)
    editor.page.evaluate("() => app.extensionManager.command.execute('Comfy.Redo')")
    editor.page.wait_for_function(PINNED, arg=latent)


def test_what_cannot_be_pinned_says_why(editor: Editor, ready) -> None:
    menu(editor, ready["clip"], "Pin output (Qwen VRAM)")
    toast(editor, "The output CLIP cannot be pinned: no exact copy of it can be kept.")
    assert not editor.page.evaluate(PINNED, ready["clip"])
    editor.page.evaluate("id => { app.graph.getNodeById(id).mode = 4; }", ready["latent"])
    menu(editor, ready["latent"], "Pin output (Qwen VRAM)")
    toast(editor, "It is not part of the run")
    assert [text for text in editor.problems if "/api/prompt" not in text] == []
    editor.problems.clear()  # the refusal itself, which the console repeats


def test_a_run_that_is_taken_out_of_the_queue_is_told(
    editor: Editor, ready, server: Server
) -> None:
    long = {"prompt": text_to_image(str(uuid.uuid4()), steps=10_000)}
    server.post_json("/prompt", long)
    menu(editor, ready["latent"], "Pin output (Qwen VRAM)")

    def pending() -> list[Any]:
        return server.get_json("/queue")["queue_pending"]

    ((_, waiting, *_),) = editor.once(pending, lambda queue: len(queue) == 1)
    server.post_json("/queue", {"delete": [waiting]})
    toast(editor, "no longer in ComfyUI's queue")
    server.post_json("/interrupt", {})
    assert not editor.page.evaluate(PINNED, ready["latent"])
    assert editor.problems == []


def test_several_selected_nodes_by_the_command(editor: Editor, ready) -> None:
    chosen = [ready["positive"], ready["negative"]]
    editor.page.evaluate(
        "ids => app.canvas.selectNodes(ids.map(id => app.graph.getNodeById(id)))", chosen
    )
    editor.page.evaluate("() => app.extensionManager.command.execute('QwenVRAM.PinOutput')")
    for node_id in chosen:
        assert editor.page.evaluate(PINNED, node_id)
    editor.page.evaluate("() => app.extensionManager.command.execute('QwenVRAM.UnpinOutput')")
    for node_id in chosen:
        assert not editor.page.evaluate(PINNED, node_id)
    assert editor.problems == []


def test_a_private_run_and_a_private_node(editor: Editor, ready, server: Server) -> None:
    positive, negative = ready["positive"], ready["negative"]
    texts = {str(positive): {"text": "never to be kept"}, str(negative): {"text": "nor this"}}
    editor.set_widgets(texts)
    editor.page.evaluate("() => { window.qwenVramEvents.length = 0; }")
    editor.page.evaluate("() => app.extensionManager.command.execute('QwenVRAM.QueuePrivate')")
    editor.page.wait_for_function(
        "() => window.qwenVramEvents.some(([name]) => name === 'execution_success')", timeout=60_000
    )
    entry = last_run(server)
    for node_id in (positive, negative):
        assert entry["outputs"][str(node_id)]["qwen_vram"][0]["why"] == "this run keeps nothing"
    expect(editor.page.get_by_text("This run is not in the prompt cache.")).to_be_visible()
    for node_id in (positive, negative):
        has_badge(editor, node_id, "not kept")
    assert "qwen_vram" not in entry["prompt"][3]["extra_pnginfo"]["workflow"]["extra"]
    assert "qwen_vram" not in editor.saved()["extra"]
    assert not editor.page.evaluate(MARKED_STATES)
    marked = {**editor.saved(), "extra": {"qwen_vram": {"keep_nothing": True}}}
    editor.open(marked)  # as an old draft may have it
    assert "qwen_vram" not in editor.saved()["extra"]

    menu(editor, positive, "Keep nothing of this node (Qwen VRAM)")
    has_badge(editor, positive, "keeps nothing")
    editor.set_widgets({str(positive): {"text": "never to be kept either"}})
    assert editor.run().status == "execution_success"
    (told,) = last_run(server)["outputs"][str(positive)]["qwen_vram"]
    assert (told["why"], told["result"]) == ("this node keeps nothing", "not kept")
    own = editor.once(lambda: badges(editor, positive)[1:], ["keeps nothing"])
    assert own == ["keeps nothing"]
    menu(editor, positive, "Keep what this node gives again (Qwen VRAM)")
    has_badge(editor, positive, "keeps nothing", False)
    assert editor.problems == []
