"""What users see of the prompt cache: badges on encode nodes, the panel, the settings, the prefill."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pack.demo.server import Server
from pack.tests.browser.editor import POLL_MS, SETTLE_MS, Editor
from pack.tests.graphs import CLIP, encode, loader, node, preview
from playwright.sync_api import Locator, Page, expect

STOCK, OURS = 2, 3
PANEL = ".qwen-vram-panel"
# Badges as LiteGraph draws them: the first is the frontend's server.
BADGES = """() => Object.fromEntries(app.graph.nodes.map(n => [
    n.id, n.badges.slice(1).map(b => (typeof b === 'function' ? b() : b).text).filter(Boolean)]))"""
SHOW_NODE = """id => {
    app.canvas.ds.scale = 1;
    app.canvas.centerOnNode(app.graph.getNodeById(id));
    app.canvas.draw(true, true);  // at once: a click counts where the last picture has a node
}"""
# Every event makes new badges, and one has no place before the canvas was drawn.
NONE: dict[int, list[str]] = {STOCK: [], OURS: []}
PLACE_OF_BADGE = """id => {
    const node = app.graph.getNodeById(id);
    const badge = node.badges.map(b => (typeof b === 'function' ? b() : b)).find(b => b.onClick);
    const [x, y, width, height] = badge?.boundingRect ?? [0, 0, 0, 0];
    if (!width) return null;
    const at = [node.pos[0] + x + width / 2, node.pos[1] + y + height / 2];
    const [left, top] = app.canvas.ds.convertOffsetToCanvas(at);
    return [left, top];
}"""
LOAD_API = "graph => app.loadApiJson(graph, 'test')"
MEMORY = "QwenVRAM.Conditioning.MemoryMB"
SETTING = "([id, value]) => app.extensionManager.setting.set(id, value)"
ADD_NOTE = """() => {
    const note = LiteGraph.createNode('Note');
    note.title = 'innocent';
    app.graph.add(note);
}"""
COLOUR = "e => getComputedStyle(e).color.match(/[0-9.]+/g).slice(0, 3).map(Number)"
SAVED = re.compile(r"/api/settings")
COMMAND = "id => { app.extensionManager.command.execute(id); }"


def graph(text: str) -> dict[str, Any]:
    """A stock encode node and one of ours behind one encoder."""
    return {
        "1": loader("TextEncoder", CLIP),
        "2": node("CLIPTextEncode", clip=["1", 0], text=text),
        "3": encode(f"{text}, ours", "1"),
        "4": preview("2")["out_2"],
        "5": preview("3")["out_3"],
    }


def open_graph(editor: Editor, text: str) -> None:
    """Open the graph as a dropped API file."""
    editor.page.evaluate(LOAD_API, graph(text))
    editor.settle()


def badges(editor: Editor, wanted: object) -> dict[int, list[str]]:
    """What the badges of the two encode nodes say, once it is `wanted`; no other node may have one.

    They are made after the server was asked which workflow runs.
    """
    if wanted == NONE:
        editor.page.wait_for_timeout(SETTLE_MS)

    def read() -> dict[int, list[str]]:
        return {int(i): texts for i, texts in editor.page.evaluate(BADGES).items()}

    def of_encode_nodes() -> dict[int, list[str]]:
        found = read()
        return {i: found[i] for i in (STOCK, OURS)}

    told = editor.once(of_encode_nodes, wanted)
    assert [i for i, texts in read().items() if texts and i not in (STOCK, OURS)] == []
    return told


def both(start: str) -> Callable[[dict[int, list[str]]], bool]:
    """Says whether each has one badge that begins so."""
    return lambda told: all(len(t) == 1 and t[0].startswith(start) for t in told.values())


def stored(server: Server, place: str, wanted: int) -> int:
    """How many prompts lie in memory or on disk, where they are written in the background."""
    for _ in range(600):
        if (entries := server.get_json("/qwen_vram/conditioning")[place]["entries"]) == wanted:
            break
        time.sleep(POLL_MS / 1000)
    return entries


def forget(editor: Editor, server: Server) -> None:
    """What lies in memory, as after a restart: ComfyUI's results, and the prompts."""
    editor.page.evaluate(SETTING, [MEMORY, 0])
    server.post_json("/qwen_vram/clear", {"level": "everything"})


def delete(server: Server, query: str = "") -> dict[str, Any]:
    """What a script would do."""
    url = f"{server.url}/qwen_vram/conditioning{query}"
    request = urllib.request.Request(url, method="DELETE")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return json.loads(response.read())


def open_panel(editor: Editor) -> Locator:
    """The panel in the settings dialog."""
    page = editor.page
    close_dialogs(page)
    page.evaluate(COMMAND, "Comfy.ShowSettingsDialog")
    page.get_by_role("dialog").get_by_text("Qwen VRAM", exact=True).first.click()
    page.locator(f"{PANEL} table").first.wait_for()
    return page.locator(PANEL)


def close_dialogs(page: Page) -> None:
    """By a click beside them: a setting that has the focus may keep Escape for itself."""
    if page.get_by_role("dialog").count():
        page.mouse.click(720, 890)
        page.get_by_role("dialog").first.wait_for(state="hidden")


def screenshot(page: Page, name: str) -> None:
    """For people who want to look: only where QWEN_VRAM_SCREENSHOTS names a folder."""
    if folder := os.environ.get("QWEN_VRAM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def click_badge(page: Page, node_id: int) -> None:
    """Where it is drawn: on a node that is in view, and not so small that badges are left out."""
    page.evaluate(SHOW_NODE, node_id)
    place = page.wait_for_function(PLACE_OF_BADGE, arg=node_id)
    page.mouse.click(*place.json_value())


# ---------------------------------------------------------------------------------------- badges
def test_badges_tell_miss_then_comfyuis_cache_then_hit(editor: Editor, server: Server) -> None:
    delete(server, "?everything=true")
    open_graph(editor, "a red fox")
    assert badges(editor, NONE) == NONE
    assert editor.run().status == "execution_success"
    missed = {STOCK: ["miss · new text"], OURS: ["miss · new text"]}
    assert badges(editor, missed) == missed
    screenshot(editor.page, "badges_miss")
    click_badge(editor.page, STOCK)
    editor.page.get_by_text("new text · took ").wait_for()
    editor.dismiss()

    editor.run()
    kept = {STOCK: ["ComfyUI's cache"], OURS: ["ComfyUI's cache"]}
    assert badges(editor, kept) == kept
    screenshot(editor.page, "badges_comfy")

    forget(editor, server)
    try:
        editor.run()
        told = badges(editor, both("hit · disk"))
        assert both("hit · disk")(told), told
        screenshot(editor.page, "badges_hit")
    finally:
        editor.page.evaluate(SETTING, [MEMORY, 256])

    open_graph(editor, "another workflow")
    assert badges(editor, NONE) == NONE
    assert editor.problems == []


def test_html_nodes_show_badges_with_tooltips(editor: Editor) -> None:
    page = editor.page
    open_graph(editor, "a purple cat")
    page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", True])
    try:
        editor.run()
        badge = page.get_by_text("miss · new text").first
        badge.wait_for()
        assert (badge.get_attribute("title") or "").startswith("new text · took ")
        screenshot(page, "badges_html")
        expect(page.get_by_text("miss · new text")).to_have_count(2)
    finally:
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", False])


def test_a_tab_gets_its_badges_back_and_its_run_is_not_shown_in_another(
    editor: Editor,
) -> None:
    open_graph(editor, "a tab")
    first = {**editor.saved(), "id": str(uuid.uuid4())}
    second = {**first, "id": str(uuid.uuid4())}
    editor.open(first)
    editor.run()
    shown = badges(editor, lambda told: all(told.values()))
    assert shown[STOCK] and shown[OURS]
    editor.open(second)
    assert badges(editor, NONE) == NONE
    editor.open(first)
    assert badges(editor, shown) == shown


# ----------------------------------------------------------------------------------- the panel
def test_the_panel_shows_what_is_stored_and_clears_it(editor: Editor, server: Server) -> None:
    delete(server, "?everything=true")
    open_graph(editor, "panel")
    editor.run()
    page = editor.page
    assert stored(server, "disk", 2) == 2
    panel = open_panel(editor)
    screenshot(page, "panel_dark")
    told = server.get_json("/qwen_vram/conditioning")
    assert told["disk"]["entries"] == told["memory"]["entries"] == 2
    disk = panel.get_by_role("row").filter(has_text="On disk")
    expect(disk.get_by_role("cell").nth(1)).to_have_text("2")
    saved = panel.get_by_role("row").filter(has_text="In total").get_by_role("cell")
    assert saved.all_inner_texts()[1:3] == ["0", "2"]  # hits, misses
    assert told["folder"] in panel.inner_text()

    panel.locator("input").fill("many")
    panel.get_by_role("button", name="Clear what was unused for").click()
    expect(panel.get_by_role("status")).to_contain_text("Days must be a number")
    panel.locator("input").fill("30")
    panel.get_by_role("button", name="Clear what was unused for").click()
    page.get_by_text("was not used for 30 days").wait_for()
    page.get_by_role("button", name="Delete").last.click()
    panel.get_by_text("Nothing was there to remove.").wait_for()

    panel.get_by_role("button", name="Clear prompt cache").click()
    page.get_by_text("Remove all stored prompts").wait_for()
    page.wait_for_timeout(SETTLE_MS)
    screenshot(page, "panel_confirm")
    page.get_by_role("button", name="Cancel").last.click()
    assert server.get_json("/qwen_vram/conditioning")["disk"]["entries"] == 2
    panel.get_by_role("button", name="Clear prompt cache").click()
    page.get_by_text("Remove all stored prompts").wait_for()
    page.get_by_role("button", name="Delete").last.click()
    panel.get_by_text("Removed: In memory: 2").wait_for()
    expect(disk.get_by_role("cell").nth(1)).to_have_text("0")  # fetched after it
    assert server.get_json("/qwen_vram/conditioning")["total"]["misses"] == 2

    kept = server.base / "user" / "__qwen_vram" / "warm_up.json"
    kept.write_text("{}", encoding="utf-8")
    panel.get_by_role("button", name="Remove everything, pins too").click()
    page.get_by_text("the totals, all pinned outputs").wait_for()
    page.get_by_text("and the workflow that is kept for the warm-up at start?").wait_for()
    page.get_by_role("button", name="Delete").last.click()
    panel.get_by_text("Removed: the workflow for the warm-up at start · the totals.").wait_for()
    assert not kept.exists()
    assert server.get_json("/qwen_vram/conditioning")["total"]["misses"] == 0
    close_dialogs(page)
    assert editor.problems == []


def test_the_panel_is_readable_on_a_light_theme(editor: Editor) -> None:
    page = editor.page
    page.evaluate(SETTING, ["Comfy.ColorPalette", "light"])
    try:
        editor.settle()
        screenshot(page, "badges_light")
        panel = open_panel(editor)
        assert max(editor.once(lambda: panel.evaluate(COLOUR), lambda rgb: max(rgb) < 100)) < 100
        screenshot(page, "panel_light")
        assert panel.locator("table").count() >= 2
        close_dialogs(page)
    finally:
        page.evaluate(SETTING, ["Comfy.ColorPalette", "dark"])


# ------------------------------------------------------------------------------------ settings
def choose(page: Page, setting: str, option: str) -> None:
    """Choose an option of a setting in the open dialog; the server knows it then."""
    page.locator(f'[data-setting-id="{setting}"]').get_by_role("combobox").click()
    with page.expect_response(SAVED):
        page.get_by_role("option", name=option, exact=True).click()


def test_a_setting_changed_in_the_dialog_counts_from_the_next_run(
    editor: Editor, server: Server
) -> None:
    page, keep = editor.page, "QwenVRAM.Conditioning.Keep"
    delete(server, "?everything=true")
    open_graph(editor, "not to be kept")
    open_panel(editor)
    choose(page, keep, "nothing")
    memory = page.locator(f'[data-setting-id="{MEMORY}"] input')
    memory.click()
    memory.press("Control+a")
    memory.press_sequentially("100")
    with page.expect_response(SAVED):
        memory.press("Tab")
    told = server.get_json("/qwen_vram/conditioning")
    assert told["keep"] == "nothing" and told["memory"]["bound_bytes"] == 100_000_000
    close_dialogs(page)
    editor.run()
    off = {STOCK: ["off"], OURS: ["off"]}
    assert badges(editor, off) == off
    assert server.get_json("/qwen_vram/conditioning")["disk"]["entries"] == 0
    open_panel(editor)
    choose(page, keep, "all nodes")
    close_dialogs(page)
    page.evaluate(SETTING, [MEMORY, 256])
    open_graph(editor, "to be kept")
    editor.run()
    assert stored(server, "disk", 2) == 2


# ------------------------------------------------------------------------------------- prefill
def test_a_list_of_prompts_is_encoded_from_the_menu_command(
    editor: Editor, server: Server, tmp_path: Path
) -> None:
    delete(server, "?everything=true")
    page = editor.page
    open_graph(editor, "listed")
    path = tmp_path / "prompts.csv"
    path.write_text('prompt\nlisted\n"listed, ours"\nthird\n', encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.evaluate(COMMAND, "QwenVRAM.Prefill")
    chooser.value.set_files(path)
    page.get_by_text("3 prompts: 0 known, 3 encoded in").wait_for(timeout=60_000)
    screenshot(page, "prefill_toast")
    editor.run()
    told = badges(editor, both("hit · memory"))
    assert both("hit · memory")(told), told
    sent = server.base / "temp" / "qwen_vram" / "prompts.csv"
    assert sent.exists()
    delete(server, "?everything=true")
    assert not sent.exists()
    assert editor.problems == []


def test_a_list_that_cannot_be_read_marks_no_node(
    editor: Editor, server: Server, tmp_path: Path
) -> None:
    page = editor.page
    open_graph(editor, "unread")
    page.evaluate(ADD_NOTE)
    for name, sentence in (
        ("list.xlsx", "list.xlsx is no list of prompts"),
        ("empty.txt", "empty.txt has no prompts"),
    ):
        (tmp_path / name).write_text("# nothing\n", encoding="utf-8")
        with page.expect_file_chooser() as chooser:
            page.evaluate(COMMAND, "QwenVRAM.Prefill")
        chooser.value.set_files(tmp_path / name)
        page.get_by_text(sentence).first.wait_for(timeout=60_000)
        page.wait_for_timeout(SETTLE_MS)
    screenshot(page, "prefill_refused")
    assert not (server.base / "temp" / "qwen_vram" / "list.xlsx").exists()
    sent = server.base / "temp" / "qwen_vram" / "empty.txt"
    assert os.name == "nt" or sent.stat().st_mode & 0o077 == 0
    assert [n for n in editor.nodes().values() if n["errors"]] == []
    assert "innocent" not in editor.complaint()
    assert editor.problems == []
    editor.dismiss()  # they stay
    delete(server, "?everything=true")


def test_without_an_encode_node_the_command_says_what_to_do(editor: Editor) -> None:
    page = editor.page
    page.evaluate(LOAD_API, {"1": loader("TextEncoder", CLIP)})
    page.evaluate(COMMAND, "QwenVRAM.Prefill")
    page.get_by_text("No text encoder was found").wait_for()
