"""`make run`: ComfyUI in the browser, with workflows and pictures for the embedded model."""

from __future__ import annotations

import json
import shutil
import urllib.request
import webbrowser
from pathlib import Path

from .animals import Scene, draw
from .checkpoints import make_checkpoints
from .environment import say
from .server import HOST, Server, free_port
from .showcase import BASE, DemoError, has_accelerator, new_server

WORKFLOWS = Path(__file__).with_name("workflows")
OPENED = "qwen_image_2512_tiny"
OTHERS = {  # what the others do
    "cute_animal_for_kids_tiny": "draws for children, with a colouring page and stickers",
    "qwen_image_edit_tiny": "changes a picture",
    "qwen_image_edit_tiled_tiny": "changes a larger one by tiles",
    "qwen_image_edit_fast_tiny": "changes a picture in less time",
}
SCENE = Scene("pig", "pink", background="snow", jitter=5)
PICTURES = {  # to be edited, and how large they are
    "tiny_pig.png": (SCENE, 256),
    "tiny_photo.png": (Scene("bear", "brown", background="meadow", jitter=3), 320),
}
TEMPLATES = "demo-workflows"  # a custom node without nodes: ComfyUI offers its workflows
EXAMPLE = "example.png"  # of ComfyUI: the workflows for editing begin with it
PORT = 8188


def offer_workflows(base: Path) -> None:
    """Puts the workflows where ComfyUI looks for a user's own and for templates."""
    templates = base / "custom_nodes" / TEMPLATES
    for folder in (base / "user" / "default" / "workflows", templates / "workflows"):
        shutil.copytree(WORKFLOWS, folder, dirs_exist_ok=True)
    (templates / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    (base / "input").mkdir(parents=True, exist_ok=True)
    for name, (scene, side) in PICTURES.items():
        draw(scene, side, side).save(base / "input" / name)


def copy_example(comfyui: Path, base: Path) -> None:
    """The picture that ComfyUI brings to where this one looks for it, unless it was deleted."""
    if (picture := comfyui / "input" / EXAMPLE).exists():
        shutil.copy(picture, base / "input")


def address(server: Server) -> str:
    """Of the editor with a workflow open; without the query it would open ComfyUI's own."""
    return f"{server.url}/?template={OPENED}&source={TEMPLATES}"


def running(base: Path, port: int = PORT) -> str | None:
    """The address of a ComfyUI that was started on this folder before, if it answers."""
    url = f"http://{HOST}:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/qwen_vram/conditioning", timeout=5) as response:
            folder = Path(json.loads(response.read())["folder"])
    except (OSError, ValueError, KeyError, TypeError):  # nobody there, or something else
        return None
    return url if base.resolve() in folder.resolve().parents else None


def serve(comfyui: Path) -> None:
    """Opens ComfyUI with the pack and the embedded model in the browser until Ctrl-C."""
    if (other := running(BASE)) is not None:
        say(f"another is running at {other}; this one gets a port and a log of its own")
    port = free_port(PORT)
    first = port == PORT
    name = "run" if first else f"run_{port}"
    # ComfyUI empties its temporary folder when it starts.
    extra = [] if first else ["--temp-directory", str(BASE / name)]
    make_checkpoints(comfyui, BASE / "models")
    offer_workflows(BASE)
    copy_example(comfyui, BASE)
    say("starting ComfyUI")
    with new_server(comfyui, not has_accelerator(), name, extra, port) as server:
        say(f"ComfyUI is at {address(server)}, which opens {OPENED}: press Run there")
        others = "; ".join(f"{name} {does}" for name, does in OTHERS.items())
        say(f"in the Workflows panel on the left (key W): {others}")
        say(f"Ctrl-C ends it (log: {server.log_file})")
        webbrowser.open(address(server))
        try:
            server.wait()
        except KeyboardInterrupt:
            say("stopping ComfyUI")
            return
        raise DemoError(f"ComfyUI ended by itself.\n{server.log_tail()}")
