"""200 times load, draw, LoRA, another format, let go: whether memory returns to the start.

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_card_cycles BASE OUT.json [--cycles N] [ARGS]
Of layers as large as the published model's (quantized_cycles.py does it with all of a tiny one): a
transformer of full width with --blocks of its blocks is written to BASE/models. Each cycle loads it
in the next of five formats, draws a step at 256 px, every second time with a LoRA, every fourth
time with a VRAM limit that makes weights stream; then everything is let go. The start is the mean
of ten cycles after the first twenty, the end that of the last ten: the process's anonymous RAM, and
the card's memory by NVML. ARGS go to ComfyUI. --tiny: a rehearsal on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo.server import Server

from . import large_files
from .quantized_loading import prepared
from .small_card_runs import nodes, running
from .small_machine import Gauge
from .text_to_image import ROOT, Graph

FORMATS = ("bnb_nf4", "int8", "bnb_int8", "int4", "bnb_fp4")
SIDE = 256
FIRST, MEAN = 20, 10


def graph(options: argparse.Namespace, cycle: int) -> Graph:
    """One cycle's prompt."""
    file, lora = (Path(f).name for f in (large_files.SHORT, large_files.SHORT_LORA))
    if options.tiny:
        file, lora = "tiny_qwen_image.safetensors", ""
    unet = {"unet_name": file, "weight_dtype": FORMATS[cycle % len(FORMATS)], "preset": "balanced"}
    text = {"width": 64 if options.tiny else 3584, "references": "", "tokens": 60}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": ("QwenVRAMLoadDiffusionModel", {**unet, "device": "default", "keep_loaded": False}),
        "text": ("BenchConditions", text),
        "latent": ("EmptySD3LatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}),
    }
    last = "unet"
    if cycle % 2 and lora:
        names = {"lora_name": lora, "strength_model": 0.7}
        made["lora"], last = ("LoraLoaderModelOnly", {"model": [last, 0], **names}), "lora"
    sampler = {
        "model": [last, 0], "positive": ["text", 0], "negative": ["text", 0],
        "latent_image": ["latent", 0], "seed": cycle, "steps": 1, "cfg": 1.0, "denoise": 1.0,
        "sampler_name": "euler", "scheduler": "simple", "policy": "exact only",
        "vram_limit": options.limit if cycle % 4 == 3 else 0.0, "settings": "0: 20, 5, ddim",
    }  # fmt: skip
    made["sampler"] = ("QwenVRAMSampler", sampler)
    made["show"] = ("PreviewAny", {"source": ["sampler", 0]})
    return nodes(made)


def settled(server: Server, gauge: Gauge) -> dict[str, int]:
    """What is taken when everything has been let go."""
    server.post_json("/free", {"unload_models": True, "free_memory": True})
    found = gauge.now()
    for _ in range(40):
        time.sleep(0.1)
        before, found = found, gauge.now()
        if found == before:
            break
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cycles in one server."""
    rows, total = [], options.cycles + FIRST + MEAN
    read = {*range(FIRST, FIRST + MEAN), *range(0, total, 20), *range(total - MEAN, total)}
    with running(options, tuple(options.args)) as (server, peak):
        peak.running = False
        gauge = Gauge(server.pid)
        try:
            for cycle in range(total):
                result = server.submit(graph(options, cycle), timeout=120.0)
                assert result.status == "success", result.error
                if cycle in read:
                    rows.append({"cycle": cycle, **settled(server, gauge)})
                    print({k: round(v / 1e6, 1) if v > 999 else v for k, v in rows[-1].items()})
                else:
                    server.post_json("/free", {"unload_models": True, "free_memory": True})
        finally:
            gauge.running = False
    kinds = [kind for kind in ("VRAM", "RssAnon") if kind in rows[0]]
    first = [row for row in rows if FIRST <= row["cycle"] < FIRST + MEAN]
    start = {k: statistics.mean(r[k] for r in first) for k in kinds}
    end = {k: statistics.mean(r[k] for r in rows[-MEAN:]) for k in kinds}
    grown = {k: round((end[k] - start[k]) / 1e6, 1) for k in kinds}
    return {"grown MB": grown, "args": options.args, "cycles": options.cycles, "rows": rows}


def main() -> None:
    """Write the model, run the cycles, say by how much memory grew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--limit", type=float, default=1.2, help="of VRAM, GB: weights stream")
    parser.add_argument("--tiny", action="store_true")
    options, options.args = parser.parse_known_args()
    prepared(options)
    if not options.tiny and not (options.base / "models" / large_files.SHORT).exists():
        command = [sys.executable, "-m", "benchmarks.large_files", str(options.base / "models")]
        subprocess.run([*command, str(options.blocks)], cwd=ROOT, env=dict(os.environ), check=True)
    found = measure(options)
    options.out.write_text(json.dumps(found))
    print("grown, MB:", found["grown MB"], flush=True)


if __name__ == "__main__":
    main()
