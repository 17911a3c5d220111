"""Clear VRAM in the real frontend: its button, key binding and commands, and what it says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pack.demo.server import Server
from pack.tests.browser.editor import Editor
from pack.tests.graphs import UNET, VAE, text_to_image
from pack.tests.server.test_clear import STEPS, sampling
from playwright.sync_api import Locator, Page, Request, Route, expect

ROUTE = "**/qwen_vram/clear"
COMMAND = "id => { app.extensionManager.command.execute(id); }"
SETTING = "([id, value]) => app.extensionManager.setting.set(id, value)"
LEVEL = "QwenVRAM.Clear.Level"
HOSTILE = [
    ({"status": 500, "body": "<html><b onclick=alert(1)>Oops</b></html>"}, "sense (status 500)"),
    ({"status": 200, "body": ""}, "makes no sense (status 200)"),
    ({"status": 201, "body": '{"done": "perhaps"}'}, "makes no sense (status 201)"),
    ({"status": 403, "body": '{"error": "Only <b>own</b> pages."}'}, "Only <b>own</b> pages."),
]
TOAST = ".p-toast-message"


@pytest.fixture
def page(editor: Editor) -> Page:
    """With no toast and no dialog open."""
    editor.dismiss()
    return editor.page


# By the memory that was freed: of models that lie in the RAM most often none.
UNLOADED = re.compile(f"Nothing to unload: the models are in RAM|Unloaded: .*{re.escape(UNET)}")


def toast(page: Page, *texts: str | re.Pattern[str]) -> Locator:
    """The toast that has all these texts."""
    found = page.locator(TOAST).filter(has_text=texts[0])
    for text in texts[1:]:
        found = found.filter(has_text=text)
    found.first.wait_for(timeout=30_000)
    return found.first


def screenshot(page: Page, name: str) -> None:
    """For people to look at, into the folder that QWEN_VRAM_SCREENSHOTS names."""
    if folder := os.environ.get("QWEN_VRAM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def button(page: Page) -> Locator:
    """In the bar beside Run."""
    return page.get_by_test_id("action-bar-buttons").get_by_role("button", name="VRAM").first


def pressed(page: Page, act: Any) -> dict[str, Any]:
    """The body of the request that an action sends."""
    with page.expect_request(ROUTE) as sent:
        act()
    request: Request = sent.value
    assert request.method == "POST"
    return json.loads(request.post_data)


def test_the_buttons_stand_in_one_order(page: Page) -> None:
    """One file registers both: the order of files differs from one load of the page to the next."""
    bar = page.get_by_test_id("action-bar-buttons")
    expect(bar.get_by_role("button")).to_have_text(["Warm up", "Clear VRAM"])
    files = (Path(__file__).resolve().parents[2] / "js").glob("*.js")
    registering = [file.name for file in files if "actionBarButtons" in file.read_text("utf-8")]
    assert registering == ["action_bar.js"]


def test_the_button_unloads_all_models_and_says_so(page: Page, official_names: Server) -> None:
    assert official_names.submit(text_to_image(seed=21)).status == "success"
    body = pressed(page, lambda: button(page).click())
    assert body["level"] == "models" and "prompt" not in body
    shown = toast(page, UNLOADED)
    assert "RAM:" in shown.inner_text()
    screenshot(page, "clear_button")
    assert official_names.post_json("/qwen_vram/clear", {"level": "models"})["unloaded"] == []


def test_the_setting_says_what_button_and_key_free(page: Page, official_names: Server) -> None:
    graph = text_to_image(seed=22)
    assert official_names.submit(graph).status == "success"
    page.evaluate("graph => app.loadApiJson(graph, 'test')", {"vae": graph["vae"]})
    page.evaluate(SETTING, [LEVEL, "needed"])
    try:
        page.mouse.click(700, 700)  # on the canvas
        body = pressed(page, lambda: page.keyboard.press("Control+Alt+m"))
        assert body["keep_needed"] and [n["class_type"] for n in body["prompt"].values()] == [
            "QwenVRAMLoadVAE"
        ]
        toast(page, "Unloaded:", UNET, f"Kept, because the workflow needs it: {VAE}")
    finally:
        page.evaluate(SETTING, [LEVEL, "models"])


TYPED = """([key, ctrlKey]) => {
    const text = document.querySelector('textarea.comfy-multiline-input');
    text.focus();
    const event = new KeyboardEvent('keydown', { key, ctrlKey, altKey: true, bubbles: true, cancelable: true });
    return text.dispatchEvent(event);  // false: somebody took it
}"""


def test_letters_of_altgr_and_option_can_be_typed(editor: Editor, page: Page, workflow) -> None:
    editor.open(workflow)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    assert page.evaluate(TYPED, ["µ", True])  # AltGr+M on Windows, Ctrl+Option+M on a Mac
    assert page.evaluate(TYPED, ["∑", False])  # Option+W
    assert not page.evaluate(TYPED, ["m", True])  # Ctrl+Alt+M, which types nothing: the binding
    toast(page, "RAM:")
    assert len([url for url in sent if "/qwen_vram/" in url]) == 1


def test_every_level_has_a_command(editor: Editor, page: Page) -> None:
    for level in ("cache", "models", "everything"):
        command = f"QwenVRAM.Clear.{level.capitalize()}"
        body = pressed(page, lambda command=command: page.evaluate(COMMAND, command))
        assert body["level"] == level
        toast(page, "RAM:")
        editor.dismiss()


def test_a_strange_reply_gets_a_message(editor: Editor, page: Page) -> None:
    replies = [reply for reply, _ in HOSTILE]
    page.route(ROUTE, lambda route: route.fulfill(**replies.pop(0)))
    try:
        for _, said in HOSTILE:
            button(page).click()
            toast(page, said)
            expect(page.locator(TOAST)).to_have_count(1)
            screenshot(page, "clear_hostile")
            assert page.locator(TOAST).locator("b").count() == 0
            editor.dismiss()
    finally:
        page.unroute(ROUTE)
        # The browser itself notes the status of a failed request.
        editor.problems[:] = [p for p in editor.problems if "Failed to load resource" not in p]


def test_a_workflow_that_cannot_be_read_gets_a_message(page: Page) -> None:
    page.evaluate("() => { app.graphToPrompt = () => { throw new Error('broken'); }; }")
    try:
        page.evaluate(COMMAND, "QwenVRAM.Clear.Needed")
        toast(page, "The open workflow cannot be read (broken). Nothing was freed.")
    finally:
        page.evaluate("() => { delete app.graphToPrompt; }")


def test_while_a_node_runs_the_button_says_so_and_tells_the_result_later(
    editor: Editor, page: Page, official_names: Server
) -> None:
    waits = "Memory is freed as soon as the running node ends."

    def hasten(route: Route) -> None:
        """Let it wait no second for the end of the node."""
        body = {**json.loads(route.request.post_data), "wait_seconds": 0}
        route.continue_(post_data=json.dumps(body))

    page.route(ROUTE, hasten)
    try:
        for steps in STEPS:
            editor.dismiss()
            with sampling(official_names, steps):
                button(page).click()
                told = toast(page, "Clear VRAM").inner_text()
                screenshot(page, "clear_waits")
            toast(page, UNLOADED)
            if waits in told:
                break
        assert waits in told
    finally:
        page.unroute(ROUTE)


def test_a_reply_that_never_comes_gets_a_message(editor: Editor, page: Page) -> None:
    held: list[Route] = []
    page.route(ROUTE, lambda route: held.append(route))
    try:
        with editor.held_back(30_000) as let_go:
            pressed(page, lambda: button(page).click())
            button(page).click()  # nothing: the first is under way
            let_go()
            toast(page, "The server does not answer.")
        assert len(held) == 1
    finally:
        page.unroute(ROUTE)
    pressed(page, lambda: button(page).click())
    toast(page, "RAM:")


def test_the_page_complained_of_nothing(editor: Editor) -> None:
    assert editor.problems == []
