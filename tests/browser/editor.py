"""Drives the real frontend in one Chromium page, with the words that the tests use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from pack.demo.substitutions import NUMBERS, substitute
from playwright.sync_api import ConsoleMessage, Page, Request

# A page that is loaded again opens its last workflow by itself: not over that of a test.
READY = """() => Boolean(window.app && app.extensionManager && app.graph && app.canvas)
    && LiteGraph.registered_node_types.QwenVRAMLoadVAE !== undefined
    && Boolean(app.extensionManager.workflow?.activeWorkflow)"""
LISTEN = """() => {
    window.qwenVramEvents = [];
    for (const name of ['execution_cached', 'executing', 'execution_success', 'execution_error',
                        'execution_interrupted'])
        app.api.addEventListener(name, e => window.qwenVramEvents.push([name, e.detail]));
}"""
LOAD = "async (workflow) => { await app.loadGraphData(workflow, true, true, 'test'); }"
NODES = """() => app.graph.nodes.map(n => ({
    id: Number(n.id), type: n.type,
    registered: LiteGraph.registered_node_types[n.type] !== undefined,
    errors: Boolean(n.has_errors),
    widgets: (n.widgets ?? []).map(w => [w.name, w.value]),
    saved: (n.widgets ?? []).filter(w => w.serialize !== false).map(w => w.value),
}))"""
# What Save writes is not graph.serialize(): graphToPrompt drops unlinked widget slots from it.
TO_FILE = "async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).workflow))"
TO_PROMPT = "async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))"
SET_WIDGETS = """(values) => {
    for (const [id, inputs] of Object.entries(values))
        for (const widget of app.graph.getNodeById(id).widgets ?? [])
            if (widget.name in inputs && !Array.isArray(inputs[widget.name]))  // a link
                widget.value = inputs[widget.name];
}"""
# Some nodes get their size when they are drawn.
FRAMES = "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r())))"
ENDS = ("execution_success", "execution_error", "execution_interrupted")
FINISHED = "(ends) => window.qwenVramEvents.some(([name]) => ends.includes(name))"
CENTRE = "(id) => app.canvas.centerOnNode(app.graph.getNodeById(id))"
PICTURE = """(id) => {
    const image = app.graph.getNodeById(id).imgs?.[0];
    return image?.naturalWidth ? [image.naturalWidth, image.naturalHeight] : null;
}"""
DISMISS = "() => app.extensionManager.toast.removeAll()"
NO_TOASTS = "() => !document.querySelector('.p-toast-message')"
TIDY = """async () => {
    const { sidebarTab, command, workflow } = app.extensionManager;
    if (sidebarTab.activeSidebarTabId) sidebarTab.toggleSidebarTab(sidebarTab.activeSidebarTabId);
    await command.execute('Comfy.NewBlankWorkflow');
    for (const tab of [...workflow.openWorkflows])
        if (tab !== workflow.activeWorkflow) await workflow.closeWorkflow(tab);
    app.canvas.deselectAll();
    return workflow.openWorkflows.length;
}"""
# All that is not the default: of ours, and what else a test may change.
SETTINGS = """() => Object.fromEntries(
    ['Comfy.Locale', 'Comfy.ColorPalette', 'Comfy.VueNodes.Enabled',
     ...Object.keys(app.extensionManager.setting.settings).filter(id => id.startsWith('QwenVRAM.'))]
    .map(id => [id, app.extensionManager.setting.get(id)]))"""
HASTEN = """([usual, instead]) => {
    const real = window.setTimeout;
    window.setTimeout = (act, delay, ...rest) => real(act, delay === usual ? instead : delay, ...rest);
    window.unhasten = () => { window.setTimeout = real; };
}"""
# Vue draws the error overlay and the status lines some frames after the call that caused them.
SETTLE_MS = 300

# What every start on an empty profile logs: files that only exist once a user has made them.
# A help page is first looked for under the language.
HARMLESS_404 = re.compile(r"/user\.css$|/api/userdata|/docs/\w+/en\.md$")
HARMLESS_TEXT = ("ComfyApp graph accessed before initialization",)


def top_level(node_id: str | int) -> int:
    """The node of the workflow itself: one inside a subgraph has an id as "12:3"."""
    return int(str(node_id).partition(":")[0])


@dataclass(frozen=True)
class Ran:
    """What the host's events said about one press of the Run button."""

    status: str
    detail: Any
    executed: set[int]
    cached: set[int]


class Editor:
    """The frontend in one page; `problems` collects complaints of the console and requests elsewhere."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._on_request)
        self.start()

    def _on_console(self, message: ConsoleMessage) -> None:
        address = message.location.get("url", "")
        absent = "404" in message.text and HARMLESS_404.search(address) is not None
        harmless = absent or any(text in message.text for text in HARMLESS_TEXT)
        if message.type == "error" and not harmless:
            self.problems.append(f"{message.text} ({address})")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def start(self) -> None:
        """Loads the frontend, or loads it again, and waits until it has our nodes."""
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.wait_for_timeout(SETTLE_MS)
        self.page.evaluate(LISTEN)

    def tidy(self) -> None:
        """One empty graph; no tab of the sidebar, dialog, toast, selection, handler or complaint."""
        self.page.unroute_all()
        for _ in range(self.page.get_by_role("dialog").count()):
            self.page.keyboard.press("Escape")
        assert self.page.evaluate(TIDY) == 1
        self.page.mouse.move(720, 880)
        self.dismiss()
        self.problems.clear()

    def dismiss(self) -> None:
        """Close all toasts, and wait until none is seen."""
        self.page.evaluate(DISMISS)
        self.page.wait_for_function(NO_TOASTS)

    def settings(self) -> dict[str, Any]:
        """The values of our settings, and of others that tests change."""
        return self.page.evaluate(SETTINGS)

    @contextlib.contextmanager
    def hastened(self, usual_ms: int, instead_ms: int) -> Iterator[None]:
        """The page's timers of one duration take another one."""
        self.page.evaluate(HASTEN, [usual_ms, instead_ms])
        try:
            yield
        finally:
            self.page.evaluate("() => window.unhasten()")

    def open(self, workflow: dict[str, Any]) -> None:
        """Opens a workflow as a dropped file would."""
        self.page.evaluate(LOAD, workflow)
        self.page.evaluate(FRAMES)
        self.page.wait_for_timeout(SETTLE_MS)

    def complaint(self) -> str:
        """What the editor's overlay says about missing nodes or models, or nothing."""
        overlay = self.page.get_by_test_id("error-overlay")
        dialog = self.page.get_by_role("dialog")
        return "\n".join(shown.first.inner_text() for shown in (overlay, dialog) if shown.count())

    def nodes(self) -> dict[int, dict[str, Any]]:
        """Every node in the graph, by id."""
        return {node["id"]: node for node in self.page.evaluate(NODES)}

    def picture(self, node_id: int) -> list[int]:
        """The width and height of the picture that a node shows, once it does."""
        self.page.evaluate(CENTRE, node_id)  # what is out of view is not drawn and loads nothing
        return self.page.wait_for_function(PICTURE, arg=node_id, timeout=20_000).json_value()

    def widgets(self, node_id: int) -> dict[str, Any]:
        """A node's widget values by name."""
        return dict(self.nodes()[node_id]["widgets"])

    def saved(self) -> dict[str, Any]:
        """The graph as Save would write it."""
        return self.page.evaluate(TO_FILE)

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The graph as Run would send it."""
        return self.page.evaluate(TO_PROMPT)

    def set_widgets(self, values: dict[str, dict[str, Any]]) -> None:
        """Sets widgets, given as {node id: {widget: value}}."""
        self.page.evaluate(SET_WIDGETS, values)

    def shrink(self, **smaller: int) -> None:
        """Sets the widgets by the table that the demo uses, or some to less than it says."""
        with mock.patch.dict(NUMBERS, smaller):
            small = substitute(self.prompt())
        self.set_widgets({node_id: node["inputs"] for node_id, node in small.items()})

    def run(self) -> Ran:
        """Presses Run and waits for the end."""
        self.press_run()
        return self.ran()

    def press_run(self) -> None:
        """Presses Run and waits for nothing."""
        self.page.evaluate("() => { window.qwenVramEvents.length = 0; }")
        self.page.get_by_test_id("queue-button").first.click()

    def ran(self) -> Ran:
        """Waits for the end of the run that was started last."""
        self.page.wait_for_function(FINISHED, arg=ENDS, timeout=180_000)
        events = self.page.evaluate("() => window.qwenVramEvents")
        self.page.wait_for_timeout(SETTLE_MS)
        executed = {top_level(detail) for name, detail in events if name == "executing" and detail}
        cached = [detail["nodes"] for name, detail in events if name == "execution_cached"]
        status, detail = next(event for event in events if event[0] in ENDS)
        return Ran(status, detail, executed, {top_level(i) for ids in cached for i in ids})
