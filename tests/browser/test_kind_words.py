"""Kind Words in the editor: its example from the help page, its answer as a message, its settings."""

from __future__ import annotations

import re

import pytest
from pack.tests.browser.editor import SETTLE_MS, Editor
from pack.tests.browser.test_cache_panel import close_dialogs, open_panel, screenshot
from pack.tests.conftest import ROOT
from playwright.sync_api import expect

EXAMPLE = re.compile(r"```json\n(\{.*?)\n```", re.S)
PASTE = """text => {
    const clipboardData = new DataTransfer();
    clipboardData.setData('text/plain', text);
    document.dispatchEvent(new ClipboardEvent('paste', { clipboardData, bubbles: true }));
}"""
FRIENDLY = {
    "a bear with a gun": "Let us draw something friendly: a little bear with a balloon.",
    "一只拿着枪的小熊": "我们来画点友好的吧：一只拿着气球的小熊。",
}


def paste(editor: Editor, page: str) -> None:
    """The example of a help page, as from the clipboard."""
    text = (ROOT / "js" / "docs" / page).read_text(encoding="utf-8")
    editor.page.evaluate(PASTE, EXAMPLE.search(text).group(1))
    editor.page.wait_for_function("() => app.graph.nodes.length === 3")
    editor.settle()


def messages(editor: Editor, count: int = 1) -> list[str]:
    """What the toasts say, of which so many are expected."""
    toasts = editor.page.locator(".p-toast-message")
    if count:
        expect(toasts).to_have_count(count)
    else:
        editor.page.wait_for_timeout(SETTLE_MS)  # one that comes would go again
    return toasts.all_inner_texts()


@pytest.mark.parametrize("words", FRIENDLY)
def test_the_example_runs_and_the_answer_is_a_message(editor: Editor, words: str) -> None:
    paste(editor, "QwenVRAMKindWords.md")
    editor.set_widgets({"1": {"words": words}})
    assert editor.run().status == "execution_success"
    (message,) = messages(editor)
    assert message.splitlines() == ["Kind Words", FRIENDLY[words]]
    screenshot(editor.page, "kind_words")
    editor.set_widgets({"1": {"when_found": "stop"}})
    editor.dismiss()
    assert editor.run().status == "execution_success"
    first = messages(editor)
    editor.dismiss()
    assert editor.run().executed == set()
    assert messages(editor) == first != []  # ComfyUI kept the answer, and the child still gets it
    editor.set_widgets({"1": {"words": "a bear with a hat"}})
    editor.dismiss()
    editor.run()
    assert messages(editor, 0) == [] and editor.problems == []


def test_the_words_are_added_in_the_settings(editor: Editor) -> None:
    open_panel(editor)
    dialog = editor.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Words for children")
    for name in ("Also avoid", "Always allow"):
        expect(dialog.get_by_text(name, exact=True)).to_have_count(1)
    dialog.get_by_text("Also avoid", exact=True).scroll_into_view_if_needed()
    screenshot(editor.page, "kind_words_settings")
    close_dialogs(editor.page)
