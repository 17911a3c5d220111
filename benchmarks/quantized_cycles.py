"""Load, draw, add and remove a LoRA, switch the format, let go: does memory come back?

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_cycles BASE OUT.json [--cycles 200] [ARGS]
       COMFYUI_PATH=... python -m benchmarks.quantized_cycles BASE OUT.json --wide [--tiny] [ARGS]

A real server runs each cycle in the next format, on the card where there is one; then ComfyUI is
told to let go of everything. Without --wide: transformer and text encoder of BASE/models (`make
demo` writes such a folder; --unet, --clip and --lora name others than the embedded model's), one
step with a LoRA and one without it. With --wide: layers as large as the published model's, in a
transformer with --blocks of its blocks that is written to BASE/models; a step at 256 px, every
second time with a LoRA, every fourth time with a VRAM limit that makes weights stream. --tiny
rehearses that on the CPU. The start is the mean of two rounds through all formats after the first
four, by when what is loaded once (libraries, kernels, allocator) is there; the end is the mean of
the last two. What counts is the process's anonymous RAM, and the card's memory by NVML. ARGS go to
ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from . import large_files
from .quantized_loading import gauged, prepared
from .small_card_runs import nodes
from .small_machine import EVERYTHING, let_go
from .text_to_image import ROOT, Graph

FORMATS = ("bnb_nf4", "default", "int8", "bnb_fp4", "int4", "bnb_int8")
WIDE_FORMATS = ("bnb_nf4", "int8", "bnb_int8", "int4", "bnb_fp4")
ROUNDS_BEFORE, ROUNDS = 4, 2
LIMIT = 50e6  # bytes
SIDE = 256
LOADED = {"device": "default", "keep_loaded": False, "preset": "balanced"}
SAMPLED: dict[str, Any] = {
    "steps": 1, "cfg": 1.0, "denoise": 1.0, "sampler_name": "euler", "scheduler": "simple",
}  # fmt: skip
Cycle = tuple[str, list[Graph]]  # the format, and what is run one after another


def graphs(unet: str, clip: str, lora: str, size: int) -> Iterator[Cycle]:
    """For each cycle its format, and its two graphs: with the LoRA and without."""
    number = 0
    while True:
        formats = (FORMATS[number % len(FORMATS)], FORMATS[(number + 1) % len(FORMATS)])
        names = (unet, clip, lora)
        yield formats[0], [_graph(names, formats, with_lora, size) for with_lora in (True, False)]
        number += 1


def _graph(
    names: tuple[str, str, str], formats: tuple[str, str], with_lora: bool, size: int
) -> Graph:
    unet, clip, lora = names
    model = ["lora" if with_lora else "unet", 0]
    text = {"positive": ["positive", 0], "negative": ["positive", 0]}
    given = {"model": model, **text, "latent_image": ["latent", 0], "seed": 1, **SAMPLED}
    files = ({"unet_name": unet}, {"clip_name": clip})
    loaded = [{**f, "weight_dtype": d, **LOADED} for f, d in zip(files, formats, strict=True)]
    made = {
        "unet": ("QwenVRAMLoadDiffusionModel", loaded[0]),
        "clip": ("QwenVRAMLoadTextEncoder", loaded[1]),
        "positive": ("CLIPTextEncode", {"clip": ["clip", 0], "text": "a red fox"}),
        "latent": ("EmptySD3LatentImage", {"width": size, "height": size, "batch_size": 1}),
        "sampler": ("KSampler", given),
        "out": ("PreviewAny", {"source": ["sampler", 0]}),
    }
    if with_lora:
        chosen = {"model": ["unet", 0], "lora_name": lora, "strength_model": 0.7}
        made["lora"] = ("LoraLoaderModelOnly", chosen)
    graph = nodes(made)
    for node in graph.values():
        node["_meta"] = {"qwen_vram": {"keep_nothing": "every cycle is to encode"}}
    return graph


def wide_graphs(options: argparse.Namespace) -> Iterator[Cycle]:
    """For each cycle its format, and its graph."""
    file, lora = (Path(f).name for f in (large_files.SHORT, large_files.SHORT_LORA))
    if options.tiny:
        file, lora = "tiny_qwen_image.safetensors", ""
    text = {"width": 64 if options.tiny else 3584, "references": "", "tokens": 60}
    cycle = 0
    while True:
        format = WIDE_FORMATS[cycle % len(WIDE_FORMATS)]
        made: dict[str, tuple[str, dict[str, Any]]] = {
            "unet": (
                "QwenVRAMLoadDiffusionModel",
                {"unet_name": file, "weight_dtype": format, **LOADED},
            ),
            "text": ("BenchConditions", text),
            "latent": ("EmptySD3LatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}),
        }
        last = "unet"
        if cycle % 2 and lora:
            names = {"lora_name": lora, "strength_model": 0.7}
            made["lora"], last = ("LoraLoaderModelOnly", {"model": [last, 0], **names}), "lora"
        sampler = {
            "model": [last, 0], "positive": ["text", 0], "negative": ["text", 0],
            "latent_image": ["latent", 0], "seed": cycle, **SAMPLED, "policy": "exact only",
            "vram_limit": options.limit if cycle % 4 == 3 else 0.0, "settings": "0: 20, 5, ddim",
        }  # fmt: skip
        made["sampler"] = ("QwenVRAMSampler", sampler)
        made["show"] = ("PreviewAny", {"source": ["sampler", 0]})
        yield format, [nodes(made)]
        cycle += 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cycles in one server."""
    formats = WIDE_FORMATS if options.wide else FORMATS
    first, mean = ROUNDS_BEFORE * len(formats), ROUNDS * len(formats)
    total = options.cycles + first + mean
    names = (options.unet, options.clip, options.lora, options.size)
    steps = islice(wide_graphs(options) if options.wide else graphs(*names), total)
    read = {*range(first, first + mean), *range(0, total, 20), *range(total - mean, total)}
    rows: list[dict[str, int]] = []
    with gauged(options, tuple(options.args)) as (server, gauge):
        for cycle, (format, asked) in enumerate(steps):
            for graph in asked:
                result = server.submit(graph, timeout=120.0)
                if result.status != "success":
                    raise SystemExit(f"cycle {cycle}, {format}: {result.error}")
            if cycle not in read:
                server.post_json(*EVERYTHING)
            else:
                rows.append({"cycle": cycle, **let_go(server, gauge)})
                print({k: round(v / 1e6, 1) if v > 999 else v for k, v in rows[-1].items()})
    return {"grown MB": grown(rows, first, mean), "args": options.args, "rows": rows}


def grown(rows: list[dict[str, int]], first: int, mean: int) -> dict[str, float]:
    """MB by which the last `mean` rows are above those of the cycles from `first` on."""
    kinds = [kind for kind in ("VRAM", "RssAnon") if kind in rows[0]]
    before = [row for row in rows if first <= row["cycle"] < first + mean]
    start = {k: statistics.mean(r[k] for r in before) for k in kinds}
    end = {k: statistics.mean(r[k] for r in rows[-mean:]) for k in kinds}
    return {k: round((end[k] - start[k]) / 1e6, 1) for k in kinds}


def main() -> None:
    """Write the model if it is to be wide, run the cycles, say by how much memory grew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--unet", default="tiny_animals_edit.safetensors")
    parser.add_argument("--clip", default="tiny_animals_text.safetensors")
    parser.add_argument("--lora", default="tiny_animals_lora.safetensors")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--limit", type=float, default=1.2, help="of VRAM, GB: weights stream")
    parser.add_argument("--tiny", action="store_true")
    options, options.args = parser.parse_known_args()
    options.tiny = options.tiny or not options.wide
    prepared(options)
    if not options.tiny and not (options.base / "models" / large_files.SHORT).exists():
        command = [sys.executable, "-m", "benchmarks.large_files", str(options.base / "models")]
        subprocess.run([*command, str(options.blocks)], cwd=ROOT, env=dict(os.environ), check=True)
    found = measure(options)
    options.out.write_text(json.dumps(found))
    for name, megabytes in found["grown MB"].items():
        verdict = "within" if abs(megabytes) <= LIMIT / 1e6 else "NOT within"
        print(f"{name}: {megabytes:+.1f} MB after {options.cycles} cycles, {verdict} 50 MB")


if __name__ == "__main__":
    main()
