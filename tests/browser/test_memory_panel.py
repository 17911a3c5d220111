"""The memory panel in the real sidebar: while a run goes on, and whatever the server answers."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pack.demo.server import Server
from pack.tests.browser.editor import SETTLE_MS, Editor
from pack.tests.browser.test_workflow import ids_of
from playwright.sync_api import Locator, Page, Request, Route, expect

TAB = "qwen-vram-memory"
PANEL = ".qwen-vram-memory"
ROUTE = "**/api/qwen_vram/report*"
TOGGLE = f"() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.{TAB}')"
ACTIVE = "() => app.extensionManager.sidebarTab.activeSidebarTabId"
SETTING = "([id, value]) => app.extensionManager.setting.set(id, value)"
WIDTHS = """panel => {
    const bar = panel.querySelector('.bar');
    const whole = bar.getBoundingClientRect().width;
    return [...bar.children].map(piece => piece.getBoundingClientRect().width / whole);
}"""
CLEAR_COMMAND = """() => {
    const act = () => { window.cleared = (window.cleared ?? 0) + 1; };
    const command = { id: 'QwenVRAM.Clear.SomeTest', label: 'Clear for a test', function: act };
    app.registerExtension({ name: 'QwenVRAM.Test', commands: [command] });
}"""
REACHED = "id => window.qwenVramEvents.some(([name, node]) => name === 'executing' && node === id)"
HOSTILE_NAME = "<img src=x onerror='window.hacked=1'>\u202e.safetensors"


def part(name: str, size: float | None, label: str = "", detail: str = "") -> dict[str, Any]:
    """One part of a device."""
    return {"id": name, "label": label or name, "bytes": size, "detail": detail}


def sample(used: float = 12e9) -> dict[str, Any]:
    """A report of a card that is not in this machine."""
    parts = [
        part("other_processes", 1.2e9, "Other processes"),
        part("model:0", used, "Diffusion model qwen_image (fp8)", "12.00 GB of 20.43 GB resident"),
        part("model:1", 0.25e9, HOSTILE_NAME),
        part("context", None, "CUDA context and libraries"),
        part("allocator_cache", 2.1e9, "Allocator: cached"),
        part("unexplained", 0.2e9, "Unexplained"),
        part("free", 24e9 - used - 3.75e9, "Free"),
    ]
    why = [{"what": "fragmentation", "why": "cudaMallocAsync keeps no list of its blocks"}]
    device = {"device": "cuda:0", "name": "NVIDIA GeForce RTX 4090", "kind": "cuda"}
    device |= {"total_bytes": 24e9, "free_bytes": parts[-1]["bytes"], "parts": parts}
    model = {"name": HOSTILE_NAME, "file": None, "kind": "diffusion model", "dtype": "fp8_e4m3fn"}
    model |= {"device": "cuda:0", "bytes": 20.43e9, "resident_bytes": used, "ram_bytes": None}
    finding = {"id": "duplicate", "severity": "problem", "text": "Two copies of the text encoder."}
    finding |= {"action": "Merge their loaders.", "saves_bytes": 9e9}
    return {
        "version": 1,
        "running": False,
        "devices": [{**device, "not_measurable": why, "allocator": None}],
        "models": [{**model, "pinned_bytes": 0, "shared_with": 1, "duplicate_of": None}] * 12,
        "findings": [{**finding, "command": "QwenVRAM.MergeLoaders"}],
    }


def screenshot(page: Page, name: str) -> None:
    """For people who want to look: only where QWEN_VRAM_SCREENSHOTS names a folder."""
    if folder := os.environ.get("QWEN_VRAM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def open_panel(editor: Editor) -> Locator:
    """The panel, opened by its command."""
    if editor.page.evaluate(ACTIVE) != TAB:
        editor.page.evaluate(TOGGLE)
    panel = editor.page.locator(PANEL)
    panel.wait_for()
    return panel


def close_panel(editor: Editor) -> None:
    """The sidebar without a tab."""
    if editor.page.evaluate(ACTIVE) == TAB:
        editor.page.evaluate(TOGGLE)
    expect(editor.page.locator(PANEL)).to_have_count(0)


@pytest.fixture
def answer(editor: Editor) -> Iterator[Callable[[Callable[[Route], None]], None]]:
    """Lets a test answer in the server's place; after it the server answers again."""
    close_panel(editor)

    def by(handler: Callable[[Route], None]) -> None:
        editor.page.unroute(ROUTE)
        editor.page.route(ROUTE, handler)

    yield by
    editor.page.unroute(ROUTE)
    close_panel(editor)
    editor.problems.clear()  # a refused reply is in the console


def with_json(report: Any, status: int = 200) -> Callable[[Route], None]:
    """A handler that answers with a JSON value."""
    return lambda route: route.fulfill(status=status, json=report)


# ------------------------------------------------------------------------------------ what it shows
def test_sample_is_drawn_to_scale_and_as_plain_text(editor: Editor, answer) -> None:
    answer(with_json(sample()))
    panel = open_panel(editor)
    bar = panel.get_by_role("img")
    expect(bar).to_have_attribute(
        "aria-label", re.compile("^cuda:0 - NVIDIA GeForce RTX 4090: 15.75 GB of 24.00 GB in use")
    )
    widths = panel.evaluate(WIDTHS)
    assert widths == pytest.approx([x / 24 for x in (1.2, 12, 0.25, 2.1, 0.2, 8.25)], abs=0.004)
    expect(panel.locator("tbody tr", has_text="CUDA context")).to_contain_text("not measurable")
    assert HOSTILE_NAME.replace("\u202e", "") in panel.inner_text()
    assert editor.page.evaluate("() => window.hacked") is None
    expect(panel.get_by_role("button", name="Merge duplicate loaders")).to_be_visible()
    summary = panel.locator("summary")
    summary.focus()
    editor.page.keyboard.press("Enter")
    expect(panel.get_by_text("cudaMallocAsync keeps no list")).to_be_visible()
    screenshot(editor.page, "memory_panel_sample_dark")
    editor.page.evaluate(SETTING, ["Comfy.ColorPalette", "light"])
    editor.page.wait_for_timeout(SETTLE_MS)
    screenshot(editor.page, "memory_panel_sample_light")
    editor.page.evaluate(SETTING, ["Comfy.ColorPalette", "dark"])
    assert editor.problems == []


def test_focus_folds_and_scroll_stay_while_figures_change(editor: Editor, answer) -> None:
    used = iter(range(1, 1000))
    answer(lambda route: route.fulfill(json=sample(1e9 + 1e8 * next(used))))
    panel = open_panel(editor)
    summary = panel.locator("summary")
    summary.click()
    summary.focus()
    editor.page.evaluate(
        "() => { document.querySelector('.sidebar-content-container').scrollTop = 150; }"
    )
    scrolled = "() => document.querySelector('.sidebar-content-container').scrollTop"
    top, first = editor.page.evaluate(scrolled), panel.inner_text()
    assert top > 0
    assert editor.once(panel.inner_text, lambda text: text != first) != first
    assert editor.page.evaluate(scrolled) == top
    expect(summary).to_be_focused()
    expect(panel.locator("details")).to_have_attribute("open", "")


def test_tab_and_panel_speak_the_users_language(editor: Editor, answer) -> None:
    tab = editor.page.locator(f".{TAB}-tab-button")
    expect(tab).to_have_attribute("aria-label", "Memory: who holds it (Qwen VRAM)")
    answer(with_json(sample()))
    editor.page.evaluate(SETTING, ["Comfy.Locale", "zh"])
    try:
        expect(tab).to_have_attribute("aria-label", "内存：谁在占用（Qwen VRAM）")
        tab.click()
        panel = editor.page.locator(PANEL)
        expect(panel.get_by_role("button", name="探测最大可分配量")).to_be_visible()
        expect(panel.locator("tbody tr", has_text="CUDA 上下文和库")).to_contain_text("无法测量")
    finally:
        editor.page.evaluate(SETTING, ["Comfy.Locale", "en"])
    expect(tab).to_have_attribute("aria-label", re.compile("^Memory: who holds"))


def test_buttons_run_commands(editor: Editor, answer) -> None:
    editor.page.evaluate(CLEAR_COMMAND)
    report = sample()
    report["findings"][0]["command"] = "QwenVRAM.Clear.sometest"
    answer(with_json(report))
    panel = open_panel(editor)
    for buttons in (panel.locator(".finding button"), panel.locator(".actions button").last):
        buttons.click()
    assert editor.once(lambda: editor.page.evaluate("() => window.cleared"), 2) == 2


def test_probe_on_request_only(editor: Editor, answer) -> None:
    asked: list[str] = []

    def handler(route: Route) -> None:
        asked.append(route.request.method + route.request.url.partition("report")[2])
        report = sample()
        if asked[-1] == "GET?fragments=true":
            report["devices"][0]["allocator"] = {"backend": "native"}
            heap = {"largest_bytes": 5e8, "small_bytes": 2e9, "small_count": 7}
            report["devices"][0]["fragments"] = heap
        if asked[-1] == "POST":
            report["devices"][0]["largest_allocation"] = {"bytes": 8.1e9, "note": ""}
        route.fulfill(json=report)

    answer(handler)
    panel = open_panel(editor)
    panel.get_by_role("button", name="Probe the largest allocation").click()
    expect(panel.get_by_text("the largest allocation that succeeds now is 8.10 GB")).to_be_visible()
    editor.once(lambda: asked[-1], "GET")  # it asks once a second
    assert asked.count("POST") == 1 and asked[0] == asked[-1] == "GET"
    expect(panel.get_by_text("succeeds now is 8.10 GB")).to_be_visible()
    panel.get_by_role("button", name="Look at the free blocks").click()
    expect(panel.get_by_text("2.00 GB lie in 7 fragments smaller than 64 MB")).to_be_visible()
    assert asked.count("GET?fragments=true") == 1


# ------------------------------------------------------------------------------------ bad answers
def html(route: Route) -> None:
    """A proxy's page."""
    route.fulfill(body="<html><b>proxy</b>", content_type="text/html")


def giant(route: Route) -> None:
    """Eight megabytes that begin like a report."""
    route.fulfill(body='{"devices": [' + " " * (8 << 20))


BAD = {
    "html": (html, "no report"),
    "status": (lambda route: route.fulfill(status=502, body="<h1>Bad</h1>"), "502"),
    "giant": (giant, "too large"),
    "away": (lambda route: route.abort(), "cannot be reached"),
    "never": (lambda route: None, "did not answer within 5 seconds"),
}


def test_bad_answers_are_told_and_forgotten(editor: Editor, answer) -> None:
    for name, (handler, told) in BAD.items():
        answer(handler)
        with editor.hastened(5000, 500 if name == "never" else 60_000):
            said = open_panel(editor).locator(".said")
            expect(said).to_contain_text("No answer: ")
            expect(said).to_contain_text(told)
        began = time.monotonic()
        assert editor.page.evaluate("() => app.graph !== null")
        assert time.monotonic() - began < 10, f"{name}: the page hangs"
        close_panel(editor)

    answer(with_json(sample()))
    panel = open_panel(editor)
    expect(panel.locator(".bar")).to_be_visible()
    expect(panel.locator(".said")).to_be_empty()
    answer(with_json({"error": "This needs a sentence."}, 500))
    expect(panel.locator(".said")).to_contain_text(
        "This needs a sentence. The figures are those of"
    )
    expect(panel.locator(".bar")).to_be_visible()
    screenshot(editor.page, "memory_panel_no_answer")
    answer(with_json(sample()))
    expect(panel.locator(".said")).to_be_empty()


# ------------------------------------------------------------------------------------- when it asks
def test_asks_each_second_only_while_it_is_seen(editor: Editor, answer) -> None:
    open_now, most, asked = 0, 0, 0

    def began(request: Request) -> None:
        nonlocal open_now, most, asked
        if "/qwen_vram/report" in request.url:
            asked, open_now = asked + 1, open_now + 1
            most = max(most, open_now)

    def ended(request: Request) -> None:
        nonlocal open_now
        open_now -= "/qwen_vram/report" in request.url

    page = editor.page
    page.on("request", began)
    page.on("requestfinished", ended)
    try:
        answer(with_json(sample()))
        start = time.monotonic()
        open_panel(editor)
        assert editor.once(lambda: asked, lambda times: times > 2) > 2
        assert asked <= time.monotonic() - start + 2 and most == 1
        # Another tab of the frontend's own takes the place; destroy() is not called then.
        page.evaluate(
            "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.workflows')"
        )
        page.wait_for_timeout(SETTLE_MS)
        assert editor.once(lambda: open_now, 0) == 0
        before = asked
        page.wait_for_timeout(1300)
        assert asked == before
        page.evaluate(
            "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.workflows')"
        )
        open_panel(editor)
        assert editor.once(lambda: asked, lambda times: times > before) > before
    finally:
        page.remove_listener("request", began)
        page.remove_listener("requestfinished", ended)


def test_real_report_while_a_workflow_runs(editor: Editor, server: Server, workflow) -> None:
    editor.open(workflow)
    editor.shrink(steps=10_000)
    positive, _ = ids_of(workflow, "QwenVRAMCachedTextEncode")
    (sampler,) = ids_of(workflow, "KSampler")
    editor.set_widgets({str(positive): {"text": f"a red fox {uuid.uuid4()}"}})
    panel = open_panel(editor)
    ram = panel.locator(".device").last
    expect(ram.locator(".bar")).to_be_visible()
    editor.press_run()
    expect(panel.get_by_text("A workflow is running.")).to_be_visible(timeout=60_000)
    editor.page.wait_for_function(REACHED, arg=str(sampler), timeout=60_000)
    screenshot(editor.page, "memory_panel_running")
    server.post_json("/interrupt", {})
    assert editor.ran().status == "execution_interrupted"
    expect(panel.get_by_text("Nothing is running.")).to_be_visible(timeout=60_000)
    models = len(server.get_json("/qwen_vram/report")["models"])
    rows = panel.locator(".models tbody tr")
    assert editor.once(rows.count, models) == models > 0
    close_panel(editor)
    assert editor.problems == []
