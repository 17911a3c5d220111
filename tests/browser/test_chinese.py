"""The pack in Chinese: its nodes, its settings, its panel and its menu, in one page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from pack.demo.server import Server
from pack.tests.browser.conftest import new_page
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_cache_panel import close_dialogs, open_panel, screenshot
from pack.tests.browser.test_menu import names, opened
from pack.tests.conftest import ROOT
from playwright.sync_api import Browser, expect

SPEED = ("QwenVRAMReferenceCache", "QwenVRAMAttention", "QwenVRAMEarlyExit")
LABELS = """types => Object.fromEntries(types.map(type => {
    const { inputs, widgets } = LiteGraph.createNode(type);
    const labels = [...inputs, ...widgets].map(i => [i.name, i.label ?? i.localized_name]);
    return [type, Object.fromEntries(labels)];
}))"""
PUT_DOWN = """type => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [300, 300];
    app.canvas.ds.reset();
    app.canvas.draw(true, true);
}"""
SHOWN = "name => app.graph.nodes[0].widgets.find(w => w.name === name)._displayValue"
PLACE = """name => {
    const [node] = app.graph.nodes;
    const { y } = node.widgets.find(w => w.name === name);
    const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + y + 10];
    const box = app.canvas.canvas.getBoundingClientRect();
    const [left, top] = app.canvas.ds.convertOffsetToCanvas(at);
    return [box.left + left, box.top + top];
}"""
HTML_NODES = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
TITLES = "types => Object.fromEntries(types.map(t => [t, LiteGraph.createNode(t)?.title]))"


@pytest.fixture(scope="module")
def chinese(browser: Browser, editor: Editor, server: Server) -> Iterator[Editor]:
    """Another page, loaded with Chinese chosen in the settings; the one of all tests stays as it is."""
    server.post_json("/api/settings/Comfy.Locale", "zh")
    page = new_page(browser)
    try:
        yield Editor(page, editor.url)
    finally:
        page.close()
        server.post_json("/api/settings/Comfy.Locale", "en")


def test_nodes_have_chinese_names(chinese: Editor) -> None:
    file = ROOT / "locales" / "zh" / "nodeDefs.json"
    names = {t: n["display_name"] for t, n in json.loads(file.read_text(encoding="utf-8")).items()}
    assert chinese.page.evaluate(TITLES, list(names)) == names
    assert all(re.search(r"[\u4e00-\u9fff]", name) for name in names.values())
    assert chinese.problems == []


def test_the_speed_nodes_label_their_inputs_in_chinese(chinese: Editor) -> None:
    entries = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    names = {t: {i: e["name"] for i, e in entries[t]["inputs"].items()} for t in SPEED}
    shown = chinese.page.evaluate(LABELS, list(SPEED))
    assert {t: {i: labels.get(i) for i in names[t]} for t, labels in shown.items()} == names


def test_an_empty_text_field_says_its_chinese_name(chinese: Editor) -> None:
    chinese.page.evaluate(PUT_DOWN, "QwenVRAMCachedTextEncode")
    chinese.page.get_by_placeholder("文本", exact=True).first.wait_for()


def test_choices_are_shown_in_chinese_and_saved_as_they_are(chinese: Editor) -> None:
    """On the canvas and in HTML nodes, in the node and in the list that it opens."""
    chinese.page.evaluate(PUT_DOWN, "QwenVRAMFit")
    assert chinese.page.evaluate(SHOWN, "policy") == "只允许精确（exact only）"
    x, y = chinese.page.evaluate(PLACE, "policy")
    chinese.page.mouse.click(x, y)
    menu = chinese.page.locator(".litecontextmenu")
    assert "允许近似（allow approximations）" in menu.inner_text()
    screenshot(chinese.page, "choices_chinese")
    menu.get_by_text("允许近似").click()
    chosen = chinese.once(lambda: chinese.widgets(1)["policy"], "allow approximations")
    assert chosen == "allow approximations"
    chinese.page.evaluate(HTML_NODES, True)
    try:
        chinese.page.get_by_text("允许近似（allow approximations）").first.wait_for()
        screenshot(chinese.page, "choices_chinese_html")
    finally:
        chinese.page.evaluate(HTML_NODES, False)
    assert chinese.problems == []


def test_the_panel_and_the_menu_speak_chinese(chinese: Editor) -> None:
    panel = open_panel(chinese)
    screenshot(chinese.page, "panel_chinese")
    for text in ("清除提示词缓存", "全部删除"):
        expect(panel).to_contain_text(text)
    for text in ("磁盘上限（GB）", "提示词缓存"):
        expect(chinese.page.get_by_role("dialog")).to_contain_text(text)
    close_dialogs(chinese.page)
    labels = json.loads((ROOT / "locales/zh/commands.json").read_text(encoding="utf-8"))
    commands = {key: entry["label"] for key, entry in labels.items()}
    ours = {label for key, label in commands.items() if key.startswith("QwenVRAM_")}
    wanted = {label.removesuffix("（Qwen VRAM）") for label in ours}
    offered = menu_items(chinese)
    assert wanted | {"固定输出", "清理显存"} == offered
    assert not ours & offered  # the name of the pack stands above them


def menu_items(editor: Editor) -> set[str]:
    """What ComfyUI's menu offers under Extensions, Qwen VRAM, and one level deeper."""
    found: set[str] = set()
    for deeper in ((), ("固定输出",), ("清理显存",)):
        with opened(editor, "扩展", "Qwen VRAM", *deeper) as entries:
            screenshot(editor.page, f"menu_chinese_{len(found)}")
            found |= set(names(entries))
    return found
