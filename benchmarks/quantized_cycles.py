"""Load, draw, add and remove a LoRA, switch the format, unload: does memory come back?

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_cycles BASE OUT.json [--cycles 200] [--gpu]
    [ARGS]

BASE/models holds the models (`make demo` and full_size_checkpoints write such folders); their names
are --unet, --clip and --lora, of which the embedded model's are the default. A real server runs
each cycle: the next format for transformer and text encoder, one step with the LoRA and one without
it, then ComfyUI is told to unload everything. After each cycle: the server's resident memory, and
with --gpu the memory of the card that is in use. The start is the second round through all formats:
by then what is loaded once (libraries, kernels, allocator) is there. ARGS go to ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

FORMATS = ("bnb_nf4", "default", "int8", "bnb_fp4", "int4", "bnb_int8")
LIMIT = 50e6  # bytes
SETTLE_SECONDS = 0.5  # until the worker has unloaded


def graphs(unet: str, clip: str, lora: str, size: int) -> Iterator[tuple[str, list[dict]]]:
    """For each cycle its format, and its two graphs: with the LoRA and without."""
    number = 0
    while True:
        weight_dtype = FORMATS[number % len(FORMATS)]
        text = FORMATS[(number + 1) % len(FORMATS)]
        names = (unet, clip, lora)
        yield (
            weight_dtype,
            [_graph(names, (weight_dtype, text), with_lora, size) for with_lora in (True, False)],
        )
        number += 1


def _graph(
    names: tuple[str, str, str], formats: tuple[str, str], with_lora: bool, size: int
) -> dict[str, Any]:
    options = {"device": "default", "keep_loaded": False, "preset": "balanced"}

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        meta = {"qwen_vram": {"keep_nothing": "every cycle is to encode"}}
        return {"class_type": class_type, "inputs": inputs, "_meta": meta}

    unet, clip, lora = names
    graph = {
        "unet": node(
            "QwenVRAMLoadDiffusionModel", unet_name=unet, weight_dtype=formats[0], **options
        ),
        "clip": node("QwenVRAMLoadTextEncoder", clip_name=clip, weight_dtype=formats[1], **options),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a red fox"),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["lora" if with_lora else "unet", 0],
            positive=["positive", 0],
            negative=["positive", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "out": node("PreviewAny", source=["sampler", 0]),
    }
    if with_lora:
        graph["lora"] = node(
            "LoraLoaderModelOnly", model=["unet", 0], lora_name=lora, strength_model=0.7
        )
    return graph


def growth(samples: list[int]) -> int:
    """Bytes by which the last round through all formats is above the second."""
    count = len(FORMATS)
    if len(samples) < 3 * count:
        raise ValueError(f"{len(samples)} cycles are too few to tell; at least {3 * count}.")
    first, last = samples[count : 2 * count], samples[-count:]
    return int(statistics.median(last) - statistics.median(first))


def used(server: Any, gpu: bool) -> dict[str, int]:
    """Bytes in use by the server, and of the card."""
    found = {"ram": psutil.Process(server.pid).memory_info().rss}
    if gpu:
        device = server.get_json("/system_stats")["devices"][0]
        found["vram"] = device["vram_total"] - device["vram_free"]
    return found


def main() -> None:
    """Run it, write the samples, and say by how much memory grew."""
    from demo.server import Server

    from .text_to_image import ROOT

    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--unet", default="tiny_animals_edit.safetensors")
    parser.add_argument("--clip", default="tiny_animals_text.safetensors")
    parser.add_argument("--lora", default="tiny_animals_lora.safetensors")
    parser.add_argument("--size", type=int, default=64)
    given, more = parser.parse_known_args()
    samples: dict[str, list[int]] = {}
    steps = islice(graphs(given.unet, given.clip, given.lora, given.size), given.cycles)
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with Server(comfyui, given.base, ROOT, cpu=not given.gpu, extra_args=more) as server:
        for number, (weight_dtype, both) in enumerate(steps):
            for graph in both:
                result = server.submit(graph)
                if result.status != "success":
                    raise SystemExit(f"cycle {number}, {weight_dtype}: {result.error}")
            server.post_json("/free", {"unload_models": True, "free_memory": True})
            time.sleep(SETTLE_SECONDS)
            for name, size in used(server, given.gpu).items():
                samples.setdefault(name, []).append(size)
    report = {name: {"growth": growth(found), "samples": found} for name, found in samples.items()}
    given.out.write_text(json.dumps(report, indent=1))
    for name, row in report.items():
        verdict = "within" if abs(row["growth"]) <= LIMIT else "NOT within"
        print(f"{name}: {row['growth'] / 1e6:+.1f} MB after {given.cycles} cycles, {verdict} 50 MB")


if __name__ == "__main__":
    main()
