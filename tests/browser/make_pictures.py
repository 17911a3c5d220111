"""Makes the pictures of the README: every node, and a graph for children, after a run.

No test: `python -m demo pictures` runs it, for it needs the server and the browser of the tests.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from pack.demo.animals import Scene, draw
from pack.demo.example_blocks import to_workflow, write_page
from pack.demo.examples import BY_MENU, EXAMPLES
from pack.demo.server import Server
from pack.tests.browser.editor import ENDS, FINISHED, SETTLE_MS, Editor
from pack.tests.browser.test_memory_panel import close_panel, open_panel
from pack.tests.browser.test_pins import menu, toast
from pack.tests.conftest import ROOT
from playwright.sync_api import Browser

MEDIA = ROOT / "media"
FRONT = ROOT / "subgraphs" / "Cute animal.json"
LANGUAGES = ("en", "zh")
WIDTH, SHARPNESS = 320, 2  # of a picture of a node on the page, and pixels for each of the page's
MARGIN, BADGES = 14, 34  # around a node and above its title, in units of the canvas
SLOWEST_MS = 600_000  # nine large tiles on a CPU
LIMIT = 20_000  # bytes of a picture of a node
LARGE = "large.png"  # nine tiles of 256 pixels
PLAIN = "plain.png"  # can be cut out
# What is run; what is shown are the numbers of the example.
SMALL: dict[str, Any] = {"width": 256, "height": 256, "reference_size": "own size"}
RUN_WITH: dict[str, dict[str, Any]] = {
    "QwenVRAMLoadTextEncoder": {"cache": "off"},  # nothing asks for it where the text is known
    "QwenVRAMTiledEdit": {"image": LARGE, "tile_size": 256, "overlap": 64, "steps": 4},
    "QwenVRAMTiledDiffusion": {"width": 2048, "height": 2048, "steps": 1, "cfg": 1.0},
    "QwenVRAMSplitTiles": {"image": LARGE},
    "QwenVRAMMergeTiles": {"image": LARGE},
    "QwenVRAMColouringPage": {"image": PLAIN},
    "QwenVRAMStickerSheet": {"image": PLAIN},
}
TWICE = ("QwenVRAMCachedTextEncode", "QwenVRAMCachedImageEditEncode")  # then the prompt is known
MORE_TRIES, NOTICE_MS = 4, 8000  # so long the editor tells that the last run has ended
NOTICE = "queue-notification-banner"
FORGET = """() => fetch("/api/free", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ unload_models: true, free_memory: true }),
}).then(() => null)"""
MENU_ITEMS = {"en": "Pin output (Qwen VRAM)", "zh": "固定输出 (Qwen VRAM)"}
IS_PINNED = {"en": "is pinned (", "zh": "已固定"}
TO_BE_PINNED = 3  # the node of that example

# The READMEs show it 900 pixels wide: few nodes, so that words can be read there.
FRONT_WIDTH, FRONT_MARGIN = 1600, 20
FRONT_SEED = 11
# Without a scarf this model draws no neck.
FRONT_PROMPT = {"words": "a little bear with a hat and a scarf", "seed": FRONT_SEED}
AS_TAUGHT = {"PrimitiveInt": 8, "PrimitiveFloat": 1.0}  # steps and CFG of the embedded model
FRONT_SHEET = {"paper": "A4 landscape, 150 dpi"}
# Title, class, place and size, whose picture it takes, and its own values; the first is there.
FRONT_NODES = (
    ("Cute animal", "", (0, 218, 420, 440), "", FRONT_PROMPT),
    ("Picture", "SaveImage", (490, 0, 310, 280), "Cute animal", {"filename_prefix": "animal"}),
    ("Colouring Page", "QwenVRAMColouringPage", (490, 342, 310, 150), "Cute animal", {}),
    ("Sticker Sheet", "QwenVRAMStickerSheet", (490, 556, 310, 320), "Cute animal", FRONT_SHEET),
    ("Page", "SaveImage", (870, 0, 390, 390), "Colouring Page", {"filename_prefix": "page"}),
    ("Stickers", "SaveImage", (870, 452, 390, 424), "Sticker Sheet", {"filename_prefix": "sheet"}),
)
FRONT_LIMIT = 200_000

HELP = ROOT / "demo" / "workflows" / "qwen_image_2512_tiny.json"
HELP_PAGES = ROOT / "js" / "docs"
WARM_UP = ".qwen-vram-warm-up"
CLEAR = "[data-testid=action-bar-buttons] button >> nth=1"
REMOVE = (
    "() => fetch('/qwen_vram/conditioning?everything=true', { method: 'DELETE' }).then(() => null)"
)
SAMPLING = """() => window.qwenVramEvents.some(([name, id]) =>
    name === 'executing' && app.graph.getNodeById(id)?.type === 'KSampler')"""

PANELS = (
    "Comfy.Minimap.Visible",
    "Comfy.Graph.CanvasInfo",
    "Comfy.Graph.CanvasMenu",
    "Comfy.RightSidePanel.IsOpen",
    "Comfy.Canvas.SelectionToolbox",
)
CLEAN = """async (ids) => {
    for (const id of ids) await app.extensionManager.setting.set(id, false);
}"""
# The node at the left top of the free canvas, so wide that the picture has its width.
PLACE = """async ([id, width, margin, above]) => {
    const node = app.graph.getNodeById(id), { canvas } = app, { ds } = canvas;
    canvas.deselectAll();
    canvas.links_render_mode = LiteGraph.HIDDEN_LINK;  // those of other nodes would run behind it
    ds.scale = width / (node.size[0] + 2 * margin);
    const top = node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT - above;
    const at = [90 / ds.scale, 130 / ds.scale];
    ds.offset = [at[0] - node.pos[0] + margin, at[1] - top];
    canvas.draw(true, true);
    const height = (LiteGraph.NODE_TITLE_HEIGHT + above + node.size[1] + margin) * ds.scale;
    const box = canvas.canvas.getBoundingClientRect();
    return { x: box.left + 90, y: box.top + 130, width, height };
}"""
AWAY = "() => { app.canvas.ds.offset = [0, 9999]; app.canvas.draw(true, true); }"
# Nodes as above; each is wired to the first output of its source that is a picture.
BUILD = """(nodes) => {
    const made = {};
    for (const [title, type, [x, y, width, height], source, values] of nodes) {
        const node = type ? LiteGraph.createNode(type) : app.graph.nodes[0];
        if (type) app.graph.add(node);
        if (type === 'SaveImage') node.title = title;
        node.pos = [x, y];
        node.setSize([width, height]);
        for (const [name, value] of Object.entries(values))
            node.widgets.find(w => w.name === name).value = value;
        made[title] = node;
        if (source) made[source].connect(
            made[source].outputs.findIndex(o => o.type === 'IMAGE'), node, 0);
    }
}"""
# The numbers inside a subgraph, by the class of the node.
INSIDE = """([id, values]) => {
    for (const node of app.graph.getNodeById(id).subgraph.nodes)
        if (node.type in values) node.widgets[0].value = values[node.type];
}"""
# All nodes, in the same place at the left top as PLACE.
SHOW = """(margin) => {
    const { canvas } = app, { ds } = canvas, boxes = app.graph.nodes.map(n => n.getBounding());
    canvas.deselectAll();
    const left = Math.min(...boxes.map(b => b[0])) - margin;
    const top = Math.min(...boxes.map(b => b[1])) - margin;
    const width = Math.max(...boxes.map(b => b[0] + b[2])) + margin - left;
    const height = Math.max(...boxes.map(b => b[1] + b[3])) + margin - top;
    ds.scale = 1;
    ds.offset = [90 - left, 130 - top];
    canvas.draw(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    return { x: box.left + 90, y: box.top + 130, width, height };
}"""


@pytest.fixture(scope="module")
def sharp(browser: Browser, official_names: Server) -> Iterator[Editor]:
    """The editor as on a screen with small pixels, without panels."""
    server = official_names
    draw(Scene("bear", "brown", background="meadow"), 640, 640).save(server.base / "input" / LARGE)
    draw(Scene("bear", "brown"), 640, 640).save(server.base / "input" / PLAIN)
    size = {"width": 1600, "height": 1500}
    page = browser.new_page(viewport=size, device_scale_factor=SHARPNESS)
    editor = Editor(page, server.url)
    yield editor
    page.close()


def wanted() -> list[str]:
    """The nodes that the command names, or all."""
    named = os.environ.get("QWEN_VRAM_PICTURES", "").split()
    if unknown := set(named) - EXAMPLES.keys():
        pytest.fail(f"demo/examples.py has no node {', '.join(sorted(unknown))}.")
    return named or list(EXAMPLES)


def speak(editor: Editor, language: str, server: Server) -> None:
    """Changes the language of the editor, as a user would in the settings."""
    server.post_json("/api/settings/Comfy.Locale", language)
    editor.start()
    editor.page.evaluate(CLEAN, PANELS)
    editor.page.evaluate("() => document.fonts.ready.then(() => null)")


def run(editor: Editor, changed: dict[str, Any], node_id: str = "", times: int = 1) -> None:
    """Runs the open workflow with other values, and shows its own again.

    A node must really have run: ComfyUI forgets its results a while after it was told to.
    """
    own = {str(i): dict(n["widgets"]) for i, n in editor.nodes().items()}
    shown = {i for i, n in editor.nodes().items() if n["type"] == node_id}
    editor.set_widgets({i: changed for i in own})
    for _ in range(times + MORE_TRIES):
        editor.page.evaluate(FORGET)
        editor.page.wait_for_timeout(1000)
        editor.press_run()
        editor.page.wait_for_function(FINISHED, arg=ENDS, timeout=SLOWEST_MS)
        ran = editor.ran()
        assert ran.status == "execution_success", ran.detail
        times -= not shown & ran.cached
        if times <= 0:
            break
    editor.set_widgets({i: {k: w[k] for k in changed.keys() & w.keys()} for i, w in own.items()})
    editor.page.wait_for_timeout(2 * SETTLE_MS)


def shot(editor: Editor, clip: dict[str, float]) -> PIL.Image.Image:
    """A part of the page."""
    editor.page.wait_for_timeout(SETTLE_MS)
    return PIL.Image.open(io.BytesIO(editor.page.screenshot(clip=clip))).convert("RGB")


def write(picture: PIL.Image.Image, path: Path, limit: int = LIMIT) -> None:
    """As WebP in the best quality that has no more bytes than the limit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = WIDTH * SHARPNESS
    if picture.width != width:
        height = round(picture.height * width / picture.width)
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    for quality in range(90, 20, -5):
        content = io.BytesIO()
        picture.save(content, "WEBP", quality=quality, method=6)
        if len(content.getvalue()) <= limit:
            break
    path.write_bytes(content.getvalue())


def of_node(editor: Editor, number: int) -> PIL.Image.Image:
    """A node with its badges and the ends of its wires."""
    clip = editor.page.evaluate(PLACE, [number, WIDTH, MARGIN, BADGES])
    return shot(editor, clip)


def of_menu(editor: Editor, language: str) -> PIL.Image.Image:
    """The menu of the node that the example pins."""
    clip = editor.page.evaluate(PLACE, [TO_BE_PINNED, WIDTH, MARGIN, BADGES])
    editor.page.mouse.click(clip["x"] + 60, clip["y"] + 45, button="right")
    item = editor.page.get_by_text(MENU_ITEMS[language], exact=True)
    item.hover()
    box = item.bounding_box()
    assert box
    picture = shot(editor, {**clip, "height": max(clip["height"], box["y"] + 60 - clip["y"])})
    editor.page.keyboard.press("Escape")
    return picture


def of_pinned(editor: Editor, language: str) -> PIL.Image.Image:
    """The node with its badge after it was pinned and run again."""
    menu(editor, TO_BE_PINNED, MENU_ITEMS[language])
    toast(editor, IS_PINNED[language])
    assert editor.run().status == "execution_success"
    return of_node(editor, TO_BE_PINNED)


def with_button(editor: Editor, button: str) -> PIL.Image.Image:
    """The bar beside Run from a button of ours on, and the message in the end."""
    editor.page.evaluate(AWAY)
    editor.page.wait_for_timeout(NOTICE_MS)
    editor.page.get_by_test_id(NOTICE).wait_for(state="hidden")
    editor.dismiss()
    pressed = editor.page.locator(button)
    pressed.click()
    message = editor.page.locator(".p-toast-message").first
    message.wait_for(timeout=60_000)
    editor.page.mouse.move(700, 1400)
    editor.page.wait_for_timeout(2 * SETTLE_MS)
    boxes = [editor.page.locator(WARM_UP).bounding_box(), message.bounding_box()]
    left = min(b["x"] for b in boxes if b) - MARGIN
    top = min(b["y"] for b in boxes if b) - MARGIN
    right = editor.page.evaluate("() => window.innerWidth")  # the bar ends just before
    bottom = max(b["y"] + b["height"] for b in boxes if b) + MARGIN
    return shot(editor, {"x": left, "y": top, "width": right - left, "height": bottom - top})


def of_warm_up(editor: Editor) -> PIL.Image.Image:
    """The button in the action bar, and the message in the end."""
    editor.set_widgets({str(i): SMALL for i in editor.nodes()})
    editor.page.evaluate(FORGET)
    return with_button(editor, WARM_UP)


def picture_of(editor: Editor, node_id: str, language: str) -> PIL.Image.Image:
    """What stands for a node after the example is open and has run."""
    special: dict[str, Callable[[], PIL.Image.Image]] = {
        "QwenVRAMPin": lambda: of_menu(editor, language),
        "QwenVRAMPinned": lambda: of_pinned(editor, language),
        "QwenVRAMWarmupSink": lambda: of_warm_up(editor),
    }
    if node_id in BY_MENU:
        return special[node_id]()
    number = next(i for i, n in editor.nodes().items() if n["type"] == node_id)
    return of_node(editor, number)


def make_examples(server: Server) -> None:
    """Writes the examples into the help pages."""
    info = server.get_json("/object_info")
    for node_id in wanted():
        for language in LANGUAGES:
            write_page(node_id, language, EXAMPLES[node_id], info)


@pytest.mark.parametrize("language", LANGUAGES)
def make_nodes(sharp: Editor, official_names: Server, language: str) -> None:
    """Takes the picture of every node that is wanted."""
    info = official_names.get_json("/object_info")
    speak(sharp, language, official_names)
    folder = MEDIA / "nodes" / ("" if language == "en" else language)
    for node_id in wanted():
        sharp.tidy()
        sharp.open(to_workflow(EXAMPLES[node_id], info))
        sharp.page.evaluate(CLEAN, PANELS)
        small = {**SMALL, **RUN_WITH.get(node_id, {})}
        run(sharp, small, node_id, 2 if node_id in TWICE else 1)
        sharp.dismiss()
        picture = picture_of(sharp, node_id, language)
        write(picture, folder / f"{node_id}.webp")
    speak(sharp, "en", official_names)


def make_front(sharp: Editor, official_names: Server) -> None:
    """Takes the picture on top of the README: the subgraph for children and what follows it."""
    speak(sharp, "en", official_names)
    sharp.tidy()
    sharp.open(json.loads(FRONT.read_text(encoding="utf-8")))
    sharp.page.evaluate(CLEAN, PANELS)
    sharp.page.evaluate(BUILD, FRONT_NODES)
    (first, *_) = sharp.nodes()
    sharp.page.evaluate(INSIDE, [first, AS_TAUGHT])
    sharp.set_widgets({str(first): {"value": False}})  # the embedded model has no such LoRA
    for _ in range(2):  # the second time its words are known
        run(sharp, SMALL)
        sharp.set_widgets({str(first): {"seed": FRONT_SEED}})
    sharp.set_widgets({str(first): {"value": True}})
    sharp.dismiss()
    picture = shot(sharp, sharp.page.evaluate(SHOW, FRONT_MARGIN))
    height = round(picture.height * FRONT_WIDTH / picture.width)
    picture = picture.resize((FRONT_WIDTH, height), PIL.Image.Resampling.LANCZOS)
    for quality in range(90, 50, -5):
        picture.save(MEDIA / "front.jpg", quality=quality, optimize=True, progressive=True)
        if (MEDIA / "front.jpg").stat().st_size < FRONT_LIMIT:
            break


def half(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture in the page's own pixels."""
    size = (picture.width // SHARPNESS, picture.height // SHARPNESS)
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


def of_memory(editor: Editor, server: Server) -> PIL.Image.Image:
    """The tab Memory while a workflow runs."""
    steps = {str(i): {"steps": 10_000} for i in editor.nodes()}
    editor.set_widgets(steps)
    open_panel(editor)
    editor.press_run()
    editor.page.wait_for_function(SAMPLING, timeout=60_000)
    editor.page.evaluate("() => { app.canvas.ds.reset(); app.canvas.ds.offset = [470, 250]; }")
    editor.page.wait_for_timeout(2500)  # the panel asks once a second
    picture = shot(editor, {"x": 0, "y": 0, "width": 800, "height": 900})
    server.post_json("/interrupt", {})
    assert editor.ran().status == "execution_interrupted"
    close_panel(editor)
    return picture


@pytest.mark.parametrize("language", LANGUAGES)
def make_help(sharp: Editor, official_names: Server, language: str) -> None:
    """Takes the pictures of the help pages and of the guide to the warm-up."""
    speak(sharp, language, official_names)
    sharp.tidy()
    sharp.open(json.loads(HELP.read_text(encoding="utf-8")))
    sharp.page.evaluate(CLEAN, PANELS)
    sharp.page.evaluate(FORGET)
    sharp.page.evaluate(REMOVE)
    warm = half(with_button(sharp, WARM_UP))
    if language == "en":
        warm.save(MEDIA / "warm_up.jpg", quality=90)
    pictures = {"Clear/clear_button": half(with_button(sharp, CLEAR))}
    pictures["Report/memory_panel"] = half(of_memory(sharp, official_names))
    for path, picture in pictures.items():
        node_id, name = path.split("/")
        name += "" if language == "en" else f"_{language}"
        few = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
        few.save(HELP_PAGES / f"{name}.png", optimize=True)
        if language != "en":  # GitHub looks beside the page, ComfyUI does not
            few.save(HELP_PAGES / f"QwenVRAM{node_id}" / f"{name}.png", optimize=True)
    speak(sharp, "en", official_names)
