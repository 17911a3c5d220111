"""The text encoder in every format beside stock: load, RAM, VRAM, seconds for a new prompt.

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_encoder BASE OUT.jsonl [--cards CARD ...]
Random files of full size are written to BASE/models when they are needed: Qwen2.5-VL-7B in bf16
(15.5 GB) and as fp8_scaled (9.0 GB). They stay. Each cell drops the file from the page cache, lets
a server load it and encode a prompt, encodes two more prompts, then lets everything go and does it
again ("warm"). Cards: as in quantized_loading.py. Each cell adds a line to OUT.jsonl; cells that
are there already, failed ones too, are not run again. --seconds: begin nothing new after that.
--tiny: a rehearsal on the CPU, with the embedded model in the place of both files.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.server import Server

from . import large_files
from .full_size_checkpoints import TEXT_ENCODER, random_weights, with_scales
from .quantized_loading import Options, gauged, prepared, run, write
from .small_card_runs import Row, nodes
from .small_machine import Gauge, forget, let_go
from .text_to_image import Graph, device_bytes_used, small_card
from .tiled_edit import CARDS, seen

BF16, FP8 = "bench_text_bf16.safetensors", Path(TEXT_ENCODER).name
TINY = "tiny_qwen_2.5_vl.safetensors"
STOCK_FP8, STOCK_BF16 = "stock fp8_scaled", "stock bf16"
FORMATS = ("bnb_nf4", "int8", "bnb_int8", "int4")
OF_FP8 = " of fp8_scaled"
WAYS = {
    "whole": (STOCK_FP8, STOCK_BF16, *FORMATS, "int8" + OF_FP8),
    "12 GB": (STOCK_FP8, STOCK_BF16, "bnb_int8", "bnb_nf4"),
    "8 GB": (STOCK_FP8, STOCK_BF16, "bnb_int8", "bnb_nf4"),
}
PROMPT = "A plush fox in a raincoat waters sunflowers beside a red fence, soft evening light, {}"
NUMBERS = {"first": 1, "second": 2, "third": 3, "warm": 4}


def file_of(way: str, options: Options) -> Path:
    """The file that is loaded."""
    folder = options.base.absolute() / "models" / "text_encoders"
    if options.tiny:
        return folder / TINY
    return folder / (FP8 if way == STOCK_FP8 or way.endswith(OF_FP8) else BF16)


def provide(path: Path) -> None:
    """Write the file, if it is not there yet."""
    if path.exists():
        return
    start, shapes = time.perf_counter(), large_files.text_encoder_shapes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == BF16:
        large_files.write_file(path, shapes, torch.bfloat16)
    else:
        sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        partial = path.with_suffix(".partial")
        save_file(with_scales(random_weights(sizes, torch.float8_e4m3fn, device)), partial)
        partial.replace(path)
    seconds = time.perf_counter() - start
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s", flush=True)


def graph(way: str, file: str, number: int) -> Graph:
    """One new prompt; what our cache keeps of encodings is not asked."""
    given = {"clip_name": file, "type": "qwen_image", "device": "default"}
    loader = ("CLIPLoader", given)
    if not way.startswith("stock"):
        own = {"weight_dtype": way.removesuffix(OF_FP8), "preset": "balanced"}
        own |= {"clip_name": file, "device": "default", "keep_loaded": False}
        loader = ("QwenVRAMLoadTextEncoder", own)
    text = {"clip": ["clip", 0], "text": PROMPT.format(number)}
    made = nodes(
        {
            "clip": loader,
            "encode": ("CLIPTextEncode", text),
            "show": ("PreviewAny", {"source": ["encode", 0]}),
        }
    )
    for node in made.values():
        node["_meta"] = {"qwen_vram": {"keep_nothing": "every prompt is to be encoded"}}
    return made


def run_cell(server: Server, gauge: Gauge, vram: int, way: str, options: Options) -> Row:
    """All prompts of a cell. Begins with nothing loaded."""
    path = file_of(way, options)
    let_go(server, gauge)
    row: Row = {"before": {k: round(v / 1e9, 2) for k, v in gauge.now().items()}}
    row["bytes"] = path.stat().st_size
    for name, number in NUMBERS.items():
        if name == "first":
            forget(path)
        elif name == "warm":
            let_go(server, gauge)
        row[name] = run(server, gauge, vram, graph(way, path.name, number))
        row["status"] = row[name]["status"]
        if row["status"] != "success":
            break
    return row


def serve(options: Options, card: str, ways: list[str]) -> None:
    """The cells of one card in one server."""
    os.environ.pop("QWEN_VRAM_CARD_GIB", None)
    with small_card(None if options.tiny else CARDS[card]):
        vram = device_bytes_used()
        with gauged(options) as (server, gauge):
            for way in ways:
                if time.monotonic() > options.end:
                    return
                row = {"group": "text encoder", "way": way, "card": card, "ram": "whole"}
                row |= run_cell(server, gauge, vram, way, options)
                write(options.out, row)
                if row["status"] != "success":  # the rest gets another server
                    return


def line(row: Row) -> str:
    """A row of the table."""
    cells = [row["way"], row["card"], f"{row['bytes'] / 1e9:.1f}"]
    runs = [row.get(name, {}) for name in NUMBERS]
    for node in ("clip", "encode"):
        cells.append(" / ".join(f"{one.get('nodes', {}).get(node, 0.0):.2f}" for one in runs))
    cells.append(" / ".join(str(one.get("seconds", "-")) for one in runs))
    for kind in ("RssAnon", "RssFile", "VRAM"):
        peaks = [runs[0].get("peaks", {}).get(node, {}) for node in ("clip", "encode")]
        cells.append(" / ".join(str(one.get(kind, "-")) for one in peaks))
    return f"| {' | '.join([*cells, row['status']])} |"


def table(rows: list[Row]) -> str:
    """Markdown; what has four numbers is of the first, second, third and warm prompt.

    Peaks are of the first, while loading and while encoding.
    """
    head = ("way", "card", "file GB", "loader s", "encoding s", "whole prompt s")
    head += ("own RAM, GB", "file's pages in RAM, GB", "VRAM, GB", "status")
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(line, rows)])


def missing(options: Options) -> list[tuple[str, str]]:
    """Cards and ways that have no row yet, in their order."""
    done = {(row["card"], row["way"]) for row in seen(options.out)}
    return [(c, way) for c in options.cards for way in WAYS[c] if (c, way) not in done]


def main() -> None:
    """Every cell that is not there yet, and the table of what there is."""
    parser = argparse.ArgumentParser(description="The text encoder in every format beside stock.")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cards", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    options.end = time.monotonic() + options.seconds
    prepared(options)
    while time.monotonic() < options.end and (wanted := missing(options)):
        card = wanted[0][0]
        ways = [way for place, way in wanted if place == card]
        for way in [] if options.tiny else ways:
            provide(file_of(way, options))
        serve(options, card, ways)
    print(table(seen(options.out)))


if __name__ == "__main__":
    main()
