"""The warm-up button in the real frontend: what it shows, how it is cancelled, what it leaves."""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.demo.server import Server
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_cache_panel import COMMAND, LOAD_API, SETTING, screenshot
from pack.tests.browser.test_workflow import ids_of
from pack.tests.graphs import node, text_to_image
from playwright.sync_api import Locator, Route, expect

ROUTE = "**/qwen_vram/warmup*"  # DELETE names the warm-up
AUTOMATIC = "QwenVRAM.WarmUp.Automatic"
STATE = """() => {
    const { isModified, changeTracker } = app.extensionManager.workflow.activeWorkflow;
    return JSON.stringify([isModified, changeTracker.undoQueue.length, changeTracker.redoQueue.length,
        changeTracker.activeState, app.nodeOutputs, app.graph.nodes.map(n => [n.imgs?.length,
        n.progress, n.badges.map(b => (typeof b === 'function' ? b() : b).text)])]);
}"""
CAPTURE = "() => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()"
AGAIN = """graph =>  // as undo does
    app.loadGraphData(graph, true, true, app.extensionManager.workflow.activeWorkflow)"""


EMPTY: dict[str, list[Any]] = {"queue_running": [], "queue_pending": []}


@pytest.fixture
def clean(editor: Editor, server: Server) -> Iterator[Editor]:
    """The page without toasts and settings of this test, before and after; the queue empty."""
    editor.dismiss()
    yield editor
    editor.page.unroute(ROUTE)
    editor.page.evaluate(SETTING, [AUTOMATIC, "off"])
    editor.dismiss()
    queue = editor.once(lambda: server.get_json("/queue"), EMPTY)
    assert (queue, editor.problems) == (EMPTY, [])


def button(editor: Editor) -> Locator:
    """The button beside Run."""
    return editor.page.locator(".qwen-vram-warm-up")


def idle(editor: Editor) -> None:
    """Wait until nothing is warmed up any longer."""
    expect(button(editor)).to_have_text("Warm up", timeout=60_000)


def toast(editor: Editor) -> str:
    """The text of the one message, once it is there."""
    detail = editor.page.locator(".p-toast-detail")
    expect(detail).to_have_count(1, timeout=60_000)
    return detail.inner_text()


def files(server: Server) -> set[Path]:
    """All that a run may write for the user."""
    folders = (server.base / name for name in ("output", "temp", "input"))
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def open_long(editor: Editor, samplers: int = 24) -> None:
    """Open a graph whose warm-up takes seconds, and may be stopped in each of them."""
    graph = text_to_image(text=f"a fox {uuid.uuid4().hex}", size=640, steps=1)
    latent = "latent"
    for number in range(samplers):
        graph[f"s{number}"] = copy.deepcopy(graph["sampler"])
        graph[f"s{number}"]["inputs"]["latent_image"] = [latent, 0]
        latent = f"s{number}"
    graph["look"] = node("PreviewAny", source=[latent, 0])
    for name in ("sampler", "decode", "save", "vae"):
        del graph[name]
    numbers = {name: str(number) for number, name in enumerate(graph, start=1)}
    text = json.dumps(list(graph.values()))
    for name, number in numbers.items():
        text = text.replace(f'["{name}", ', f'["{number}", ')
    editor.page.evaluate(LOAD_API, dict(zip(numbers.values(), json.loads(text), strict=True)))
    editor.settle()


def test_a_press_warms_up_and_leaves_no_trace(clean: Editor, workflow, server: Server) -> None:
    editor = clean
    editor.open(workflow)
    editor.shrink()
    (positive, _), (sampler,) = (
        ids_of(workflow, "QwenVRAMCachedTextEncode"),
        ids_of(workflow, "KSampler"),
    )
    editor.set_widgets(
        {
            str(positive): {"text": f"a fox {uuid.uuid4().hex}"},
            str(sampler): {"control_after_generate": "randomize"},
        }
    )
    editor.settle()
    editor.page.evaluate(CAPTURE)
    before, history = files(server), server.get_json("/history")
    state, saved = editor.page.evaluate(STATE), editor.saved()
    button(editor).click()
    text = toast(editor)
    screenshot(editor.page, "warm_up_done")
    assert re.search(r"^Ready after [\d.]+ s\. Loaded: .*diffusion model .* MB \(cpu\)", text)
    assert "Prompts and pictures: " in text
    assert (files(server), server.get_json("/history")) == (before, history)
    assert (editor.page.evaluate(STATE), editor.saved()) == (state, saved)
    ran = editor.run()
    assert ran.status == "execution_success" and positive in ran.cached


def test_progress_is_shown_and_a_second_press_or_run_cancels(clean: Editor, server: Server) -> None:
    editor = clean
    open_long(editor)
    editor.page.keyboard.press("Alt+w")
    expect(button(editor)).to_have_text(re.compile(r"^[1-9]\d? %$"), timeout=60_000)
    expect(button(editor).locator(".pi-spinner")).to_be_visible()
    button(editor).hover()
    expect(editor.page.get_by_role("tooltip")).to_contain_text("Press again to cancel")
    screenshot(editor.page, "warm_up_running")
    button(editor).click()
    idle(editor)
    assert toast(editor).startswith("Cancelled.")
    editor.dismiss()
    open_long(editor, 12)  # another: of the first one, results are kept
    button(editor).click()
    expect(button(editor)).to_have_text(re.compile(r"^\d+ %$"), timeout=60_000)
    history = server.get_json("/history").keys()
    editor.press_run()
    idle(editor)
    assert toast(editor).startswith("Cancelled.")  # now: it is gone before a long run has ended
    assert editor.ran().status == "execution_success"
    assert len(server.get_json("/history").keys() - history) == 1


def test_it_waits_for_a_run_and_goes_on_after_a_reload(clean: Editor, server: Server) -> None:
    editor = clean
    open_long(editor)
    server.post_json("/prompt", {"prompt": text_to_image(str(uuid.uuid4()), steps=10_000)})
    button(editor).click()
    assert toast(editor) == "Waits for 1 run in the queue."
    expect(button(editor)).to_have_text("…")
    editor.start()
    expect(button(editor)).to_have_text("…")
    server.post_json("/interrupt", {})
    expect(button(editor)).to_have_text(re.compile(r"^\d+ %$"), timeout=60_000)
    editor.page.evaluate(COMMAND, "QwenVRAM.WarmUp")
    idle(editor)


def test_a_hostile_or_broken_answer_gives_a_message(clean: Editor) -> None:
    editor = clean
    answer: dict[str, Any] = {}
    editor.page.route(ROUTE, lambda route: route.fulfill(**answer))
    for status, body, said in (
        (200, "no JSON", "cannot be read"),
        (200, '{"id": 3}', "cannot be read"),
        (400, '{"error": "Node 7 is odd."}', "It cannot run. Node 7 is odd."),
        (500, "<html>", "cannot be read"),
    ):
        editor.dismiss()
        answer.update(status=status, body=body)
        button(editor).click()
        assert said in toast(editor)
        idle(editor)
    editor.problems.clear()  # the statuses, which the console repeats


def test_a_server_that_falls_silent_or_talks_nonsense_later_gives_a_message(clean: Editor) -> None:
    editor = clean
    accepted = {"id": "a", "state": "running", "problems": [], "percent": 7}

    def answer(route: Route) -> None:
        if route.request.method == "POST":
            route.fulfill(json=accepted)
        elif said.startswith("ComfyUI does not"):
            route.abort()
        else:
            route.fulfill(json={"id": "a", "state": "done", "problems": [], "result": "<img>"})

    editor.page.route(ROUTE, answer)
    for said in ("ComfyUI does not answer", "ComfyUI sent an answer that cannot be read"):
        button(editor).click()
        expect(editor.page.locator(".p-toast-detail", has_text=said)).to_be_visible(timeout=20_000)
        idle(editor)
    editor.problems.clear()  # the aborted requests


def test_a_press_while_it_is_sent_cancels_and_a_refused_cancel_is_told(clean: Editor) -> None:
    editor, sent, held = clean, [], []
    report = {"id": "a b", "state": "running", "problems": [], "percent": 7}
    refusals = [{"error": "Another one.", "code": "another"}, None]

    def answer(route: Route) -> None:
        if route.request.method == "GET":
            route.fulfill(json=report)
        elif route.request.method == "POST":
            held.append(route)
        else:
            sent.append(route.request.url.partition("?")[2])
            refusal = refusals.pop(0)
            if refusal is None:
                report["state"] = "cancelled"
            route.fulfill(json=refusal or {"cancelled": True}, status=409 if refusal else 200)

    editor.page.route(ROUTE, answer)
    button(editor).click()
    expect(button(editor)).to_have_text("…")
    button(editor).click()
    assert (len(held), sent) == (1, [])
    held[0].fulfill(json=report)
    told = editor.page.locator(".p-toast-detail")
    expect(told).to_have_text("It could not be cancelled. Another one.")
    assert sent == ["id=a%20b"]
    expect(button(editor)).to_have_text("7 %")
    button(editor).click()
    idle(editor)
    expect(told.last).to_contain_text("Cancelled.")
    editor.problems.clear()  # the status 409, which the console repeats


def test_by_itself_when_a_workflow_is_opened(clean: Editor) -> None:
    editor, name = clean, uuid.uuid4().hex
    editor.page.evaluate(LOAD_API, text_to_image(text=name))
    saved = editor.saved()
    editor.page.evaluate(SETTING, [AUTOMATIC, "workflow opened"])
    opening = "([graph, name]) => app.loadGraphData(graph, true, true, name)"
    editor.page.evaluate(opening, [saved, name])
    assert toast(editor).startswith("Ready after")
    editor.dismiss()
    editor.page.evaluate(AGAIN, saved)
    editor.page.wait_for_timeout(1300)
    assert editor.page.locator(".p-toast-detail").count() == 0
    editor.page.route("**/api/prompt", lambda route: route.abort())
    editor.page.evaluate(opening, [saved, f"{name} 2"])
    assert toast(editor) == "ComfyUI does not answer. The workflow is not warmed up."
    editor.page.unroute("**/api/prompt")
    editor.problems.clear()  # the aborted request
