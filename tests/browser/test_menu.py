"""The menu Extensions, Qwen VRAM: in a small window too, and in the same order at every start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_cache_panel import screenshot

SMALL = {"width": 1366, "height": 768}
ORDER = [
    "Warm up (silent)",
    "Encode a list of prompts",
    "Run without keeping anything",
    "Merge duplicate loaders",
    "Pin output",
    "Clear VRAM",
    "Remove everything, pins too",  # cannot be undone
]
DEEPER = {
    "Pin output": ["Pin output of the selected nodes", "Unpin output of the selected nodes"],
    "Clear VRAM": [
        "Clear VRAM, as chosen in the settings",
        "Clear caches",
        "Unload all models from VRAM",
        "Unload the models that this workflow does not need",
        "Unload all models and forget node outputs",
    ],
}
FOCUSED = "() => Boolean(document.activeElement?.closest('[role=menubar], [role=menu]'))"
# The entries of an open sub-menu with their places; without the shortcut behind a name.
ENTRIES = """async item => {
    const read = () => [...item.querySelectorAll(':scope > ul > li[role=menuitem]')].map(li =>
        [li.getAttribute('aria-label'), li.getBoundingClientRect().toJSON()]);
    const before = JSON.stringify(read());
    await new Promise(resolve => setTimeout(resolve, 200));
    const seen = item.querySelector(':scope > ul')?.checkVisibility({ opacityProperty: true });
    return seen && JSON.stringify(read()) === before ? read() : [];
}"""


@pytest.fixture
def small(editor: Editor) -> Iterator[Editor]:
    """The page in a small window."""
    usual = editor.page.viewport_size
    editor.page.set_viewport_size(SMALL)
    yield editor
    editor.page.set_viewport_size(usual)


@contextlib.contextmanager
def opened(editor: Editor, *path: str) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What ComfyUI's menu offers under the named entries, with its places."""
    page = editor.page
    page.locator(".comfy-menu-button-wrapper").first.click()
    page.wait_for_function(FOCUSED)
    for at, name in enumerate(path):
        entry = page.get_by_role("menuitem", name=name, exact=True).first

        def unfolded(entry: Any = entry, first: bool = not at) -> list:
            """It minds only a mouse that comes, and not yet when the menu has just opened."""
            if first:
                page.mouse.move(1100, 740)
            entry.hover()
            return entry.evaluate(ENTRIES)

        entries = editor.once(unfolded, bool)
    yield entries
    page.keyboard.press("Escape")


def names(entries: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Of entries, in the order in which they stand."""
    return [name for name, box in sorted(entries, key=lambda entry: entry[1]["y"])]


def outside(entries: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Entries that a small window does not show whole."""
    width, height = SMALL["width"], SMALL["height"]
    return [
        name
        for name, box in entries
        if box["top"] < 0 or box["left"] < 0 or box["bottom"] > height or box["right"] > width
    ]


def test_every_entry_can_be_reached_in_a_small_window(small: Editor) -> None:
    with opened(small, "Extensions", "Qwen VRAM") as entries:
        screenshot(small.page, "menu_small")
        assert names(entries) == ORDER and outside(entries) == []
    for group, wanted in DEEPER.items():
        with opened(small, "Extensions", "Qwen VRAM", group) as entries:
            screenshot(small.page, f"menu_small_{group.split()[0]}")
            assert names(entries) == wanted and outside(entries) == []


def test_the_order_is_the_same_at_every_start(small: Editor) -> None:
    """After another start; the test above has seen the first one."""
    small.start()
    with opened(small, "Extensions", "Qwen VRAM") as entries:
        assert names(entries) == ORDER
    assert small.problems == []
