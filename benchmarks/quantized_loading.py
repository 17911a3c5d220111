"""Every format of weights beside stock: load, RAM, VRAM, seconds a step; on small machines too.

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_loading BASE OUT.jsonl [GROUP ...]
       python -m benchmarks.quantized_loading BASE OUT.jsonl --table
Random files of full size are written to BASE/models when a group needs them, and deleted when the
next group does not (the 40.9 GB bf16 file and the rest do not fit a small disk together). Groups:
see quantized_cells.py. Each cell is one way to load on one machine: the file is dropped from the
page cache, a server loads it, draws 4 steps at CFG 4 and 1328 px and decodes ("first image", from
a fixed conditioning), then 3 steps at CFG 1, then with a LoRA of rank 64 on all layers where the
cell asks for it, then everything is let go and the model loaded again for one step ("warm"). Cards
of 24, 12 and 8 GB: another process holds the rest of the card. Less RAM: a cgroup, see
small_machine.py; or all of it, of which ComfyUI pins little. RAM is split into anonymous (of it
pinned) and the file's pages. Each cell adds a line to OUT.jsonl; cells that are there already are
not run again. --seconds: begin nothing new after that. --tiny: a rehearsal on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from demo.server import Result, Server, ServerError

from . import large_files
from .full_size_checkpoints import VAE, use_comfyui, write_vae
from .quantized_cells import (
    BLOCK,
    KINDS,
    LORA,
    MORE_STEPS,
    PINNED,
    RAMS,
    RANK,
    STEPS,
    WAYS,
    Cell,
    graph,
    groups,
    save_graph,
)
from .quantized_table import table
from .small_card_runs import Row, running
from .small_machine import Gauge, fetched, forget, let_go, small_ram
from .text_to_image import ROOT, Graph, device_bytes_used, small_card
from .tiled_edit import CARDS, seen

TINY = "tiny_qwen_image.safetensors"
WATCHED = ("unet", "clip", "encode", "sampler", "decode", "save")  # nodes whose peaks are kept


# --------------------------------------------------------------------------------------- one cell
class Watch:
    """Of a prompt: peaks by node, and the seconds until the first step was done."""

    def __init__(self, gauge: Gauge, vram: int) -> None:
        self.gauge, self.vram, self.node = gauge, vram, ""
        self.start, self.first = time.perf_counter(), 0.0
        self.peaks: dict[str, dict[str, float]] = {}
        gauge.take()

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """At each change of node, book the peaks on the one that ran."""
        if event == "progress" and self.node == "sampler" and not self.first:
            self.first = time.perf_counter() - self.start
        if event in ("executing", "execution_error", "execution_interrupted"):
            taken = self.gauge.take()
            taken["VRAM"] -= self.vram
            if self.node in WATCHED:
                found = self.peaks.setdefault(self.node, {})
                for name, value in taken.items():
                    found[name] = max(found.get(name, 0), round(value / 1e9, 2))
            self.node = data.get("node") or ""


def run(server: Server, gauge: Gauge, vram: int, prompt: Graph) -> Row:
    """One prompt: seconds, peaks in GB, bytes read from storage, what the loader says."""
    read, logged = fetched(server.pid), len(server.log_text())
    watch = Watch(gauge, vram)
    try:
        result = server.submit(prompt, watch, timeout=400.0)
    except (ServerError, OSError) as error:  # the kernel ends a process that takes too much RAM
        return {"status": "died", "error": str(error)[:500], "peaks": watch.peaks}
    row = {
        "status": result.status,
        "error": result.error[:500],
        "seconds": round(time.perf_counter() - watch.start, 2),
        "first step": round(watch.first, 2),
        "nodes": {k: round(v, 3) for k, v in result.seconds.items() if v > 0.005},
        "step seconds": [round(s, 4) for one in measures(result) for s in one["steps"]],
        "issued": [round(s, 4) for one in measures(result) for s in one["issued"]],
        "pinned": max((one.get("pinned", 0) for one in measures(result)), default=0),
        "peaks": watch.peaks,
        "fetched GB": round((fetched(server.pid) - read) / 1e9, 2),
        "says": said(result),
        "warnings": [x[:200] for x in server.log_text()[logged:].splitlines() if "WARN" in x][:5],
    }
    return {name: value for name, value in row.items() if value not in ("", [], {})}


def measures(result: Result) -> list[dict[str, Any]]:
    """What the measure around the sampler saw."""
    return [one for one in result.outputs.get("report", {}).get("bench", []) if one["steps"]]


def said(result: Result) -> dict[str, str]:
    """The lines that nodes show after the run."""
    shown = {name: out.get("qwen_vram", ()) for name, out in result.outputs.items()}
    return {name: one["text"] for name, ones in shown.items() for one in ones}


def run_cell(server: Server, gauge: Gauge, vram: int, cell: Cell, options: Options) -> Row:
    """All prompts of a cell. Begins and ends with nothing loaded."""
    path = file_of(cell, options)
    let_go(server, gauge)
    before = {k: round(v / 1e9, 2) for k, v in gauge.now().items()}
    row: Row = {"before": before, "bytes": path.stat().st_size}
    for name, prompt in prompts(cell, path.name, options.tiny).items():
        if name == "first" and cell.cold:
            forget(path)
        if name == "warm":
            let_go(server, gauge)
        row[name] = run(server, gauge, vram, prompt)
        if row[name]["status"] != "success":
            break
    row["status"] = row[name]["status"]
    row["after"] = {k: round(v / 1e9, 2) for k, v in gauge.now().items()}
    return row


def prompts(cell: Cell, file: str, tiny: bool) -> dict[str, Graph]:
    """In their order."""
    made = {"first": graph(cell, file, 1, tiny, 4.0, cell.steps, "decode")}
    if cell.steps == STEPS:
        made["CFG 1"] = graph(cell, file, 2, tiny, 1.0, MORE_STEPS)
    if cell.lora:
        made["LoRA"] = graph(cell, file, 3, tiny, 4.0, MORE_STEPS, "lora")
        made["LoRA off"] = graph(cell, file, 4, tiny, 4.0, 2)
    if cell.saves:
        made["save"] = save_graph(cell, file)
    if cell.twice:
        made["warm"] = graph(cell, file, 5, tiny, 4.0, 1)
    return made


# -------------------------------------------------------------------------------------- the files
Options = argparse.Namespace


def folders(options: Options) -> tuple[Path, Path]:
    """Of the transformers: models, and what was saved."""
    base = options.base.absolute()
    return base / "models" / "diffusion_models", base / "output" / "diffusion_models"


def saved_file(prefix: str, options: Options) -> Path | None:
    """What QwenVRAMSaveQuantized wrote last under this prefix."""
    return max(folders(options)[1].glob(f"{prefix}*.safetensors"), default=None)


def file_of(cell: Cell, options: Options) -> Path:
    """The file that the cell loads."""
    wanted = WAYS[cell.way].file
    if wanted not in KINDS:
        found = saved_file(wanted, options)
        assert found, f"nothing was saved as {wanted}"
        return found
    return folders(options)[0] / (TINY if options.tiny else wanted)


def there(cell: Cell, options: Options) -> bool:
    """False for what is yet to be saved."""
    wanted = WAYS[cell.way].file
    return wanted in KINDS or saved_file(wanted, options) is not None


def provide(cells: list[Cell], options: Options) -> None:
    """Write the files that these cells need, and delete the large ones that they do not."""
    if options.tiny:
        shapes = {f"{BLOCK}.attn.to_q.weight": (128, 128)}
        large_files.write_lora(lora_file(options), shapes, RANK)
        return
    needed = {WAYS[cell.way].file for cell in cells}
    shapes = large_files.transformer_shapes()
    for name, dtype in KINDS.items():
        path = folders(options)[0] / name
        if name not in needed:
            path.unlink(missing_ok=True)
        elif not path.exists():
            start = time.perf_counter()
            large_files.write_file(path, shapes, dtype)
            print(f"{name}: written in {time.perf_counter() - start:.0f} s", flush=True)
    if not lora_file(options).exists():
        large_files.write_lora(lora_file(options), shapes, RANK)


def lora_file(options: Options) -> Path:
    """Random numbers of rank 64 for every linear layer of the blocks."""
    return options.base.absolute() / "models" / "loras" / LORA


def prepared(options: Options) -> None:
    """The folder of the server: the benchmark's nodes, an empty page, the VAE."""
    base = options.base.absolute()
    for name in ("small_card", "small_ram", "tiled_edit_nodes"):
        target = base / "custom_nodes" / name
        shutil.copytree(ROOT / "benchmarks" / name, target, dirs_exist_ok=True)
    (base / "web").mkdir(parents=True, exist_ok=True)
    (base / "web" / "index.html").touch()
    use_comfyui()
    if options.tiny:
        from demo.checkpoints import make_checkpoints

        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), base / "models")
        teach = ROOT / "tests" / "teach_stock"
        shutil.copytree(teach, base / "custom_nodes" / "teach_stock", dirs_exist_ok=True)
        return
    vae = base / "models" / VAE
    if not vae.exists():
        write_vae(vae)


# --------------------------------------------------------------------------------------- the runs
def machine(cell: Cell) -> tuple[str, str, str, str]:
    """Cells that share a server."""
    return cell.group, cell.card, cell.ram, cell.flags


@contextlib.contextmanager
def gauged(options: Options, flags: tuple[str, ...] = ()) -> Iterator[tuple[Server, Gauge]]:
    """A server, and the peaks of its process and of the card."""
    with running(options, flags) as (server, peak):
        peak.running = False
        gauge = Gauge(server.pid)
        try:
            yield server, gauge
        finally:
            gauge.running = False


def serve(options: Options, cells: list[Cell]) -> None:
    """The cells of one machine in one server; after a failure the rest gets another."""
    first = cells[0]
    for name in ("QWEN_VRAM_CARD_GIB", "QWEN_VRAM_PINNED_GIB"):
        os.environ.pop(name, None)
    if first.ram in PINNED:
        os.environ["QWEN_VRAM_PINNED_GIB"] = str(PINNED[first.ram])
    card = None if options.tiny else CARDS[first.card]
    with small_ram(None if options.tiny else RAMS[first.ram]) as limit, small_card(card):
        vram = device_bytes_used()
        with gauged(options, tuple(first.flags.split())) as (server, gauge):
            for cell in cells:
                if time.monotonic() > options.end:
                    return
                row = asdict(cell) | {"limit": limit}
                row |= run_cell(server, gauge, vram, cell, options)
                write(options.out, row)
                if row["status"] != "success":
                    return


def write(out: Path, row: Row) -> None:
    """Add a row, and print the short of it."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    short = {k: v for k, v in row["first"].items() if k in ("error", "seconds", "step seconds")}
    print(json.dumps([row[k] for k in ("group", "way", "card", "ram")] + [short]), flush=True)


def cell_of(row: Row) -> Cell:
    """What was measured."""
    return Cell(**{name: row[name] for name in asdict(Cell("", "")) if name in row})


def measure(options: Options) -> None:
    """What is wanted and not there yet, server by server."""
    prepared(options)
    for group in options.groups:
        while time.monotonic() < options.end:
            done = {cell_of(row) for row in seen(options.out)}
            wanted = [c for c in groups()[group] if c not in done]
            wanted = [c for c in wanted if not options.ways or c.way in options.ways]
            wanted = [c for c in wanted if not options.cards or c.card in options.cards]
            if not wanted:
                break
            _, cells = next(groupby(wanted, key=machine))
            provide(groups()[group], options)
            own = list(takewhile(lambda cell: there(cell, options), cells))
            if not own:
                print(f"{wanted[0].way}: nothing was saved to be opened", flush=True)
                break
            serve(options, own)


def main() -> None:
    """The groups that are asked for, or the table of what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="*", default=list(groups()))
    parser.add_argument("--ways", nargs="*")
    parser.add_argument("--cards", nargs="*")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    options.end = time.monotonic() + options.seconds
    if not options.table:
        measure(options)
    print(table(seen(options.out)))


if __name__ == "__main__":
    main()
