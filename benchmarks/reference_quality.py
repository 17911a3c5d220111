"""How close edits with kept references come to the full computation, over refresh intervals.

Usage: COMFYUI_PATH=... python -m benchmarks.reference_quality OUT.jsonl [--plot OUT.png]
       python -m benchmarks.reference_quality OUT.jsonl --table [--plot OUT.png]

On the CPU, in ComfyUI itself: the embedded model, which is trained for edits with one reference,
and tiny random weights. References are modulated as 2509 does ("index", by the step's own noise)
or as 2511 ("index_timestep_zero"). The second reference is another picture. Each cell adds a line
to OUT.jsonl; cells that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a program, not by the tests
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]
    sys.modules["pack"].__file__ = str(ROOT / "__init__.py")

from pack.core.reference_store import FORMATS  # noqa: E402
from pack.demo import embedded, environment, figures  # noqa: E402
from pack.tests import graphs  # noqa: E402
from pack.tests.graphs import loader, node  # noqa: E402
from pack.tests.host import Host  # noqa: E402

METHODS = {"2509": "index", "2511": "index_timestep_zero"}
INTERVALS, STEPS = (1, 2, 5, 10, 20), (8, 20, 40)
ONLY_FIRST, AUTO = 1000, 0
MODELS = {
    "embedded": (embedded.TRANSFORMER, embedded.TEXT_ENCODER, embedded.VAE),
    "random": (graphs.UNET, graphs.CLIP, graphs.VAE),
}
OTHER_KINDS = ("identity", "watermark")  # that change nothing, or next to it
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One setting of the cache. `interval`: steps between full ones; AUTO: the node's choice."""

    model: str
    method: str
    references: int
    steps: int
    format: str
    interval: int


def cells() -> Iterator[Cell]:
    """All of them; an interval as long as the run is the first step only."""
    for model in MODELS:
        for method in METHODS:
            for references in (1, 2):
                for steps in STEPS:
                    shorter = [i for i in INTERVALS if i < steps]
                    for interval in (*shorter, ONLY_FIRST, AUTO):
                        for kind in FORMATS:
                            yield Cell(model, method, references, steps, kind, interval)


# ------------------------------------------------------------------------------------- one edit
def edit_graph(cell: Cell, number: int, instruction: str, *, cached: bool) -> dict[str, Any]:
    """An edit of picture `number`, by the full computation or with the cache."""
    unet, clip, vae = (path.rpartition("/")[2] for path in MODELS[cell.model])
    made = {
        "unet": loader("DiffusionModel", unet),
        "clip": loader("TextEncoder", clip),
        "vae": loader("VAE", vae),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
    }
    pictures, last = {}, "text"
    for n in range(cell.references):
        made[f"picture{n}"] = node("LoadImage", image=f"edit_{number + 100 * n}.png")
        made[f"latent{n}"] = node("VAEEncode", pixels=[f"picture{n}", 0], vae=["vae", 0])
        pictures[f"image{n + 1}"] = [f"picture{n}", 0]
        latent = [f"latent{n}", 0]
        made[f"set{n}"] = node("ReferenceLatent", conditioning=[last, 0], latent=latent)
        last = f"set{n}"
    made["text"] = node(
        "TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt=instruction, **pictures
    )
    method = {"reference_latents_method": METHODS[cell.method], "conditioning": [last, 0]}
    made["positive"] = node("FluxKontextMultiReferenceLatentMethod", **method)
    if cached:
        made["cache"] = node("QwenVRAMReferenceCache", **settings(cell))
    sampled = {"seed": number, "steps": cell.steps, "cfg": 1.0, "denoise": 1.0}
    sockets = {"positive": ["positive", 0], "negative": ["positive", 0]}
    made["sampler"] = node(
        *("KSampler",),
        **{"model": ["cache" if cached else "shift", 0], "latent_image": ["latent0", 0]},
        **{"sampler_name": "euler", "scheduler": "simple", **sampled, **sockets},
    )
    made["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])
    made["out"] = node("PreviewAny", source=["decode", 0])
    return made


def settings(cell: Cell) -> dict[str, Any]:
    """The inputs of our node."""
    return {
        **{"model": ["shift", 0], "refresh": "every n steps" if cell.interval else "auto"},
        **{"refresh_every": cell.interval or 10},
        **{"drift_threshold": 0.1, "full_last_steps": 0, "causal": False, "region": False},
        **{"store_format": cell.format, "store_place": "auto"},
        **{"region_margin": 64, "region_threshold": 0.05},
    }


def picture_of(host: Host, graph: dict[str, Any]) -> Tensor:
    """What is decoded, (1, h, w, 3)."""
    host.run(graph)
    return host.executor.caches.outputs.get_local("decode").outputs[0][0].clone()


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of pictures of values from 0 to 1; infinite for the same picture."""
    error = (one.double() - other.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def asked(host: Host, count: int, side: int) -> list[str]:
    """Instructions that change something, and pictures of the input folder, two for each."""
    edits = [edit for edit in figures.edits_to_judge(200) if edit[0] not in OTHER_KINDS]
    for number in range(count):
        for offset, source in ((0, edits[number]), (100, edits[number + count])):
            pixels = figures.drawn(source[1], (side, side))
            Image.fromarray(pixels).save(host.base / "input" / f"edit_{number + offset}.png")
    return [edit[3][0] for edit in edits[:count]]


def measure(host: Host, options: argparse.Namespace) -> None:
    """The cells that are not there yet; the full computation once for each edit."""
    instructions = asked(host, options.edits, options.side)
    done = {cell_of(row) for row in seen(options.out)}
    whole: dict[tuple[Any, ...], Tensor] = {}
    for cell in cells():
        if cell in done or cell.model not in options.models:
            continue
        found = []
        for number, instruction in enumerate(instructions):
            key = (cell.model, cell.method, cell.references, cell.steps, number)
            if key not in whole:
                full = edit_graph(cell, number, instruction, cached=False)
                whole[key] = picture_of(host, full)
            own = picture_of(host, edit_graph(cell, number, instruction, cached=True))
            found.append(psnr(own, whole[key]))
        row = asdict(cell) | {"psnr": [round(x, 2) for x in found]}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------- table and plot
def seen(out: Path) -> list[Row]:
    """The rows of earlier parts."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def cell_of(row: Row) -> Cell:
    """What was measured."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def name_of(interval: int) -> str:
    """For the head of a column."""
    if interval == AUTO:
        return "auto"
    return "first step only" if interval == ONLY_FIRST else f"every {interval}"


def shown(values: list[float] | None) -> str:
    """The mean in dB."""
    if values is None:
        return ""
    return "same" if math.isinf(min(values)) else f"{statistics.mean(values):.1f}"


def table(rows: list[Row]) -> str:
    """Markdown: a line for each model, method, number of references, of steps, and format."""
    found = {cell_of(row): row["psnr"] for row in rows}
    columns = (*INTERVALS, ONLY_FIRST, AUTO)
    head = ("model", "modulated as", "references", "steps", "format", *map(name_of, columns))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for first in (c for c in cells() if c.interval == 1):
        values = [shown(found.get(replace(first, interval=i))) for i in columns]
        if any(values):
            names = (first.model, first.method, first.references, first.steps, first.format)
            lines.append(f"| {' | '.join(map(str, (*names, *values)))} |")
    return "\n".join(lines)


def worst_loss(rows: list[Row], kind: str) -> tuple[float, Cell] | None:
    """By how many dB at most a format's mean is under the model's dtype, and where."""
    found = {cell_of(row): row["psnr"] for row in rows}
    pairs = [
        (statistics.mean(found[replace(c, format="model")]) - statistics.mean(values), c)
        for c, values in found.items()
        if c.format == kind and math.isfinite(sum(found[replace(c, format="model")]))
    ]
    return max(pairs, key=lambda pair: pair[0]) if pairs else None


COLOURS = {"model": "#a6cee3", "int8": "#d62728", "int4": "#2ca02c"}
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 330, 230, 46, 40
LOWEST, HIGHEST = 10.0, 60.0  # dB


def plot(rows: list[Row], out: Path, model: str = "embedded") -> None:
    """A panel for each modulation and number of steps: PSNR over the interval, one reference."""
    found = {cell_of(row): row["psnr"] for row in rows}
    size = (PANEL_WIDTH * len(STEPS) + 20, (PANEL_HEIGHT + TOP) * len(METHODS) + 60)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for down, method in enumerate(METHODS):
        for right, steps in enumerate(STEPS):
            place = (right * PANEL_WIDTH + LEFT, down * (PANEL_HEIGHT + TOP) + TOP)
            _panel(draw, place, found, Cell(model, method, 1, steps, "model", 1))
    for number, (kind, colour) in enumerate(COLOURS.items()):
        text = f"{kind}: filled, one reference; hollow, two"
        draw.text((LEFT + 300 * number, size[1] - 50), text, fill=colour)
    note = (
        f"PSNR (dB) against the full computation, {model} model, over the steps between full ones"
    )
    draw.text((LEFT, size[1] - 30), note, fill="black")
    picture.save(out, optimize=True)


def _panel(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    found: dict[Cell, list[float]],
    cell: Cell,
) -> None:
    """Curves of one modulation and number of steps. `place`: of its corner, in pixels."""
    left, top = place
    bottom, wide = top + PANEL_HEIGHT - 40, PANEL_WIDTH - LEFT - 30
    columns = [i for i in (*INTERVALS, ONLY_FIRST) if 1 < i < cell.steps or i == ONLY_FIRST]
    columns.append(AUTO)
    draw.text((left, top - 18), f"as {cell.method}, {cell.steps} steps", fill="black")
    for level in range(int(LOWEST), int(HIGHEST) + 1, 10):
        y = bottom - (level - LOWEST) / (HIGHEST - LOWEST) * (bottom - top)
        draw.line([left, y, left + wide, y], fill="#dddddd")
        draw.text((left - 18, y - 6), str(level), fill="black")
    places = [left + wide * n / (len(columns) - 1) for n in range(len(columns))]
    for x, interval in zip(places, columns, strict=True):
        label = {ONLY_FIRST: "first", AUTO: "auto"}.get(interval, str(interval))
        draw.text((x - 6, bottom + 6), label, fill="black")
    for kind in COLOURS:
        for references in (1, 2):
            points = []
            for x, interval in zip(places, columns, strict=True):
                own = replace(cell, format=kind, references=references, interval=interval)
                if own in found:
                    value = min(max(statistics.mean(found[own]), LOWEST), HIGHEST)
                    points.append((x, bottom - (value - LOWEST) / 50 * (bottom - top)))
            _curve(draw, points, kind, references)


def _curve(
    draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], kind: str, references: int
) -> None:
    """Of one format; the last point, of the node's own choice, stands by itself."""
    colour, wide = COLOURS[kind], kind == "model"  # so that it is seen under the others
    if len(points) > 2:
        draw.line(points[:-1], fill=colour, width=6 if wide else 2)
    for x, y in points:
        size = 6 if wide else 3
        fill = colour if references == 1 else "white"
        draw.ellipse([x - size, y - size, x + size, y + size], outline=colour, fill=fill)


def main() -> None:
    """Measure, unless only the table is wanted; print it, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--edits", type=int, default=6)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.table:
        comfyui = environment.required_comfyui()
        with tempfile.TemporaryDirectory() as base, torch.inference_mode():
            measure(Host(comfyui, Path(base), ROOT), options)
    rows = seen(options.out)
    print(table(rows))
    for kind in FORMATS[1:]:
        print(f"{kind} at most below the model's dtype, dB:", worst_loss(rows, kind))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
