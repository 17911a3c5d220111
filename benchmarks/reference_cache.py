"""Edits with the references' keys and values kept, against stock: seconds, memory, cards.

Usage: COMFYUI_PATH=... python -m benchmarks.reference_cache BASE OUT.jsonl [GROUP ...]
       python -m benchmarks.reference_cache BASE OUT.jsonl --table
BASE/models holds the official files or those of full_size_checkpoints. Groups: "1024" and "2048"
(pixels of the picture's side; CFG 4 and 1; 1, 2, 3 references of 1 MP; stock and the cache, in int8
and, at 1024, in the model's dtype), "formats" (those and the other formats and places), "runs" (40
steps whole, as the node comes), "cards" (of 24, 12 and 8 GB: another process holds the rest),
"legacy" (12 GB without dynamic VRAM). A cell of the cache computes in full at steps 1 and 4 and
reuses at 2, 3 and 5 (2048: at 1 and 3; at 2). Each cell adds a line to OUT.jsonl; cells that are
there already are not run again. --seconds: begin nothing new after that. --tiny: a rehearsal on
the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from core.reference_store import bytes_of
from demo.server import Server

from .small_card_runs import Row, Watch, loaders, nodes, running
from .text_to_image import Graph, Peak, device_bytes_used, small_card
from .tiled_edit import CARDS, TINY_DIVISOR, prepared, seen, write

STOCK, CACHE = "stock", "cache"
EVERY, STEPS, STOCK_STEPS, WHOLE_RUN = 3, 5, 3, 40
MEGAPIXEL = 1024
TEXT, VISION = 30, 200  # tokens: of an instruction, and of each reference as the encoder sees it
BLOCKS, HEADS, HEAD_WIDTH = 60, 24, 128
LEGACY = "--disable-dynamic-vram"
AS_2511 = "index_timestep_zero"  # how Edit-2511 modulates its references


@dataclass(frozen=True)
class Cell:
    """One prompt. `refresh`: steps from one full step to the next, 0: the node's own choice."""

    group: str
    side: int
    references: int
    cfg: float = 4.0
    way: str = STOCK
    format: str = ""
    place: str = ""
    refresh: int = EVERY
    steps: int = STEPS
    card: str = "whole"
    flags: str = ""
    method: str = ""


def sides_of(cell: Cell, *stores: tuple[str, str]) -> list[Cell]:
    """Stock and, for each (format, place), the cache."""
    whole = cell.steps == WHOLE_RUN
    stock = replace(cell, refresh=1, steps=WHOLE_RUN if whole else min(cell.steps, STOCK_STEPS))
    return [stock, *(replace(cell, way=CACHE, format=f, place=p) for f, p in stores)]


def groups() -> dict[str, list[Cell]]:
    """Every cell, in the order in which it runs."""
    made: dict[str, list[Cell]] = {}
    cells = [Cell("1024", 1024, n, cfg) for cfg in (4.0, 1.0) for n in (1, 3, 2)]
    made["1024"] = [c for cell in cells for c in sides_of(cell, *GPU_STORES)]
    large = {"refresh": 2, "steps": 3}
    cells = [Cell("2048", 2048, n, cfg, **large) for cfg in (4.0, 1.0) for n in (1, 3, 2)]
    made["2048"] = [c for cell in cells for c in sides_of(cell, GPU_STORES[1])]
    shapes = [(1024, 1), (1024, 3), (2048, 3)]
    formats = [Cell("formats", side, n) for side, n in shapes]
    made["formats"] = [c for cell in formats for c in sides_of(cell, *GPU_STORES, *OTHER_STORES)]
    runs = [Cell("runs", 1024, n, refresh=0, steps=WHOLE_RUN) for n in (1, 3)]
    made["runs"] = [c for cell in runs for c in sides_of(cell, ("int8", "auto"))]
    zero = [replace(c, method=AS_2511) for c in made["runs"]]
    made["runs"] += [replace(c, steps=STOCK_STEPS) if c.way == STOCK else c for c in zero]
    cards = [Cell("cards", *s, card=card) for card in ("8 GB", "12 GB", "24 GB") for s in shapes]
    made["cards"] = [c for cell in cards for c in sides_of(cell, ("int8", "auto"))]
    legacy = Cell("legacy", 1024, 1, card="12 GB", flags=LEGACY)
    made["legacy"] = sides_of(legacy, ("int8", "auto"))
    return made


GPU_STORES = (("model", "gpu"), ("int8", "gpu"))
OTHER_STORES = (("int4", "gpu"), ("model", "ram"), ("int8", "ram"), ("int4", "ram"))


# ------------------------------------------------------------------------------------- the graphs
def graph(cell: Cell, number: int, tiny: bool) -> Graph:
    """A sampler whose model is measured, on random texts and references and an empty latent.

    The two texts differ in length, as an instruction and an empty one do: ComfyUI then evaluates
    them one after another.
    """
    reference = MEGAPIXEL // TINY_DIVISOR if tiny else MEGAPIXEL
    text = {
        "width": 64 if tiny else 3584,
        "references": " ".join([f"{reference}x{reference}"] * cell.references),
        "method": cell.method,
    }
    tokens = VISION * cell.references + TEXT
    sampler = {
        "model": ["measure", 0], "positive": ["positive", 0], "negative": ["negative", 0],
        "latent_image": ["latent", 0], "seed": number, "steps": cell.steps, "cfg": cell.cfg,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    sizes = {"width": cell.side, "height": cell.side, "batch_size": 1}
    made = {
        "unet": loaders("stock", tiny)["unet"],
        "shift": ("ModelSamplingAuraFlow", {"model": ["unet", 0], "shift": 3.1}),
        "positive": ("BenchConditions", {**text, "tokens": tokens + 13}),
        "negative": ("BenchConditions", {**text, "tokens": tokens}),
        "latent": ("EmptySD3LatentImage", sizes),
    }
    last = "shift"
    if cell.way == CACHE:
        made["cache"], last = ("QwenVRAMReferenceCache", cached(cell)), "cache"
    made["measure"] = ("BenchMeasure", {"model": [last, 0], "number": number})
    made["sampler"] = ("KSampler", sampler)
    made["report"] = ("BenchReport", {"measure": ["measure", 1], "after": ["sampler", 0]})
    return nodes(made)


def cached(cell: Cell) -> dict[str, Any]:
    """The inputs of our node."""
    return {
        "model": ["shift", 0],
        "refresh": "every n steps" if cell.refresh else "auto",
        "refresh_every": cell.refresh or 10,
        "drift_threshold": 0.1,
        "full_last_steps": 0,
        "store_format": cell.format,
        "store_place": cell.place,
        "causal": False,
        "region": False,
        "region_margin": 64,
        "region_threshold": 0.05,
    }


# ---------------------------------------------------------------------------------------- one run
def run(server: Server, peak: Peak, before: int, prompt: Graph) -> Row:
    """One prompt: how it ended, seconds and memory of each step, peaks, what the node says."""
    watch, logged = Watch(peak, before), len(server.log_text())
    start = time.perf_counter()
    result = server.submit(prompt, watch, timeout=590.0)
    runs = result.outputs.get("report", {}).get("bench", [])
    found = [one for one in runs if one["steps"]]
    return {
        "status": result.status,
        "error": result.error[:600],
        "seconds": round(time.perf_counter() - start, 2),
        "sampler": round(result.seconds.get("sampler", 0.0), 3),
        "step seconds": [round(step, 4) for one in found for step in one["steps"]],
        "held": [held for one in found for held in one["held"]],
        "RAM": [taken for one in found for taken in one["RAM"]],
        "peak": max((one["peak"] or 0 for one in found), default=None),
        "NVML GiB": watch.peaks.get("sampler"),
        "says": [one["cache"] for one in found],
        "warnings": [x for x in server.log_text()[logged:].splitlines() if "WARN" in x][:5],
    }


def serve(options: argparse.Namespace, cells: list[Cell]) -> None:
    """The cells of one card, in one server, after a small picture."""
    first = cells[0]
    os.environ.pop("QWEN_VRAM_CARD_GIB", None)
    options.base = prepared(options, "tiny" if options.tiny else "full")
    with small_card(None if options.tiny else CARDS[first.card]):
        before = device_bytes_used()
        with running(options, tuple(first.flags.split())) as (server, peak):
            touch = Cell("touch", 256 if options.tiny else 1024, 1, steps=1)
            ready = run(server, peak, before, graph(touch, 1, options.tiny))
            assert ready["status"] == "success", ready
            for number, cell in enumerate(cells, 2):
                if time.monotonic() > options.end:
                    return
                row = run(server, peak, before, graph(smaller(cell, options), number, options.tiny))
                write(options.out, asdict(cell) | row)
                if row["status"] != "success":
                    return  # what a failure left on the model would fail others, too


def smaller(cell: Cell, options: argparse.Namespace) -> Cell:
    """For the rehearsal."""
    return replace(cell, side=cell.side // TINY_DIVISOR) if options.tiny else cell


def cell_of(row: Row) -> Cell:
    """What was measured."""
    return Cell(**{name: row[name] for name in asdict(groups()["runs"][0]) if name in row})


def measure(options: argparse.Namespace) -> None:
    """What is wanted and not there yet, server by server."""
    base = options.base
    while time.monotonic() < options.end:
        done = {cell_of(row) for row in seen(options.out)}
        wanted = [c for group in options.groups for c in groups()[group] if c not in done]
        if not wanted:
            return
        servers = groupby(wanted, key=lambda c: (c.card, c.flags))
        options.base = base
        serve(options, list(next(servers)[1]))


# -------------------------------------------------------------------------------------- the table
def full_and_reuse(row: Row) -> tuple[float, float]:
    """Median seconds of a step in full (not the first: it warms up) and of one that reuses."""
    seconds = row["step seconds"]
    if row["way"] == STOCK or not row["refresh"]:
        return statistics.median(seconds[1:]), statistics.median(seconds[1:])
    full = [s for n, s in enumerate(seconds) if n % row["refresh"] == 0 and n]
    reuse = [s for n, s in enumerate(seconds) if n % row["refresh"]]
    return statistics.median(full), statistics.median(reuse)


def calculated(row: Row) -> int:
    """Bytes of the keys and values of all references in every block, for each cond."""
    tokens = row["references"] * (MEGAPIXEL // 16) ** 2
    shape = (1, HEADS, tokens, HEAD_WIDTH)
    conds = 1 if row["cfg"] == 1.0 else 2
    return 2 * BLOCKS * conds * bytes_of(row["format"], shape, torch.bfloat16)


def table(rows: list[Row]) -> str:
    """Markdown: one line for each cell of the cache beside stock's of the same run."""
    head = "| group | card | side | CFG | refs | store | stock, s | full, s | reuse, s | x | "
    lines = [head + "held / RAM / calculated, GB | peak, NVML GiB |", "|" + "---|" * 12]
    stock = {key_of(row): row for row in rows if row["way"] == STOCK}
    for row in rows:
        other = stock.get(key_of(row))
        names = [row[n] for n in ("group", "card", "side", "cfg", "references")]
        names[0] += " as 2511" if cell_of(row).method else ""
        if row["status"] != "success" or (other and other["status"] != "success"):
            ended = [r["error"][:50] or r["status"] for r in (other, row) if r]
            lines.append(f"| {' | '.join(map(str, [*names, row['way'], *ended]))} |")
        elif row["way"] == CACHE and other:
            lines.append(f"| {' | '.join(map(str, [*names, *compared(row, other)]))} |")
    return "\n".join(lines)


def key_of(row: Row) -> tuple[Any, ...]:
    """What a cell of the cache and stock's have in common."""
    names = ("group", "card", "side", "cfg", "references", "flags", "method")
    return tuple(getattr(cell_of(row), name) for name in names)


def compared(row: Row, stock: Row) -> list[str]:
    """Seconds and bytes of a cell beside stock's."""
    (was, _), (full, reuse) = full_and_reuse(stock), full_and_reuse(row)
    ratio = was / reuse
    if row["steps"] == WHOLE_RUN:
        stock_run = stock["sampler"] if stock["steps"] == WHOLE_RUN else was * WHOLE_RUN
        ratio, was, full, reuse = stock_run / row["sampler"], stock_run, 0.0, row["sampler"]
    held, ram = max(row["held"], default=0), max(row["RAM"], default=0)
    memory = f"{held / 1e9:.2f} / {ram / 1e9:.2f} / {calculated(row) / 1e9:.2f}"
    peaks = f"{(row['peak'] or 0) / 1e9:.2f}, {row['NVML GiB']} ({stock['NVML GiB']})"
    figures = [f"{x:.3f}" for x in (was, full, reuse)]
    return [f"{row['format']}, {row['place']}", *figures, f"{ratio:.2f}", memory, peaks]


def main() -> None:
    """The groups that are asked for, or the table of what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="*", default=list(groups()))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--says", action="store_true", help="what the nodes said, too")
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    if not options.table:
        measure(options)
    print(table(seen(options.out)))
    if options.says:
        print("\n".join(json.dumps([cell_of(r).__dict__, r["says"]]) for r in seen(options.out)))


if __name__ == "__main__":
    main()
