"""Drives the real frontend in one Chromium page, with the words that the tests use."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
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
# Some nodes get their size when they are drawn, switches find their types in the picture after one
# is loaded, and what Vue draws comes some frames after the call that caused it: the same graph in
# two pictures, however long a picture takes.
AT_REST = """async () => {
    const file = () => JSON.stringify(app.rootGraph.serialize());
    const frame = () => new Promise(resolve => requestAnimationFrame(resolve));
    const end = performance.now() + 60_000;
    for (let same = 0, before = file(); same < 2;) {
        app.canvas.setDirty(true, true);
        do await frame(); while (app.canvas.dirty_canvas && performance.now() < end);
        if (performance.now() > end) throw new Error('The graph changes with every picture.');
        const now = file();
        same = now === before ? same + 1 : 0;
        before = now;
    }
}"""
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
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
# Undo replaces it at the end of its work.
STATE = f"() => {TRACKER}.activeState"
OTHER_STATE = f"before => {TRACKER}.activeState !== before"
HOLD_BACK = """held => {
    const real = window.setTimeout;
    const acts = [];
    window.setTimeout = (act, delay, ...rest) =>
        delay === held ? acts.push(() => act(...rest)) : real(act, delay, ...rest);
    window.letGo = () => acts.splice(0).forEach(act => act());
    window.unhasten = () => { window.setTimeout = real; };
}"""
# For what can be seen only by its not being there, and for pictures that people look at.
SETTLE_MS = 300
PATIENCE_SECONDS = 30.0  # a machine may be busy
POLL_MS = 50

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
        self.settle()
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

    @contextlib.contextmanager
    def held_back(self, usual_ms: int) -> Iterator[Callable[[], None]]:
        """The page's timers of one duration end when the function that it yields is called."""
        self.page.evaluate(HOLD_BACK, usual_ms)
        try:
            yield lambda: self.page.evaluate("() => window.letGo()")
        finally:
            self.page.evaluate("() => window.unhasten()")

    def open(self, workflow: dict[str, Any]) -> None:
        """Opens a workflow as a dropped file would."""
        self.page.evaluate(LOAD, workflow)
        self.settle()

    def settle(self) -> None:
        """Waits until the graph is drawn and stays as it is."""
        self.page.evaluate(AT_REST)

    def once(self, read: Callable[[], Any], wanted: object) -> Any:
        """What `read` gives when it is `wanted`, or when patience ends: for the caller to compare.

        `wanted` is a value, or says of one whether it will do.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            found = read()
            if wanted(found) if callable(wanted) else found == wanted:
                return found
            self.page.wait_for_timeout(POLL_MS)
        return read()

    def press_and_load(self, keys: str) -> None:
        """Presses the keys of undo or redo over the canvas; waits until the other state is there.

        Without one to go to, it waits until patience ends: the caller compares what there is.
        """
        before = self.page.evaluate_handle(STATE)
        self.page.keyboard.press(keys)
        self.once(lambda: self.page.evaluate(OTHER_STATE, before), True)
        self.settle()

    def complaint(self) -> str:
        """What the editor's overlay says about missing nodes or models, or nothing."""
        self.page.wait_for_timeout(SETTLE_MS)
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
        self.settle()
        executed = {top_level(detail) for name, detail in events if name == "executing" and detail}
        cached = [detail["nodes"] for name, detail in events if name == "execution_cached"]
        status, detail = next(event for event in events if event[0] in ENDS)
        return Ran(status, detail, executed, {top_level(i) for ids in cached for i in ids})
