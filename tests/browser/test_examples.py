"""The examples of the help pages, pasted in the real editor."""

from __future__ import annotations

import json
from typing import Any

from pack.demo.example_blocks import block_in, page
from pack.demo.examples import EXAMPLES
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_workflow import open_help

PASTE = """async (text) => {
    const clipboardData = new DataTransfer();
    clipboardData.setData("text/plain", text);
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""
ARRIVED = "types => app.graph.nodes.map(n => n.type).join() === types.join()"
LINKS = """() => [...app.graph.links.values()].map(link =>
    [link.id, link.origin_id, link.origin_slot, link.target_id, link.target_slot].map(Number))"""
NEW_TAB = "() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
CLIPBOARD = ["clipboard-read", "clipboard-write"]
SELECTED = "() => getSelection().toString()"


def block(node_id: str, language: str = "en") -> str:
    """The line to be copied from a help page."""
    found = block_in(page(node_id, language).read_text(encoding="utf-8"), language)
    assert found, node_id
    return found[1]


def arrived(editor: Editor, workflow: dict[str, Any]) -> None:
    """Nodes, wires and values are there as in the line, and nothing is red."""
    editor.page.wait_for_function(ARRIVED, arg=[n["type"] for n in workflow["nodes"]])
    editor.settle()
    nodes = editor.nodes()
    assert {i: n["type"] for i, n in nodes.items()} == {
        n["id"]: n["type"] for n in workflow["nodes"]
    }
    assert [n["type"] for n in nodes.values() if not n["registered"] or n["errors"]] == []
    assert {i: n["saved"] for i, n in nodes.items()} == {
        n["id"]: n["widgets_values"] for n in workflow["nodes"]
    }
    assert sorted(editor.page.evaluate(LINKS)) == sorted(k[:5] for k in workflow["links"])
    assert editor.complaint() == ""
    assert editor.problems == []


def test_every_line_can_be_pasted(editor: Editor) -> None:
    for line in {block(node_id) for node_id in EXAMPLES}:
        editor.page.evaluate(PASTE, line)  # each opens a tab of its own
        arrived(editor, json.loads(line))


def test_a_reader_copies_it_from_the_help_panel(editor: Editor) -> None:
    """As the page says: a triple click, Ctrl+C, a click on the canvas, Ctrl+V."""
    line = block("QwenVRAMAllocator")
    editor.page.evaluate(PASTE, line)
    arrived(editor, json.loads(line))
    editor.page.context.grant_permissions(CLIPBOARD, origin=editor.url)
    try:
        open_help(editor, 1)
        shown = editor.page.locator(".node-help-content pre").first
        shown.locator("code").click(click_count=3)
        assert editor.once(lambda: editor.page.evaluate(SELECTED).strip(), line) == line
        editor.page.keyboard.press("Control+C")
        editor.page.evaluate(NEW_TAB)
        editor.page.mouse.click(400, 760)
        editor.page.keyboard.press("Control+V")
        arrived(editor, json.loads(line))
    finally:
        editor.page.context.clear_permissions()
