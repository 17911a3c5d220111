"""Large pictures whole against in tiles: peak of the activations, seconds per step, who completes.

Usage: COMFYUI_PATH=... python -m benchmarks.tiled_edit BASE OUT.jsonl [GROUP ...] [--seconds S]
       python -m benchmarks.tiled_edit BASE OUT.jsonl --table [PLOT.png]
BASE/models holds the official files or those of full_size_checkpoints; the group "blocks" wants
BASE/short/models, the same with BLOCKS blocks. Groups: "cards" (stock untiled, with references at
the picture's own size and at 1 MP; in tiles of 1024 px, together and one tile by itself), "large",
"blocks", "linear", "batch" (tiles per forward pass), "window" (cutting and blending with a model
that does nothing), "edit" (the whole node), "huge" (16384 x 16384, tiny weights). Where a card is
named, another process holds the rest of the GPU. Each cell adds a line to OUT.jsonl; cells that are
there already are not run again. --seconds: begin nothing new after that. --tiny: a rehearsal on the
CPU. Peaks are torch's, above what it held when sampling began: no weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch

from demo.server import Server

from .small_card_runs import Row, Watch, loaders, nodes
from .text_to_image import ROOT, Graph, Peak, device_bytes_used, small_card

BLOCKS = 6  # of 60, for what would take many minutes whole
CARDS = {"24 GB": 23.5, "12 GB": 11.5, "8 GB": 7.6, "whole": None}
OWN, MEGAPIXEL = "untiled, references at the picture's size", "untiled, references at 1 MP"
TOGETHER, TILE = "tiles together", "one tile by itself"
MODES = {"node, together": "together", "node, one after another": "one after another"}
TEXT_TOKENS, HUGE_RAM_GIB = 60, 2.5
TINY_DIVISOR = 4
LEFT, BOTTOM, WIDTH, HEIGHT = 40, 350, 740, 400  # of the plot, in pixels


@dataclass(frozen=True)
class Cell:
    """One prompt. `models`: full, short or tiny weights."""

    group: str
    card: str
    way: str
    side: int
    steps: int = 1
    cfg: float = 1.0
    tile: int = 1024
    overlap: int = 128
    batch: int = 0
    models: str = "full"


def groups() -> dict[str, list[Cell]]:
    """Every cell, in the order in which it runs."""
    cards = [
        Cell("cards", card, way, side, 2 if side < 3072 else 1)
        for card in list(CARDS)[:3]
        for way in (TOGETHER, MEGAPIXEL, OWN)
        for side in (2048, 3072, 4096)
    ]
    cards = [Cell("cards", card, TILE, 1024, 4) for card in list(CARDS)[:3]] + cards
    linear = [Cell("linear", "whole", TOGETHER, s) for s in (1024, 2048, 3072, 4096, 6144, 8192)]
    blocks = [(TOGETHER, 4096), (MEGAPIXEL, 4096), (OWN, 4096)]
    blocks += [(TOGETHER, 8192), (MEGAPIXEL, 8192), (OWN, 8192)]
    window = [Cell("window", "whole", "model that does nothing", s, 4) for s in (3072, 8192)]
    edit = [Cell("edit", "8 GB", way, 4096, 4) for way in MODES]
    ways = [(list(MODES)[1], 8192), (list(MODES)[1], 16384), (list(MODES)[0], 16384)]
    huge = [Cell("huge", "whole", way, s, 2, tile=2048, models="tiny") for way, s in ways]
    return {
        "cards": sorted(cards, key=lambda cell: list(CARDS).index(cell.card)),
        "large": [Cell("large", "whole", MEGAPIXEL, 8192)],
        "blocks": [Cell("blocks", "whole", way, side, models="short") for way, side in blocks],
        "linear": linear,
        "window": window,
        "batch": [Cell("batch", "8 GB", TOGETHER, 3072, batch=n) for n in (1, 2, 4)],
        "edit": edit,
        "huge": huge,
    }


# ------------------------------------------------------------------------------------- the graphs
def graph(cell: Cell, number: int, tiny: bool) -> Graph:
    """A sampler whose model is measured, on random references and an empty latent."""
    own = f"{cell.side}x{cell.side}"
    small = 1024 // TINY_DIVISOR if tiny else 1024
    references = f"{small}x{small}" if cell.way == MEGAPIXEL else own
    sizes = {"width": cell.side, "height": cell.side, "batch_size": 1}
    text = {"tokens": TEXT_TOKENS, "width": 64 if tiny else 3584, "references": references}
    sampler = {
        "model": ["measure", 0], "positive": ["text", 0], "negative": ["text", 0],
        "latent_image": ["latent", 0], "seed": number, "steps": cell.steps, "cfg": cell.cfg,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    return nodes(
        {
            **models(cell, number, tiny),
            "text": ("BenchConditions", text),
            "latent": ("EmptySD3LatentImage", sizes),
            "sampler": ("KSampler", sampler),
            "report": ("BenchReport", {"measure": ["measure", 1], "after": ["sampler", 0]}),
        }
    )


def models(cell: Cell, number: int, tiny: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Stock's loader for all; ours is the patch alone."""
    made = {
        "unet": loaders("stock", tiny)["unet"],
        "shift": ("ModelSamplingAuraFlow", {"model": ["unet", 0], "shift": 3.1}),
    }
    last = "shift"
    if cell.way not in (OWN, MEGAPIXEL, TILE):
        how = {"tile_size": cell.tile, "overlap": cell.overlap, "window": "hann"}
        along = {"reference_1": "auto", "reference_2": "auto", "other_references": "auto"}
        tiles = {"model": ["shift", 0], **how, **along, "tile_batch": cell.batch}
        made["tiles"], last = ("QwenVRAMTiledDiffusion", tiles), "tiles"
    if cell.group == "window":
        made["nothing"], last = ("BenchNothing", {"model": [last, 0]}), "nothing"
    made["measure"] = ("BenchMeasure", {"model": [last, 0], "number": number})
    return made


def edit(cell: Cell, number: int, tiny: bool) -> Graph:
    """The whole node on a picture whose memory is a file where the RAM is small."""
    every = {
        "image": ["picture", 0], "instruction": "replace the sky by stars", "negative": "",
        "model": ["measure", 0], "clip": ["clip", 0], "vae": ["vae", 0], "seed": number,
        "steps": cell.steps, "cfg": cell.cfg, "sampler_name": "euler", "scheduler": "simple",
        "denoise": 0.6, "mode": MODES[cell.way], "tile_size": cell.tile, "overlap": cell.overlap,
        "guide": "start of denoising", "skip_threshold": 0.0, "registration": True,
        "colour_match": True, "window": "hann", "cache": "memory and disk",
    }  # fmt: skip
    sizes = {"width": cell.side, "height": cell.side}
    made = {**loaders("ours", tiny), **models(replace(cell, way=OWN), number, tiny)}
    return nodes(
        {
            **made,
            "unet": loaders("ours", tiny)["unet"],
            "picture": ("BenchPicture", sizes),
            "sampler": ("QwenVRAMTiledEdit", every),
            "look": ("BenchLook", {"image": ["sampler", 0], "source": ["picture", 0]}),
            "report": ("BenchReport", {"measure": ["measure", 1], "after": ["sampler", 0]}),
        }
    )


# ---------------------------------------------------------------------------------------- one run
class Anonymous(threading.Thread):
    """Polls what a process has in RAM that is no file, in bytes (RssAnon)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.running, self.peak = Path(f"/proc/{pid}/status"), True, 0
        self.start()

    def run(self) -> None:
        """Until stopped, every 20 ms."""
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)

    def now(self) -> int:
        """At this moment; 0 when the process is gone."""
        with contextlib.suppress(OSError):
            for line in self.status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024
        return 0


def run(server: Server, peak: Peak, before: int, prompt: Graph) -> Row:
    """One prompt: how it ended, peaks, seconds of the node and of each step."""
    watch, anonymous = Watch(peak, before), Anonymous(server.pid)
    row: Row = {"RssAnon before": anonymous.now()}
    start = time.perf_counter()
    try:
        result = server.submit(prompt, watch, timeout=590.0)
    finally:
        anonymous.running = False
    runs = result.outputs.get("report", {}).get("bench", [])
    steps = [step for one in runs for step in one["steps"]]
    return row | {
        "status": result.status,
        "error": result.error[:600],
        "seconds": round(time.perf_counter() - start, 2),
        "sampler": round(result.seconds.get("sampler", 0.0), 3),
        "step seconds": [round(step, 4) for step in steps],
        "peak": max((one["peak"] or 0 for one in runs), default=None),
        "NVML GiB": watch.peaks.get("sampler"),
        "RssAnon peak": anonymous.peak,
        "look": result.outputs.get("look", {}).get("bench"),
        "says": [x["text"] for x in result.outputs.get("sampler", {}).get("qwen_vram", ())],
    }


def serve(options: argparse.Namespace, cells: list[Cell]) -> None:
    """The cells of one card and one set of weights, in one server, after a small picture."""
    first = cells[0]
    os.environ.pop("QWEN_VRAM_CARD_GIB", None)
    tiny = options.tiny or first.models == "tiny"
    base = prepared(options, first.models)
    ram = {"QWEN_VRAM_RAM_GIB": str(HUGE_RAM_GIB)} if first.group == "huge" else {}
    with small_card(None if options.tiny else CARDS[first.card]):
        before = device_bytes_used()
        previews = "auto" if first.group == "huge" else "none"
        with running(base, ram, previews) as (server, peak):
            touch = Cell("touch", first.card, OWN, 1024 // (TINY_DIVISOR if tiny else 1))
            ready = run(server, peak, before, graph(touch, 1, tiny))
            assert ready["status"] == "success", ready
            for number, cell in enumerate(cells, 2):
                if time.monotonic() > options.end:
                    return
                make = edit if cell.way in MODES else graph
                row = run(server, peak, before, make(smaller(cell, options.tiny), number, tiny))
                write(options.out, asdict(cell) | row)
                if row["status"] != "success":
                    return  # what a failure left on the model would fail others, too


def smaller(cell: Cell, tiny: bool) -> Cell:
    """For the rehearsal."""
    if not tiny:
        return cell
    sizes = {"side": cell.side, "tile": cell.tile, "overlap": cell.overlap}
    return replace(cell, **{name: size // TINY_DIVISOR for name, size in sizes.items()})


@contextlib.contextmanager
def running(
    base: Path, environment: dict[str, str], previews: str
) -> Iterator[tuple[Server, Peak]]:
    """A server on what the ballast left, and the thread that watches it."""
    cpu = not torch.cuda.is_available()
    extra = ["--front-end-root", str(base / "web"), "--preview-method", previews]
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with Server(comfyui, base, ROOT, cpu=cpu, extra_args=extra, environment=environment) as server:
        peak = Peak(server.pid)
        try:
            yield server, peak
        finally:
            peak.running = False
            shutil.copy(server.log_file, base / f"log_{time.time_ns()}.txt")


def prepared(options: argparse.Namespace, kind: str) -> Path:
    """The folder of a server: its models, the benchmark's nodes, an empty page."""
    base = options.base.absolute() / {"full": "", "short": "short", "tiny": "tiny"}[kind]
    for name in ("small_card", "tiled_edit_nodes"):
        source = ROOT / "benchmarks" / name
        shutil.copytree(source, base / "custom_nodes" / name, dirs_exist_ok=True)
    (base / "web").mkdir(parents=True, exist_ok=True)
    (base / "web" / "index.html").touch()
    if options.tiny or kind == "tiny":
        from demo.checkpoints import make_checkpoints

        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), base / "models")
        teach = ROOT / "tests" / "teach_stock"
        shutil.copytree(teach, base / "custom_nodes" / "teach_stock", dirs_exist_ok=True)
    return base


# -------------------------------------------------------------------------------------- the rows
def seen(out: Path) -> list[Row]:
    """The rows of earlier parts."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def write(out: Path, row: Row) -> None:
    """Add a row, and print it."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row)[:900], flush=True)


def cell_of(row: Row) -> Cell:
    """What was measured."""
    return Cell(**{name: row[name] for name in asdict(groups()["cards"][0])})


def measure(options: argparse.Namespace) -> None:
    """What is wanted and not there yet, server by server."""
    while time.monotonic() < options.end:
        done = {cell_of(row) for row in seen(options.out)}
        wanted = [c for group in options.groups for c in groups()[group] if c not in done]
        if not wanted:
            return
        servers = groupby(wanted, key=lambda c: (c.card, c.models, c.group == "huge"))
        serve(options, list(next(servers)[1]))


def table(rows: list[Row]) -> str:
    """Markdown: one line for each cell."""
    head = ("group", "card", "way", "side", "batch", "ended", "s per step", "peak, GB", "NVML, GiB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        step = f"{statistics.median(row['step seconds'][-2:]):.3f}" if row["step seconds"] else ""
        peak = f"{row['peak'] / 1e9:.2f}" if row["peak"] else ""
        ended = "completed" if row["status"] == "success" else row["error"].splitlines()[0][:60]
        cells = [row[n] for n in ("group", "card", "way", "side", "batch")]
        lines.append(f"| {' | '.join(map(str, [*cells, ended, step, peak, row['NVML GiB']]))} |")
    return "\n".join(lines)


def plot(rows: list[Row], out: Path) -> None:
    """Seconds per step over megapixels: tiles, a line proportional to the largest, and untiled."""
    colours = {TOGETHER: "#1f77b4", MEGAPIXEL: "#ff7f0e", OWN: "#d62728"}
    found = [r for r in rows if r["step seconds"] and r["models"] == "full" and r["way"] in colours]
    found = [r for r in found if r["group"] in ("linear", "large") or r["card"] == "24 GB"]
    found = [r for r in found if r["way"] != TOGETHER or r["group"] == "linear"]
    points = [(r["side"] ** 2 / 2**20, r["step seconds"][-1], r["way"]) for r in found]
    most, slowest = max(point[:2] for point in points if point[2] == TOGETHER)
    top = slowest * 1.1
    picture = PIL.Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = PIL.ImageDraw.Draw(picture)

    def place(megapixels: float, seconds: float) -> tuple[float, float]:
        right, up = megapixels / most, seconds / top
        return LEFT + right * (WIDTH - LEFT - 100), BOTTOM - up * (BOTTOM - 60)

    draw.line([place(0, 0), place(most, 0)], fill="black")
    draw.line([place(0, 0), place(0, top)], fill="black")
    draw.line([place(0, 0), place(most, slowest)], fill="#bbbbbb", width=2)
    for megapixels, seconds, way in points:
        x, y = place(megapixels, min(seconds, top))
        beyond = f"{seconds:.1f}" + (" (above)" if seconds > top else "")
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colours[way])
        draw.text((x + 7, y - 6 if way == TOGETHER else y - 16), beyond, fill=colours[way])
        draw.text((x - 6, BOTTOM + 8), f"{megapixels:.0f}", fill="black")
    for line, (way, colour) in enumerate(colours.items()):
        draw.text((LEFT + 20, 6 + 14 * line), way, fill=colour)
    note = "megapixels; seconds per step. Grey: proportional to the largest in tiles"
    draw.text((LEFT, BOTTOM + 28), note, fill="black")
    picture.save(out, optimize=True)


def main() -> None:
    """The groups that are asked for, or the table of what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="*", default=list(groups()))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", nargs="?", type=Path, const=Path(), default=None)
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    if options.table is None:
        measure(options)
        return
    print(table(seen(options.out)))
    if options.table.suffix:
        plot(seen(options.out), options.table)


if __name__ == "__main__":
    main()
