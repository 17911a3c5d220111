"""Thumbnails of the bundled workflows: what the embedded model makes of them, and their cards."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .animals import draw
from .checkpoints import make_checkpoints
from .conversion import to_api
from .environment import ROOT, say
from .server import Server
from .serving import PICTURES
from .showcase import BASE, DemoError, has_accelerator, new_server
from .substitutions import Prompt, substitute

OWN = BASE / "thumbnails"  # user and temporary files: what `make run` keeps is left alone
SIZE = (640, 400)
BAND, PADDING, QUALITY = 64, 12, 88
PAPER, INK, DARK, PILL = "#f6f3ec", "#1f2430", "#1f2430", "#ffd166"
EDIT, BEACH = "make it blue", "put it on the beach"
# As the embedded model was taught, and without its random LoRA.
AS_TAUGHT = {"cfg": 1.0, "strength_model": 0.0, "text": EDIT, "instruction": EDIT, "seed": 5}


@dataclass(frozen=True)
class Recipe:
    """What to write into the inputs of a workflow, once for each run, and what to show of it."""

    runs: tuple[dict[str, Any], ...]
    before: str = ""  # one of the pictures of `make run`, which is edited; it comes first
    previews: bool = False  # also what is shown and not saved


def _drawing(text: str, **more: Any) -> dict[str, Any]:
    return {"positive": text, "negative": "", "strength_model": 0.0, "seed": 5, **more}


PIG = "tiny_pig.png"
TWICE = {"ImageScale": {"width": 384, "height": 384}, "PrimitiveBoolean": {"value": True}}
# A bear without a scarf has no neck: this model leaves a gap there.
SCARF = {
    "PrimitiveStringMultiline": {"value": "a little bear with a red scarf"},
    **{"strength_model": 0.0, "seed": 5, "cfg": 1.0},
}
RECIPES = {
    "cute_animal_for_kids": Recipe((SCARF,)),
    "qwen_image_2512": Recipe(
        (
            _drawing("a small blue bunny with glasses in the snow"),
            _drawing("a red fox reading a book on the beach"),
            _drawing("一只戴帽子的小熊"),
        )
    ),
    "qwen_image_2512_low_vram": Recipe(
        (
            _drawing("a pink pig with a blue scarf on the beach"),
            _drawing("a pink pig with a blue scarf on the beach", **TWICE),
        )
    ),
    "qwen_image_edit_2511": Recipe((AS_TAUGHT,), before=PIG),
    "qwen_image_edit_fast": Recipe(({**AS_TAUGHT, "text": BEACH},), before=PIG),
    "qwen_image_edit_tiled": Recipe((AS_TAUGHT,), before="tiny_photo.png", previews=True),
}


# ---------------------------------------------------------------------------------------- running
def _write(prompt: Prompt, values: dict[str, Any]) -> None:
    """Sets inputs by name, or by the class of the node; the texts by the sampler that they feed."""
    numbers = ("PrimitiveFloat",) if "cfg" in values else ()
    for node in prompt.values():
        inputs, kind, title = node["inputs"], node["class_type"], node["_meta"]["title"]
        typed_in = {k for k, v in inputs.items() if v != "" and not isinstance(v, list)}
        inputs.update({k: v for k, v in values.items() if k in typed_in})
        inputs.update(values.get(kind, {}))
        if kind in numbers:
            inputs["value"] = values["cfg"]
        if kind == "QwenVRAMCachedTextEncode" and isinstance(inputs["text"], str):
            side = "negative" if title.startswith("Negative") else "positive"
            inputs["text"] = values.get(side, inputs["text"])


def drawn(name: str) -> Image.Image:
    """One of the pictures of `make run`."""
    scene, side = PICTURES[name]
    return draw(scene, side, side)


def pictures(server: Server, workflow: dict[str, Any], recipe: Recipe) -> list[Image.Image]:
    """What the workflow makes on the embedded model. Raises DemoError."""
    graph = substitute(to_api(workflow, server.get_json("/object_info")))
    found = [drawn(recipe.before)] if recipe.before else []
    for values in recipe.runs:
        prompt = json.loads(json.dumps(graph))
        _write(prompt, {**values, "image": recipe.before} if recipe.before else values)
        result = server.submit(prompt)
        if result.status != "success":
            raise DemoError(f"ComfyUI ended the prompt with {result.status}: {result.error}")
        kinds = ("output", "temp") if recipe.previews else ("output",)
        shown = [image for image in result.images if image.kind in kinds]
        shown.sort(key=lambda image: (image.kind != "output", int(image.node_id)))
        found += [Image.open(io.BytesIO(image.content)).convert("RGB") for image in shown]
    return found


# ---------------------------------------------------------------------------------------- drawing
def cards_of(workflow: dict[str, Any]) -> tuple[str, str]:
    """The title of a workflow, and the cards that it is for: those of its first note."""
    note = next(n for n in workflow["nodes"] if n["type"] == "MarkdownNote")
    title, _, cards = note["title"].rpartition(" · ")
    return title, cards


def compose(images: Sequence[Image.Image], title: str, cards: str) -> Image.Image:
    """Pictures side by side over a band with the title and the cards."""
    sheet = Image.new("RGB", SIZE, PAPER)
    width = (SIZE[0] - PADDING * (len(images) + 1)) // len(images)
    height = SIZE[1] - BAND - 2 * PADDING
    for i, image in enumerate(images):
        fitted = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
        left = PADDING + i * (width + PADDING) + (width - fitted.width) // 2
        sheet.paste(fitted, (left, PADDING + (height - fitted.height) // 2))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, SIZE[1] - BAND, *SIZE), fill=DARK)
    middle = SIZE[1] - BAND // 2
    bold = ImageFont.load_default(26)
    wide = pen.textlength(cards, bold)
    left = SIZE[0] - wide - 3 * PADDING
    pen.rounded_rectangle((left, middle - 20, SIZE[0] - PADDING, middle + 20), 12, fill=PILL)
    pen.text((left + PADDING, middle), cards, INK, bold, anchor="lm")
    room = left - 3 * PADDING
    size = next(
        s for s in range(26, 8, -1) if pen.textlength(title, ImageFont.load_default(s)) < room
    )
    pen.text((2 * PADDING, middle), title, PAPER, ImageFont.load_default(size), anchor="lm")
    return sheet


def make(comfyui: Path, names: Sequence[str] = ()) -> None:
    """Runs the bundled workflows, and writes the picture beside each."""
    make_checkpoints(comfyui, BASE / "models")
    for folder in (OWN, BASE / "input"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        drawn(name).save(BASE / "input" / name)
    cpu = not has_accelerator()
    folders = ["--user-directory", str(OWN), "--temp-directory", str(OWN)]
    with new_server(comfyui, cpu, "thumbnails", folders) as server:
        for name in names or RECIPES:
            path = ROOT / "workflows" / f"{name}.json"
            workflow = json.loads(path.read_text(encoding="utf-8"))
            images = pictures(server, workflow, RECIPES[name])
            target = path.with_suffix(".jpg")
            compose(images, *cards_of(workflow)).save(target, quality=QUALITY, optimize=True)
            say(f"{target.name}: {len(images)} pictures")
