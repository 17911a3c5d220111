"""The line that a node of this pack shows: it wraps at spaces, not inside words."""

from __future__ import annotations

from pack.tests.browser.editor import Editor
from pack.tests.browser.test_cache_panel import screenshot

LONG = "miss: new text, encoded in 12.34 s, stored in memory and on disk; rounded at most 0.25 s"
PUT_DOWN = """types => {
    app.graph.clear();
    app.canvas.ds.reset();
    types.forEach((type, at) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [200 + 400 * at, 200];
        node.size = [260, node.size[1]];
    });
    return app.graph.nodes.map(n => String(n.id));
}"""
SHOW = "([nodeId, text]) => app.api.dispatchCustomEvent('progress_text', { nodeId, text })"
# The parts of words: how many lines each word stands on.
BROKEN = """text => {
    const spans = [...document.querySelectorAll('.dom-widget span')];
    return spans.filter(s => s.textContent === text && s.checkVisibility()).map(span => {
        const [node, range] = [span.firstChild, document.createRange()];
        return [...text.matchAll(/\\S+/g)].filter(({ 0: word, index }) => {
            range.setStart(node, index);
            range.setEnd(node, index + word.length);
            return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
        }).map(([word]) => word);
    });
}"""


def broken(editor: Editor, text: str) -> list[str]:
    """The words of a line that is shown that stand on more than one line."""
    found = editor.once(lambda: editor.page.evaluate(BROKEN, text), bool)
    assert len(found) == 1
    return found[0]


def test_a_line_wraps_at_spaces_and_other_packs_stay_as_they_are(editor: Editor) -> None:
    ours, stock = editor.page.evaluate(PUT_DOWN, ["QwenVRAMLoadVAE", "VAELoader"])
    for node_id, more in ((ours, ""), (stock, "!")):
        editor.page.evaluate(SHOW, [node_id, LONG + more])
    editor.settle()
    assert broken(editor, LONG) == []
    assert broken(editor, LONG + "!") != []
    screenshot(editor.page, "status_lines")
    word = "/models/" + "a_name_without_a_space" * 5
    editor.page.evaluate(SHOW, [ours, word])
    editor.settle()
    assert broken(editor, word) == [word]  # nothing runs out of the node
    assert editor.problems == []
