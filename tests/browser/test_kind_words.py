"""Kind Words in the editor: its example from the help page, its answer as a message, its settings."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from pack.tests.browser.editor import SETTLE_MS, Editor
from pack.tests.browser.test_cache_panel import close_dialogs, open_panel, screenshot
from pack.tests.browser.test_subgraphs import SMALL, WIRE, place
from pack.tests.browser.test_warmup import button, idle
from pack.tests.browser.test_workflow import STATUS, ids_of
from pack.tests.conftest import ROOT
from playwright.sync_api import expect

EXAMPLE = re.compile(r"```json\n(\{.*?)\n```", re.S)
TINY = ROOT / "demo" / "workflows" / "cute_animal_for_kids_tiny.json"
BOX, KIND, CUTE = "PrimitiveStringMultiline", "QwenVRAMKindWords", "QwenVRAMCuteAnimalPrompt"
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


def said(toasts: list[str]) -> str:
    """The sentence of the one message."""
    (message,) = toasts
    return message.splitlines()[1]


def warm_up(editor: Editor) -> None:
    """Press the button, wait for the end, and close what it says."""
    button(editor).click()
    expect(editor.page.locator(".p-toast-detail", has_text="Ready after")).to_be_visible()
    idle(editor)
    assert len(messages(editor)) == 1  # nobody is told in a warm-up
    editor.dismiss()


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
    assert editor.once(lambda: editor.widgets(1)[STATUS], said(first)) == said(first)
    editor.set_widgets({"1": {"words": "a bear with a hat"}})
    editor.dismiss()
    editor.run()
    assert messages(editor, 0) == [] and editor.problems == []


def test_after_a_warm_up_the_answer_comes_and_stands_on_the_node(editor: Editor) -> None:
    workflow = json.loads(TINY.read_text(encoding="utf-8"))
    editor.open(workflow)
    (box,), (kind,), (cute,) = (ids_of(workflow, name) for name in (BOX, KIND, CUTE))
    editor.set_widgets({str(box): {"value": f"a pig with a knife {uuid.uuid4().hex}"}})
    warm_up(editor)
    answer = "Let us draw something friendly: a little bear with a hat."
    for press in range(2):
        ran = editor.run()
        assert ran.status == "execution_success" and kind in ran.cached
        assert said(messages(editor)) == answer
        assert editor.once(lambda: editor.widgets(kind)[STATUS], answer) == answer
        drawn = editor.once(lambda: editor.widgets(cute)[STATUS], lambda t: "a little" in t)
        assert drawn.startswith("a little bear with a hat, ")
        screenshot(editor.page, f"kind_words_after_a_warm_up_{press}")
        editor.dismiss()
    assert editor.problems == []


def test_what_stop_keeps_from_running_promises_no_line(editor: Editor) -> None:
    workflow = json.loads(TINY.read_text(encoding="utf-8"))
    editor.open(workflow)
    (box,), (kind,), (cute,) = (ids_of(workflow, name) for name in (BOX, KIND, CUTE))
    editor.set_widgets({str(box): {"value": f"a cat with a bomb {uuid.uuid4().hex}"}})
    editor.set_widgets({str(kind): {"when_found": "stop"}})
    for _ in range(2):
        assert editor.run().status == "execution_success"
        editor.dismiss()
    said_of_it = editor.once(
        lambda: editor.widgets(cute).get(STATUS, ""), lambda t: t.startswith("not run")
    )
    assert said_of_it.startswith("not run")


def test_a_subgraph_that_stops_says_why_after_a_warm_up(editor: Editor) -> None:
    editor.tidy()
    node_id = place(editor, "Cute animal")
    words = f"a cat with a sword fight and a bomb {uuid.uuid4().hex}"
    editor.set_widgets({str(node_id): {**SMALL, "words": words, "when_found": "stop"}})
    editor.page.evaluate(WIRE, node_id)
    warm_up(editor)
    assert editor.run().status == "execution_success"
    assert said(messages(editor)).startswith("Let us think of something friendly to draw, ")
    screenshot(editor.page, "kind_words_stopped_in_a_subgraph")
    assert editor.problems == []


def test_the_words_are_added_in_the_settings(editor: Editor) -> None:
    open_panel(editor)
    dialog = editor.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Words for children")
    for name in ("Also avoid", "Always allow"):
        expect(dialog.get_by_text(name, exact=True)).to_have_count(1)
    dialog.get_by_text("Also avoid", exact=True).scroll_into_view_if_needed()
    screenshot(editor.page, "kind_words_settings")
    close_dialogs(editor.page)
