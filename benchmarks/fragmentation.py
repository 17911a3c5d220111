"""Fragmentation: generations of mixed sizes near a memory cap, with one allocator after another.

Usage: COMFYUI_PATH=... python -m benchmarks.fragmentation BASE OUT [--only NAME ...] [--card GIB]
[--count N] [--steps N] [--seconds N] [--decode-every N] [--tiny] [--cpu] [ARGS]
BASE/models holds the official files or those of full_size_checkpoints; --tiny uses the demo's small
model. Each configuration gets a server of its own and writes OUT/<name>.jsonl: first what the
allocator doctor says of that process, then one line per generation. A file that is complete is not
made again, so --only runs them one by one; afterwards the plot and the table are of all that there
are. --seconds ends a configuration early, and the table says after how many generations. The
settings go the way of a user's: into ComfyUI's settings file, which prestartup_script.py reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import PIL.ImageDraw
import torch

from demo import embedded
from demo.checkpoints import make_checkpoints
from demo.server import Server, ServerError

from . import full_size_checkpoints as files
from .text_to_image import ROOT, Peak, device_bytes_used, small_card

PROMPT = "A lighthouse on a cliff above a stormy sea, oil painting, thick brush strokes"
SIZES = ((512, 512), (768, 512), (1024, 1024), (1328, 1328), (1664, 928), (928, 1664))
SIZES += ((1536, 1024), (640, 1536), (2048, 1024), (2048, 2048))
TINY_DIVISOR = 8
REPORT = "/qwen_vram/report?device=cuda:0&fragments=true"
TILED = "retrying with tiled VAE"  # ComfyUI's line when a decode ran out of memory
SETTING = "QwenVRAM.Allocator."


class Configuration(NamedTuple):
    """Settings of the dialog, options of the command line, and the backend that must come of it."""

    settings: dict[str, Any]
    args: tuple[str, ...] = ("--disable-dynamic-vram",)
    backend: str = "native"


def _native(**more: Any) -> dict[str, Any]:
    return {"Backend": "native", **more}


CONFIGURATIONS = {
    "native": Configuration(_native()),
    "max_split_size_mb_128": Configuration(_native(MaxSplitSizeMB=128)),
    "expandable_segments": Configuration(_native(ExpandableSegments="on")),
    "garbage_collection_threshold": Configuration(_native(GarbageCollectionThreshold=0.8)),
    "roundup_power2_divisions_8": Configuration(_native(RoundupPower2Divisions="8")),
    "cudaMallocAsync": Configuration({}, backend="cudaMallocAsync"),
    "native_dynamic_vram": Configuration(_native(), args=()),
}
LEFT, PANEL = 240, 100  # of the plot, in pixels


# ------------------------------------------------------------------------------------ one server
def graph(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Text to image in the size of that generation; the prompt is encoded once."""
    names = (
        embedded.FILES[:3] if options.tiny else (files.TRANSFORMER, files.TEXT_ENCODER, files.VAE)
    )
    unet, clip, vae = (name.rpartition("/")[2] for name in names)
    width, height = (side // (TINY_DIVISOR if options.tiny else 1) for side in size_of(number))
    loading = {"weight_dtype": "default", "device": "default", "keep_loaded": False}
    sampler = {
        "model": ["unet", 0], "positive": ["text", 0], "negative": ["text", 0],
        "latent_image": ["latent", 0], "seed": number, "steps": options.steps, "cfg": 1.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    nodes = {
        "unet": ("QwenVRAMLoadDiffusionModel", {"unet_name": unet, **loading}),
        "clip": ("QwenVRAMLoadTextEncoder", {"clip_name": clip, **loading}),
        "text": ("CLIPTextEncode", {"clip": ["clip", 0], "text": PROMPT}),
        "latent": ("EmptySD3LatentImage", {"width": width, "height": height, "batch_size": 1}),
        "sampler": ("KSampler", sampler),
    }
    if number % options.decode_every == 0:
        nodes["vae"] = ("QwenVRAMLoadVAE", {"vae_name": vae, **loading})
        nodes["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
        nodes["save"] = ("PreviewImage", {"images": ["decode", 0]})
    else:
        nodes["save"] = ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "bench"})
    return {k: {"class_type": c, "inputs": i} for k, (c, i) in nodes.items()}


def size_of(number: int) -> tuple[int, int]:
    """Width and height of a generation: the same in every configuration."""
    return random.Random(number).choice(SIZES)


def generations(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """What one configuration did, line by line."""
    chosen = CONFIGURATIONS[name]
    write_settings(options.base, chosen.settings)
    used_before = device_bytes_used()
    with Server(
        Path(os.environ["COMFYUI_PATH"]), options.base, ROOT, cpu=options.cpu,
        extra_args=["--front-end-root", str(options.base / "web"), *chosen.args, *options.args],
    ) as server:  # fmt: skip
        peak = Peak(server.pid)
        try:
            yield doctor(server, chosen, options.cpu)
            start = time.perf_counter()
            for number in range(options.count):
                if options.seconds and time.perf_counter() - start > options.seconds:
                    break
                yield one(server, peak, used_before, number, graph(options, number))
        except ServerError as error:
            yield {"error": f"the server ended: {str(error).splitlines()[0]}", "status": "died"}
        finally:
            peak.running = False


def write_settings(base: Path, settings: dict[str, Any]) -> None:
    """As the settings dialog would."""
    path = base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"{SETTING}{name}": value for name, value in settings.items()}))


def doctor(server: Server, chosen: Configuration, cpu: bool) -> dict[str, Any]:
    """What is in effect in that process; raises RuntimeError if it is another backend."""
    prompt = {"1": {"class_type": "QwenVRAMAllocator", "inputs": {"apply_now": False}}}
    (told,) = server.submit(prompt).outputs["1"]["qwen_vram"]
    if not cpu and told["backend"] != chosen.backend:
        raise RuntimeError(
            f"The backend is {told['backend']}, not {chosen.backend}:\n{told['report']}"
        )
    return {"doctor": told["report"], "options": told["options"]}


def one(
    server: Server, peak: Peak, used_before: int, number: int, prompt: dict[str, Any]
) -> dict[str, Any]:
    """One generation: seconds, whether it failed, the peak, and the free blocks after it."""
    peak.take()
    tiled = server.log_text().count(TILED)
    start = time.perf_counter()
    result = server.submit(prompt)
    row = {
        "generation": number,
        "size": size_of(number),
        "seconds": round(time.perf_counter() - start, 3),
        "status": result.status,
        "error": result.error[:300],
        "tiled_retries": server.log_text().count(TILED) - tiled,
        "peak_gib": round((peak.take()[0] - used_before) / 2**30, 2) if used_before else None,
    }
    return {**row, **blocks(server)}


def blocks(server: Server) -> dict[str, Any]:
    """The allocator's figures by the pack's report; None with the reason where there are none."""
    names = ("largest_free_block_bytes", "inactive_split_bytes", "reserved_bytes")
    try:
        (device,) = (d for d in server.get_json(REPORT)["devices"] if d["kind"] != "cpu")
    except (urllib.error.HTTPError, ValueError) as error:  # no such route, no such device
        return {**dict.fromkeys(names), "why": f"no report of a GPU ({error})"}
    allocator = device["allocator"]
    return {**{name: allocator.get(name) for name in names}, "why": device["not_measurable"]}


# ------------------------------------------------------------------------------------ the results
def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    """The generations of a configuration, [] if it was not run."""
    path = out / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "status" in row]


def is_complete(out: Path, name: str) -> bool:
    """Whether the last line says that the configuration came to its end."""
    path = out / f"{name}.jsonl"
    return path.exists() and path.read_text().rpartition("\n{")[2].startswith('"end"')


def measure(options: argparse.Namespace, name: str) -> None:
    """One configuration into its file, each line as soon as it is known."""
    with (options.out / f"{name}.jsonl").open("w") as file:
        for row in generations(options, name):
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = {k: v for k, v in row.items() if k not in ("doctor", "options", "why")}
            print(name, json.dumps(shown) if shown else row["doctor"], flush=True)
        end = {"card": options.card, "count": options.count, "steps": options.steps}
        file.write(json.dumps({"end": {**end, "decode_every": options.decode_every}}) + "\n")


def table(out: Path) -> str:
    """For RESULTS.md: failures, time and free blocks of each configuration that was run."""
    heads = ("configuration", "generations", "failed", "decoded in tiles", "median s", "sum s")
    heads += ("largest free block, last ten, GB", "peak GiB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in CONFIGURATIONS:
        if not (rows := rows_of(out, name)):
            continue
        seconds = [r["seconds"] for r in rows if r["status"] == "success"]
        free = [b / 1e9 for r in rows[-10:] if (b := r.get("largest_free_block_bytes")) is not None]
        cells = [
            name,
            len(rows),
            sum(r["status"] != "success" for r in rows),
            sum(r.get("tiled_retries", 0) for r in rows),
            f"{statistics.median(seconds):.2f}" if seconds else "none succeeded",
            f"{sum(seconds):.1f}",
            f"{statistics.mean(free):.2f}" if free else "not measurable",
            max((p for r in rows if (p := r.get("peak_gib"))), default="not measurable"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(out: Path) -> None:
    """OUT/fragmentation.png: the largest free block after each generation, red if it failed."""
    every = {name: rows for name in CONFIGURATIONS if (rows := rows_of(out, name))}
    known = [b for rows in every.values() for r in rows if (b := r.get("largest_free_block_bytes"))]
    top = max(known, default=1)
    longest = max(map(len, every.values()), default=1)
    picture = PIL.Image.new("RGB", (1000, 60 + PANEL * len(every)), "white")
    draw = PIL.ImageDraw.Draw(picture)
    head = "Largest free block of PyTorch's allocator after each generation; red: it failed"
    draw.text((20, 12), f"{head}. Full height: {top / 1e9:.2f} GB", fill="black")
    for index, (name, rows) in enumerate(every.items()):
        bottom = 40 + PANEL * (index + 1) - 12
        draw.line([(LEFT, bottom), (980, bottom)], fill="#999999")
        draw.text((20, bottom - 60), name, fill="black")
        if not any("largest_free_block_bytes" in r and r["largest_free_block_bytes"] for r in rows):
            draw.text((LEFT, bottom - 20), "not measurable", fill="black")
        step = (980 - LEFT) / longest
        for n, row in enumerate(rows):
            height = (row.get("largest_free_block_bytes") or 0) / top * (PANEL - 20)
            failed = row["status"] != "success"
            x = LEFT + n * step
            box = [(x, bottom - max(height, 4 if failed else 0)), (x + step - 2, bottom)]
            draw.rectangle(box, fill="#d62728" if failed else "#1f77b4")
    picture.save(out / "fragmentation.png")


def parsed() -> argparse.Namespace:
    """The command line; what is not ours goes to ComfyUI."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--card", type=float)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--decode-every", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true", default=not torch.cuda.is_available())
    options, options.args = parser.parse_known_args()
    return options


def main() -> None:
    """What is not complete yet, then the plot and the table of everything."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), options.base / "models")
    cap = options.base / "custom_nodes" / "small_card"
    shutil.copytree(ROOT / "benchmarks" / "small_card", cap, dirs_exist_ok=True)
    (options.base / "web").mkdir(parents=True, exist_ok=True)
    (options.base / "web" / "index.html").touch()
    with small_card(options.card):
        for name in options.only:
            if not is_complete(options.out, name):
                measure(options, name)
    plot(options.out)
    (options.out / "table.md").write_text(table(options.out) + "\n")
    print(table(options.out))


if __name__ == "__main__":
    main()
