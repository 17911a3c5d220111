"""workflows/cute_animal_for_kids.json against the same graph from stock nodes, on small cards.

    COMFYUI_PATH=... python -m benchmarks.cute_animal files BASE/models
    COMFYUI_PATH=... python -m benchmarks.cute_animal run BASE out.jsonl --card 24 12 8
    python -m benchmarks.cute_animal table out.jsonl

For each card and side two server processes: the first draws 20 different prompts, half of them in
Chinese, and then 10 of them again with other seeds; the second, after a restart, draws two known
prompts and a new one. A side is "stock", "ours" (the drawing), "whole" (with the colouring page
and the stickers), "nf4" (the drawing, its transformer quantised at load), "fp8" (the drawing, its
LoRA added at run time: "ours" where the card does not hold both models) or "merged" (its LoRA
merged, as in stock). A part of a card is the real one with another process holding the rest; less
RAM (--ram) is a cgroup, see small_machine.py.

`run` goes on where it was stopped: a session whose last line is in the file is not run again, and
with --seconds none is begun that would not end by then. --rehearse draws on the CPU with the
embedded model: it shows that everything runs, and its figures mean nothing. It loads weights as
stock does (`default`): on a CPU `auto` would keep them in bfloat16, and pictures with a LoRA would
differ. The options that are not ours go to ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from demo.conversion import load_workflow
from demo.server import Server

from . import cute_animal_graphs as graphs
from . import full_size_checkpoints, large_files
from .quantized_cells import RAMS
from .small_machine import Gauge, forget, small_ram
from .text_to_image import ROOT, device_bytes_used, small_card

WORKFLOW = ROOT / "workflows" / "cute_animal_for_kids.json"
LIGHTNING = "loras/Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors"
LIGHTNING_RANK = 64
STOCK_ENCODER = "animals_with_vocabulary.safetensors"  # of a rehearsal
FREE_GIB = {24: 23.5, 12: 11.5, 8: 7.6}  # of a card of so many GB, after its driver
WORDS = (
    "a little bear with a hat", "一只戴帽子的小熊", "a blue cat", "一只蓝色的小猫",
    "a pink pig in the snow", "雪地里的粉色小猪", "a green frog with glasses",
    "戴眼镜的绿色小青蛙",
    "a yellow duck with a scarf", "围着围巾的黄色小鸭", "a brown dog at the beach",
    "海边的棕色小狗", "a purple rabbit in a dress", "穿裙子的紫色小兔子",
    "an orange fox in a forest",
    "森林里的橙色小狐狸", "a white sheep in a meadow", "草地上的白色小羊", "a red owl at night",
    "夜里的红色小猫头鹰",
)  # fmt: skip
AGAIN = WORDS[:10]
AFTER = (WORDS[0], WORDS[3], "一只在花园里的小老虎")  # after a restart: known, known, new
PHASES = ("first", "restart")
CELL = ("card", "ram_size", "side", "phase", "args")  # what makes a session
Row = dict[str, Any]


def work(phase: str, images: int) -> list[tuple[str, str, int]]:
    """(kind, words, seed) of each picture of a session; `images` of each kind at most."""
    if phase == "restart":
        kinds = ("known", "known", "new")
        return [(k, w, 900 + i) for i, (k, w) in enumerate(zip(kinds, AFTER, strict=True))]
    new = [("new", words, i) for i, words in enumerate(WORDS[:images])]
    return new + [("known", words, 500 + i) for i, words in enumerate(AGAIN[: (images + 1) // 2])]


def texts(words: str, style: str, palette: str, **more: Any) -> tuple[str, str]:
    """Both prompts, as Cute Animal Prompt writes them."""
    from core import cute_animal

    return cute_animal.positive(words, style, palette, **more), cute_animal.NEGATIVE


def write_files(models: Path) -> None:
    """Random checkpoints of the official sizes (30 GB), and a LoRA of Lightning's (2.4 GB)."""
    full_size_checkpoints.use_comfyui()
    full_size_checkpoints.write_all(models)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in large_files.transformer_shapes().items():
        if name.endswith(".weight") and len(shape) == 2 and large_files.BLOCK.match(name):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            shapes[f"{layer}.lora_down.weight"] = (LIGHTNING_RANK, shape[1])
            shapes[f"{layer}.lora_up.weight"] = (shape[0], LIGHTNING_RANK)
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    made = {n: torch.randn(s, generator=draw) * 0.01 for n, s in shapes.items()}
    (models / LIGHTNING).parent.mkdir(parents=True, exist_ok=True)
    save_file(made, models / LIGHTNING)


# ---------------------------------------------------------------------------------- one session
@contextlib.contextmanager
def prepared(base: Path, rehearse: bool) -> Iterator[None]:
    """A base directory for both sides; for a rehearsal with the embedded model."""
    for name in ("small_card", "small_ram"):
        target = base / "custom_nodes" / name
        shutil.copytree(ROOT / "benchmarks" / name, target, dirs_exist_ok=True)
    (base / "web").mkdir(exist_ok=True)
    (base / "web" / "index.html").touch()
    if rehearse:
        from demo.checkpoints import make_checkpoints

        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), base / "models")
        taught = base / "custom_nodes" / "teach_stock"
        shutil.copytree(ROOT / "tests" / "teach_stock", taught, dirs_exist_ok=True)
        write_stock_encoder(base / "models")
    yield


def write_stock_encoder(models: Path) -> None:
    """The embedded text encoder with its vocabulary written out, which stock's loader needs."""
    from safetensors.torch import load_file, save_file

    from core.sign_codes import sign_codes
    from demo.embedded import FOLDER, TEXT_ENCODER

    tensors = load_file(FOLDER / TEXT_ENCODER)
    norm = tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = sign_codes(len(norm)).to(norm.dtype)
    save_file(tensors, models / "text_encoders" / STOCK_ENCODER)


def tiny(graph: graphs.Graph) -> graphs.Graph:
    """A side's graph on the embedded model, with weights as stock's loader takes them where the
    side does not say otherwise."""
    from demo.substitutions import substitute

    graph = substitute(graph)
    for key in graphs.of_class(graph, graphs.LOADER):
        if graph[key]["inputs"]["weight_dtype"] == "auto":
            graph[key]["inputs"]["weight_dtype"] = "default"
    for key in graphs.of_class(graph, "CLIPLoader"):
        graph[key]["inputs"]["clip_name"] = STOCK_ENCODER
    return graph


def taken(graph: graphs.Graph, outputs: dict[str, Row]) -> Row | None:
    """As what our loader took the transformer: dtype, layers by format, why. None for stock's."""
    for key in graphs.of_class(graph, graphs.LOADER):
        for facts in outputs.get(key, {}).get("qwen_vram", ()):
            return {name: facts[name] for name in ("dtype", "formats", "why")}
    return None


def one(server: Server, gauge: Gauge, before: int, graph: graphs.Graph) -> Row:
    """One picture: seconds, of each node too, the peaks, and a digest of the pixels."""
    gauge.take()
    begin = time.perf_counter()
    result = server.submit(graph)
    seconds = time.perf_counter() - begin
    peaks = gauge.take()
    ran = {graph[key]["class_type"] for key in result.executed if key in graph}
    row: Row = {
        "status": result.status, "error": result.error, "seconds": round(seconds, 3),
        "vram": peaks["VRAM"] - before if torch.cuda.is_available() else None,
        "ram": {k: v for k, v in peaks.items() if k != "VRAM"},
        "encoder loaded": any("Load" in c and "Encoder" in c or c == "CLIPLoader" for c in ran),
        "nodes": {k: round(v, 3) for k, v in result.seconds.items()},
        "weights": taken(graph, result.outputs),
    }  # fmt: skip
    if result.images:
        pixels = PIL.Image.open(io.BytesIO(result.images[0].content)).tobytes()
        row["pixels"] = hashlib.sha256(pixels).hexdigest()[:16]
    return row


def session(options: argparse.Namespace, cell: Row) -> Iterator[Row]:
    """One server process: a row for each picture, and a last one when all have been drawn."""
    before, begin = device_bytes_used(), time.perf_counter()
    extra = ["--front-end-root", str(options.base / "web"), *options.args]
    comfyui = Path(os.environ["COMFYUI_PATH"])
    if options.cold_files:
        forget(*(options.base / "models").rglob("*.safetensors"))
    cpu = not torch.cuda.is_available()
    with Server(comfyui, options.base, ROOT, cpu=cpu, extra_args=extra) as server:
        started = time.perf_counter() - begin
        workflow = load_workflow(options.workflow, server.get_json("/object_info"))
        gauge = Gauge(server.pid)
        try:
            for number, (kind, words, seed) in enumerate(work(cell["phase"], options.images)):
                graph = graphs.with_words(workflow, words, seed)
                graph = graphs.graph_of(cell["side"], graph, texts)
                graph = tiny(graph) if options.rehearse else graph
                row = one(server, gauge, before, graph)
                if "failed validation" in row["error"]:  # a file is missing, say: no result
                    raise SystemExit(f"{cell}: {row['error']}")
                yield {**cell, "number": number, "kind": kind, "started": round(started, 2), **row}
        finally:
            gauge.running = False
    yield {**cell, "end": True, "took": round(time.perf_counter() - begin, 1)}


# ------------------------------------------------------------------------------------- all of it
def cells(options: argparse.Namespace) -> list[Row]:
    """The sessions, both sides of a card one after the other; a restart follows its first."""
    cards = [None] if options.rehearse else options.card
    return [
        {"card": card, "ram_size": options.ram, "side": side, "phase": phase, "args": options.args}
        for card in cards
        for side in options.side
        for phase in options.phase
    ]


def read(path: Path) -> list[Row]:
    """The rows so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_of(row: Row, cell: Row) -> bool:
    """Whether a row belongs to a session."""
    return all(row[key] == value for key, value in cell.items())


def run(options: argparse.Namespace) -> None:
    """Every session that is not in the file yet, as long as there is time."""
    until = time.monotonic() + options.seconds
    with prepared(options.base, options.rehearse):
        for cell in cells(options):
            rows = read(options.out)
            if any(row.get("end") and is_of(row, cell) for row in rows):
                continue
            longest = max((row["took"] for row in rows if row.get("end")), default=0.0)
            if time.monotonic() + longest > until:
                print("stopped: no time for another session; run the same again", flush=True)
                return
            if cell["phase"] == "first":  # what an earlier side has kept is not this one's
                shutil.rmtree(options.base / "user" / "__qwen_vram", ignore_errors=True)
            free = None if cell["card"] is None else FREE_GIB[cell["card"]]
            attempt = time.time()
            ram = small_ram(RAMS[cell["ram_size"]])
            with ram, small_card(free), options.out.open("a", encoding="utf-8") as out:
                for row in session(options, cell):
                    out.write(json.dumps({**row, "attempt": attempt}) + "\n")
                    out.flush()
                    keys = ("card", "side", "phase", "kind", "seconds", "vram", "error")
                    print({k: row[k] for k in keys if k in row}, flush=True)
    print("done", flush=True)


def complete(rows: list[Row]) -> list[Row]:
    """The pictures of sessions that came to their end, of each the latest attempt."""
    ends: dict[str, float] = {}
    for row in rows:
        if row.get("end"):
            ends[json.dumps([row[key] for key in CELL])] = row["attempt"]
    return [row for row in rows if "number" in row and row["attempt"] in ends.values()]


HEAD = (
    "card, GB", "RAM", "side", "pictures made", "cold start to the first picture, s",
    "new prompt, s",
    "known prompt, s", "restart to a known prompt's picture, s", "encoder loaded after the restart",
    "peak VRAM, GB", "peak RAM of its own + files, GB", "transformer's weights",
)  # fmt: skip


def median(rows: list[Row], kind: str) -> str:
    """Median seconds of the pictures after the first of a process."""
    found = [r["seconds"] for r in rows if r["kind"] == kind and r["number"] > 0]
    return f"{statistics.median(found):.2f}" if found else "-"


def from_start(rows: list[Row]) -> str:
    """Seconds from the start of the process to its first picture, and what the start took."""
    first = next((r for r in rows if r["number"] == 0), None)
    if first is None or first["status"] != "success":
        return "-"
    return f"{first['started'] + first['seconds']:.1f} ({first['started']:.1f} of it the start)"


def weights(rows: list[Row]) -> str:
    """What the transformer's weights were, each kind once."""
    known = [facts for r in rows if (facts := r.get("weights"))]
    kinds = dict.fromkeys(", ".join(sorted(f["formats"])) or f["dtype"] for f in known)
    return " / ".join(kinds) or "as stock loads them"


def line(card: int | None, ram: str, side: str, rows: list[Row]) -> str:
    """One side of one machine."""
    first = [r for r in rows if r["phase"] == "first"]
    again = [r for r in rows if r["phase"] == "restart"]
    made = [r for r in rows if r["status"] == "success"]
    known = [r for r in again if r["kind"] == "known"]
    vram = [r["vram"] for r in rows if r["vram"] is not None]
    kinds = ("RssAnon", "RssFile")
    peaks = [max((r["ram"].get(k, 0) for r in rows), default=0) / 1e9 for k in kinds]
    values = [
        str(card or "CPU, rehearsal"), ram, side, f"{len(made)} of {len(rows)}",
        from_start(first), median(first, "new"), median(first, "known"), from_start(again),
        f"{sum(r['encoder loaded'] for r in known)} of {len(known)}",
        f"{max(vram) / 1e9:.2f}" if vram else "not measurable",
        f"{peaks[0]:.1f} + {peaks[1]:.1f}", weights(rows),
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def same_pictures(rows: list[Row]) -> str:
    """How many pictures both sides drew pixel by pixel alike."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        place = (row["card"], row["ram_size"], row["phase"], row["number"])
        found.setdefault(place, {})[row["side"]] = row.get("pixels", "")
    both = [p for p in found.values() if p.get("stock") and p.get("ours")]
    same = sum(p["stock"] == p["ours"] for p in both)
    return f"Same pictures, pixel by pixel: {same} of {len(both)}."


def table(rows: list[Row]) -> str:
    """Markdown."""
    rows = complete(rows)
    sides = dict.fromkeys((row["card"], row["ram_size"], row["side"]) for row in rows)
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for side in sides:
        lines.append(
            line(*side, [r for r in rows if (r["card"], r["ram_size"], r["side"]) == side])
        )
    return "\n".join([*lines, "", same_pictures(rows)])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("files").add_argument("models", type=Path)
    commands.add_parser("table").add_argument("out", type=Path)
    measure = commands.add_parser("run")
    measure.add_argument("base", type=Path)
    measure.add_argument("out", type=Path)
    measure.add_argument("--card", type=int, nargs="+", choices=FREE_GIB, default=list(FREE_GIB))
    measure.add_argument("--side", nargs="+", choices=graphs.SIDES, default=list(graphs.SIDES[:3]))
    measure.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    measure.add_argument("--ram", choices=RAMS, default="whole", help="of the machine")
    measure.add_argument("--images", type=int, default=len(WORDS), help="different prompts")
    measure.add_argument("--seconds", type=float, default=570.0)
    measure.add_argument("--cold-files", action="store_true")
    measure.add_argument("--rehearse", action="store_true")
    measure.add_argument("--workflow", type=Path, default=WORKFLOW)
    options, options.args = parser.parse_known_args()
    if options.command == "files":
        write_files(options.models)
    elif options.command == "table":
        print(table(read(options.out)))
    else:
        # As an exit, so that the server of the session ends, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        options.base.mkdir(parents=True, exist_ok=True)
        run(options)


if __name__ == "__main__":
    main()
