"""Chromium against the shared server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.demo.server import Server
from pack.demo.serving import offer_workflows
from pack.demo.substitutions import MODEL_FILES
from pack.tests.browser.editor import Editor
from pack.tests.conftest import ROOT, missing
from playwright.sync_api import Browser, Page, expect, sync_playwright

COMMANDS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# As on a machine that has much else to do: the factor by which the page's own work takes longer.
SLOWER = "QWEN_VRAM_SLOWER_BROWSER"
# Nobody looks on: a quarter of the pictures per second, which cost more than all else in a page.
FEWER_FRAMES = """(() => {
    const real = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = act => window.setTimeout(() => real(act), 50);
    window.cancelAnimationFrame = window.clearTimeout.bind(window);
})()"""


def stem(path: Path) -> str:
    """A file's name without its ending."""
    return path.stem


def new_page(browser: Browser) -> Page:
    """A window of its own: of the tabs of one window, only that in front is drawn."""
    page = browser.new_page(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(60_000)  # milliseconds; a machine may be busy
    page.add_init_script(FEWER_FRAMES)
    if rate := os.environ.get(SLOWER):
        session = page.context.new_cdp_session(page)
        session.send("Emulation.setCPUThrottlingRate", {"rate": float(rate)})
    return page


def find_chromium() -> str | None:
    """The Chromium or Chrome of this machine."""
    on_path = [path for name in COMMANDS if (path := shutil.which(name))]
    return next(iter([*on_path, *(p for p in PLACES if Path(p).is_file())]), None)


@pytest.fixture(scope="module", params=sorted((ROOT / "workflows").glob("*.json")), ids=stem)
def bundled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each workflow as it is shipped."""
    return json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def workflow() -> dict[str, Any]:
    """The first of them, with the switch for the LoRA."""
    path = ROOT / "workflows" / "qwen_image_2512.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def official_names(server: Server) -> Server:
    """The shared server, with the tiny files under the official names beside their own.

    And with the pictures of `make run`: a page asks for the names of files when it is loaded.
    """
    offer_workflows(server.base)
    for file in list((server.base / "models").rglob("*.safetensors")):
        for official in (name for name, tiny in MODEL_FILES.items() if tiny == file.name):
            if not (target := file.with_name(official)).exists():
                os.link(file, target)
    return server


# For this folder, not for the session: while playwright runs, the thread has a running event loop,
# and the in-process host of the other tests could not run its own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    chromium = find_chromium() or missing("Chromium or Chrome")
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="package")
def only_page(browser: Browser, official_names: Server) -> Editor:
    """The frontend in a page of the size that the workflows are laid out for."""
    return Editor(new_page(browser), official_names.url)


@pytest.fixture(scope="module")
def editor(only_page: Editor, official_names: Server) -> Iterator[Editor]:
    """The page as if it was new; a test module that does not leave it so is told."""
    only_page.tidy()
    before = only_page.settings()
    yield only_page
    only_page.tidy()
    after = only_page.settings()
    assert after == before, "settings that a test has changed and left"
    empty = {"queue_running": [], "queue_pending": []}
    assert only_page.once(lambda: official_names.get_json("/queue"), empty) == empty
